"""Sections 6 to 8: layer choice, both training loops, and the published trajectories."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import PUBLISHED, QUICK, close, golden_parameter, normal, rng

import ipl

# these runs are too short to learn anything, and are told so
pytestmark = pytest.mark.filterwarnings("ignore:stage 1 learned", "ignore:after . steps")


def replay(*batches):
    """A draw_z that hands out the given latents in their order."""
    queue = iter(batches)

    def draw_z(n):
        z = next(queue)
        assert len(z) == n
        return z

    return draw_z


def towards(clip_pair, text):
    """The text loss of select_layers, for one CLIP."""
    E_I, feature = ipl.image_encoder(*clip_pair), ipl.encode_texts(clip_pair[0], text)[0]
    return lambda images: ipl.domain_loss(E_I(images), feature)


def run(cfg, source, clip_pair, seed=0):
    """Both stages -> adapted generator, history."""
    adapted, _, history = ipl.adapt(cfg, source, [clip_pair], rng=rng(seed))
    return adapted, history


def stage2(cfg, source, clips, mapper=None, **more):
    """With the directions of a mapper, else with NADA's of each CLIP -> average, history."""
    label, prompt = ipl.label_direction, ipl.prompt_directions
    directions = [prompt(cfg, x, mapper) if mapper else label(cfg, x) for x, _ in clips]
    return ipl.adapt_generator(cfg, source, clips, directions, rng=rng(), **more)


def published_stage2(cfg, source, clip_pair, target, mapper, *z):
    """The published map: index j >= 2 frees convs[j - 2], index 1 a ToRGB (deviation 2)."""
    layers = [target.conv1, target.to_rgb1, *target.convs]
    more = {"target": target, "layers": layers, "draw_z": replay(*z)}
    return stage2(cfg, source, [clip_pair], mapper, **more)


# ----------------------------------------------------------------------------------------------
# Golden numbers


def test_layer_choice(golden, clip_pair, target):
    g = golden["layer_selection"]
    w, text_loss = g["w"], towards(clip_pair, g["text"])
    chosen, weights = ipl.select_layers(target, text_loss, w, k=4)
    # the published loss is 1 - logits / 100, with logits of scale 100.03 in this CLIP
    close(weights * float(clip_pair[0].logit_scale.exp()) / 100, g["layer_weights_from_grad"])
    assert set(chosen) == set(g["chosen_idx_topk_order"])
    assert all(p.grad is None for p in target.parameters())
    # one step: its size cannot change the choice; nor can how many images are drawn at once
    for more, factor in (({"lr": 0.1}, 10), ({"at_once": 3}, 1)):
        again, scaled = ipl.select_layers(target, text_loss, w, k=4, **more)
        assert set(again) == set(chosen)
        close(scaled, factor * weights)


def test_stage1_trajectory(golden, clip_pair, source, mapper):
    g, start = golden["stage1_trajectory"], copy.deepcopy(mapper)
    cfg, more = replace(PUBLISHED, steps_mapper=5), {"mapper": mapper, "draw_z": replay(*g["z"])}
    trained, history = ipl.train_mapper(cfg, source, *clip_pair, rng=rng(), **more)
    assert trained is mapper
    names = {"loss": "total", "contrastive": "contrastive"}
    names |= {"domain": "target_domain", "domain_source": "source_domain"}
    for row, expected in zip(history, g["losses"], strict=True):
        for ours, published in names.items():
            close(row[ours], expected[published])
    for name, expected in g["final_mapper"].items():
        before, after = (golden_parameter(m, name) for m in (start, mapper))
        close(after - before, expected - before, rtol=1e-2, scale=1e-3)


def test_stage2_trajectory(golden, clip_pair, source, target, mapper):
    g = golden["stage2_trajectory"]
    start = copy.deepcopy(target)
    drawn = (z for i, step in enumerate(g["steps"]) for z in (g["z"][i], step["layer_z"]))
    cfg = replace(PUBLISHED, steps=4)
    average, history = published_stage2(cfg, source, clip_pair, target, mapper, *drawn)
    for row, expected in zip(history, g["steps"], strict=True):
        close(row["loss"], expected["loss"])
        assert set(row["layers"]) == set(expected["chosen_idx"])
    frozen, first, last, ema = (
        {name: p.detach() for name, p in m.named_parameters()}
        for m in (source, start, target, average)
    )
    for name, change in g["param_change_norm"].items():
        close((last[name] - first[name]).norm(), change, rtol=1e-2)
    for key, before, after in (("final_param", first, last), ("final_ema_param", frozen, ema)):
        for name, expected in g[key].items():
            change = expected - before[name]
            close(after[name] - before[name], change, rtol=1e-2, scale=1e-3)


@pytest.mark.parametrize("method", ["ipl", "nada"])
def test_gradients_of_the_first_step(golden, clip_pair, source, target, mapper, method):
    """ZSSGAN.forward: the loss and the gradient norms of the layers that were chosen."""
    g, z = golden["stage2"][f"forward_{method}"], golden["stage2"]["z"]
    cfg, mapper = replace(PUBLISHED, steps=1), mapper if method == "ipl" else None
    layer_z = golden["layer_selection"]["z"]
    _, history = published_stage2(cfg, source, clip_pair, target, mapper, z, layer_z)
    close(history[0]["loss"], g["loss"])
    grads = {name: p.grad for name, p in target.named_parameters() if p.grad is not None}
    assert set(grads) == set(g["trainable_params"])
    for name, expected in g["grad_norm"].items():
        close(grads[name].norm(), expected)
    close(history[0]["grad_norm"], torch.tensor(list(g["grad_norm"].values())).norm())


# ----------------------------------------------------------------------------------------------
# Behaviour


def test_a_run_and_its_history(source, clip_pair):
    frozen = source, clip_pair[0]
    before = [copy.deepcopy(network.state_dict()) for network in frozen]
    adapted, history = run(QUICK, source, clip_pair)
    for module, state in zip(frozen, before, strict=True):
        assert all(torch.equal(x, state[name]) for name, x in module.state_dict().items())
    changed = {name for name, x in adapted.state_dict().items() if (x != before[0][name]).any()}
    assert changed and all(name.startswith(("conv1.", "convs.")) for name in changed)
    assert not any(p.requires_grad for p in adapted.parameters())

    assert [(x["stage"], x["step"]) for x in history] == [(s, i) for s in (1, 2) for i in range(3)]
    assert all(type(x) in (int, float, list) for row in history for x in row.values())
    first = history[3]  # fixed noise and shared crops: both images are equal at the first step,
    assert first["loss"] == pytest.approx(1, abs=1e-4)  # but for the last digits of images
    assert first["delta_image_norm"] < 1e-4  # with and without a graph


def test_same_seed_same_history(source, clip_pair):
    """The seed is the run's own: torch's global one has no part, and is left alone."""
    cfg = replace(QUICK, noise="fresh")
    before = torch.manual_seed(1).get_state()
    first = run(cfg, source, clip_pair)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (run(cfg, source, clip_pair, seed) for seed in (0, 1))
    assert first[1] == again[1] != other[1]


@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_a_direction_sees_latents_and_source_images(source, clip_pair, monkeypatch, noise):
    """w, z and x_source of the same images; fresh noise is drawn for every one of them."""
    seen, drawn, synthesis = [], [], type(source).synthesis

    def direction(w, z, x_source):
        seen.append((w, z, x_source))
        return normal(2, 32)

    def spy(self, w, *, rng=None):
        drawn.append(rng)
        return synthesis(self, w, rng=rng)

    monkeypatch.setattr(ipl, "check_generator", lambda generator: None)
    monkeypatch.setattr(type(source), "synthesis", spy)
    cfg = replace(QUICK, steps=1, noise=noise)
    ipl.adapt_generator(cfg, source, [clip_pair], [direction], rng=rng())
    assert len(drawn) == 3  # the layer choice, source and target
    assert all(isinstance(x, torch.Generator) == (noise == "fresh") for x in drawn)
    ((w, z, x_source),) = seen
    torch.testing.assert_close(source.mapping(z), w)
    apart = (synthesis(source, w) - x_source).abs().max()
    assert apart < 1e-4 if noise == "fixed" else apart > 0.01


@pytest.mark.parametrize(("step", "wanted"), [(0, "eps=0.1"), (2, "a smaller lr")])
def test_a_loss_that_is_not_finite_stops_the_run(source, clip_pair, step, wanted):
    """As that of equal images with eps = 0; no weight has changed by it."""
    values, target = iter([1.0] * step + [torch.nan]), copy.deepcopy(source)
    directions, more = [lambda *_: torch.full((2, 32), next(values))], {"target": target}
    with pytest.raises(FloatingPointError, match=f"stage 2, step {step}: loss is nan.*{wanted}"):
        ipl.adapt_generator(QUICK, source, [clip_pair], directions, rng=rng(), **more)
    assert all(p.isfinite().all() for p in target.parameters())


@pytest.mark.parametrize(("layers", "n", "freeze"), [("adaptive", 2, ""), ("all", 8, "noise")])
def test_one_step_changes_the_layers_chosen(source, clip_pair, layers, n, freeze):
    """And no other; the average follows by the decay."""
    cfg = replace(QUICK, steps=1, ema=0.75, num_layers=2, layers=layers, freeze=freeze)
    target = copy.deepcopy(source)
    average, (row,) = stage2(cfg, source, [clip_pair], target=target)
    assert len({*row["layers"]} & {*range(source.num_ws)}) == len(row["layers"]) == n
    chosen = {id(p) for j in row["layers"] for p in target.layers()[j].parameters()}
    networks = source.parameters(), target.parameters(), average.named_parameters()
    for first, last, (name, mean) in zip(*networks, strict=True):
        trained = id(last) in chosen and not (freeze and freeze in name)
        assert torch.equal(first, last) != trained, name
        torch.testing.assert_close(mean, 0.75 * first + 0.25 * last)


@pytest.mark.parametrize(("autocast", "half"), [("clip", "fp16"), ("all", "bf16")])
def test_half_precision_is_close(source, clip_pair, autocast, half):
    cfg = replace(QUICK, steps=1, steps_mapper=1, noise="fresh", layers="all")
    _, exact = run(cfg, source, clip_pair)
    adapted, history = run(replace(cfg, autocast=autocast, half=half), source, clip_pair)
    for row, expected in zip(history, exact, strict=True):
        assert row["loss"] != expected["loss"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.2)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def other_pair(clip_pair):
    """A second CLIP, of another opinion, and an embedding that is narrower."""
    other = copy.deepcopy(clip_pair[0])
    mix = normal(32, 24, seed=7) / 24**0.5
    other.visual.proj.data = other.visual.proj @ mix
    other.text_projection.data = other.text_projection @ mix.flip(0)
    return other, clip_pair[1]


def test_losses_and_gradients_of_several_clips_are_summed(source, clip_pair, other_pair):
    cfg = replace(QUICK, steps=1, noise="fresh", layers="all")

    def step(weights, *clips):
        target = copy.deepcopy(source)
        _, (row,) = stage2(replace(cfg, clip_weights=weights), source, clips, target=target)
        return row["loss"], [p.grad for p in target.conv1.parameters()]

    loss, grads = step((2.0, 0.25), clip_pair, other_pair)
    (loss_1, grads_1), (loss_2, grads_2) = step((), clip_pair), step((), other_pair)
    close(loss, 2 * loss_1 + 0.25 * loss_2)
    for grad, x, y in zip(grads, grads_1, grads_2, strict=True):
        close(grad, 2 * x + 0.25 * y)


def test_layer_choice_every_n_steps(source, clip_pair, other_pair, monkeypatch):
    """By the weighted sum of the text losses of several CLIPs."""
    chosen, losses, select_layers = [], [], ipl.select_layers

    def spy(generator, text_loss, *args, **more):
        losses.append(text_loss)
        chosen.append(select_layers(generator, text_loss, *args, **more)[0])
        return chosen[-1], None

    monkeypatch.setattr(ipl, "select_layers", spy)
    cfg = replace(QUICK, steps=5, layer_every=2, noise="fresh", num_layers=None, eps=0.0)
    cfg, clips = replace(cfg, clip_weights=(1.0, 3.0)), [clip_pair, other_pair]
    _, history = stage2(cfg, source, clips)
    assert len(chosen) == 3  # at steps 0, 2, 4
    assert [row["layers"] for row in history] == [sorted(chosen[i // 2]) for i in range(5)]
    assert len(history[0]["layers"]) == int(2 * (2 * 5 - 2) / 3)  # the published number, R = 32
    assert history[0]["delta_image_norm"] > 0  # with eps = 0, thanks to fresh noise
    x = source.synthesis(source.mapping(normal(2, source.z_dim))).detach()
    first, second = (towards(pair, "anime")(x) for pair in clips)
    close(losses[0](x).detach(), (first + 3 * second).detach())


def test_crops_stay_inside_and_show_their_part():
    windows = ipl.random_windows(64, 0.3, rng())
    scale, shift = windows[:, 0, 0], windows[:, :, 2]
    assert ((0.7 <= scale) & (scale <= 1)).all() and scale.std() > 0.05
    assert (shift.abs() <= 1 - scale[:, None] + 1e-6).all() and shift.std() > 0.05
    ramp = torch.linspace(-1, 1, 33).expand(1, 3, 33, 33)  # x rises from left to right
    right_half = torch.tensor([[[0.5, 0.0, 0.5], [0.0, 0.5, 0.0]]])
    seen = ipl.crop_images(ramp, right_half)
    assert seen[..., 0].min() > -0.05 and seen[..., -1].min() > 0.95


def test_sample_grid(source, target):
    R, grid = 32, ipl.sample_grid(source, target, n=5, seed=1, truncation_psi=0.7, columns=3)
    assert grid.dtype == torch.uint8 and grid.shape == (4 * R, 3 * R, 3)
    cells = grid.unfold(0, R, R).unfold(1, R, R)  # [4, 3, 3, R, R]
    assert (cells[2:, 2] == 255).all()  # the sixth place is empty
    z = ipl.sample_latents(5, source.z_dim, seed=1)
    w = source.w_avg + 0.7 * (source.mapping(z) - source.w_avg)
    for row, generator in ((0, source), (1, target)):
        x = ((generator.synthesis(w) + 1) * 127.5).round().clamp(0, 255)
        assert (cells[row].float() - x[:3]).abs().max() <= 1
        assert (cells[row + 2, :2].float() - x[3:]).abs().max() <= 1
