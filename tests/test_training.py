"""Sections 6 to 8: layer choice, both training loops, and the published trajectories."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import close, normal, rng

import ipl

# these runs are too short to learn anything, and are told so
pytestmark = pytest.mark.filterwarnings("ignore:stage 1 learned", "ignore:after . steps")

PUBLISHED = ipl.Config(noise="fixed", num_layers=4, batch_mapper=4, batch=2)
QUICK = replace(PUBLISHED, steps_mapper=3, steps=3, ema=0.5, eps=0.1, layer_batch=2)


def replay(*batches):
    """A draw_z that hands out the given latents in their order."""
    queue = list(batches)

    def draw_z(n):
        z = queue.pop(0)
        assert len(z) == n
        return z

    return draw_z


def published_layers(generator):
    """The published map: index j >= 2 frees convs[j - 2], index 1 a ToRGB (deviation 2)."""
    return [generator.conv1, generator.to_rgb1, *generator.convs]


def towards(clip_pair, text):
    """The text loss of select_layers, for one CLIP."""
    E_I, feature = ipl.image_encoder(*clip_pair), ipl.encode_texts(clip_pair[0], text)[0]
    return lambda images: ipl.domain_loss(E_I(images), feature)


def of_labels(cfg, source, clips, **more):
    """Stage 2 with NADA's direction of each CLIP."""
    directions = [ipl.label_direction(cfg, clip_model) for clip_model, _ in clips]
    return ipl.adapt_generator(cfg, source, clips, directions, rng=rng(), **more)


# ----------------------------------------------------------------------------------------------
# Golden numbers


def test_layer_choice(golden, clip_pair, target):
    g = golden["layer_selection"]
    text_loss = towards(clip_pair, g["text"])
    chosen, weights = ipl.select_layers(target, text_loss, g["w"], k=4)
    # the published loss is 1 - logits / 100, with logits of scale 100.03 in this CLIP
    close(weights * float(clip_pair[0].logit_scale.exp()) / 100, g["layer_weights_from_grad"])
    assert set(chosen) == set(g["chosen_idx_topk_order"])
    assert all(p.grad is None for p in target.parameters())
    again, larger = ipl.select_layers(target, text_loss, g["w"], k=4, lr=0.1)
    assert set(again) == set(chosen)  # one step: its size cannot change the choice
    close(larger, 10 * weights)


@pytest.mark.parametrize("at_once", [1, 3])
def test_layer_choice_of_a_few_images_at_a_time(clip_pair, target, at_once):
    w = target.mapping(normal(4, target.z_dim)).detach()
    sizes, loss = [], towards(clip_pair, "anime")

    def text_loss(images):
        sizes.append(len(images))
        return loss(images)

    whole, few = (ipl.select_layers(target, text_loss, w, 4, at_once=n) for n in (4, at_once))
    assert sizes == [4] + ([1] * 4 if at_once == 1 else [3, 1])
    assert set(whole[0]) == set(few[0])
    close(few[1], whole[1])
    assert few[1].std() > 0.01 * few[1].mean()


def test_stage1_trajectory(golden, clip_pair, source, mapper):
    g = golden["stage1_trajectory"]
    cfg = replace(PUBLISHED, steps_mapper=5)
    before = copy.deepcopy(mapper)
    trained, history = ipl.train_mapper(
        cfg, source, *clip_pair, rng=rng(), mapper=mapper, draw_z=replay(*g["z"])
    )
    assert trained is mapper
    for row, expected in zip(history, g["losses"], strict=True):
        close(row["loss"], expected["total"])
        close(row["contrastive"], expected["contrastive"])
        close(row["domain"], expected["target_domain"])
        close(row["domain_source"], expected["source_domain"])
    for name, expected in g["final_mapper"].items():
        i, kind = int(name.split(".")[2]) - 1, name.split(".")[3]
        start, end = (dict(weight=m.weights, bias=m.biases)[kind][i] for m in (before, mapper))
        close(end - start, expected - start, rtol=1e-2, scale=1e-3)
        close(end.norm(), g["final_mapper_norm"][name])


def test_stage2_trajectory(golden, clip_pair, source, target, mapper):
    g = golden["stage2_trajectory"]
    cfg = replace(PUBLISHED, steps=4)
    start = copy.deepcopy(target)
    direction = ipl.prompt_directions(cfg, clip_pair[0], mapper)
    drawn = (z for i, step in enumerate(g["steps"]) for z in (g["z"][i], step["layer_z"]))
    average, history = ipl.adapt_generator(
        cfg, source, [clip_pair], [direction], rng=rng(),
        target=target, layers=published_layers(target), draw_z=replay(*drawn),
    )  # fmt: skip
    for row, expected in zip(history, g["steps"], strict=True):
        close(row["loss"], expected["loss"])
        assert set(row["layers"]) == set(expected["chosen_idx"])
    frozen, first, last, ema = (
        {name: p.detach() for name, p in m.named_parameters()}
        for m in (source, start, target, average)
    )
    for name, change in g["param_change_norm"].items():
        close((last[name] - first[name]).norm(), change, rtol=1e-2)
        close(last[name].norm(), g["final_param_norm"][name])
        close(ema[name].norm(), g["final_ema_param_norm"][name])
    for name, expected in g["final_param"].items():
        close(last[name] - first[name], expected - first[name], rtol=1e-2, scale=1e-3)
    for name, expected in g["final_ema_param"].items():
        close(ema[name] - frozen[name], expected - frozen[name], rtol=1e-2, scale=1e-3)
    image = target.synthesis(golden["stage2"]["w"])
    close(image, g["final_image_trainable_from_stage2_w"], rtol=1e-2, scale=1e-3)


@pytest.mark.parametrize("method", ["ipl", "nada"])
def test_gradients_of_the_first_step(golden, clip_pair, source, target, mapper, method):
    """ZSSGAN.forward: the loss and the gradient norms of the layers that were chosen."""
    g = golden["stage2"][f"forward_{method}"]
    cfg = replace(PUBLISHED, steps=1)
    direction = ipl.label_direction(cfg, clip_pair[0])
    if method == "ipl":
        direction = ipl.prompt_directions(cfg, clip_pair[0], mapper)
    draw_z = replay(golden["stage2"]["z"], golden["layer_selection"]["z"])
    _, history = ipl.adapt_generator(
        cfg, source, [clip_pair], [direction], rng=rng(),
        target=target, layers=published_layers(target), draw_z=draw_z,
    )  # fmt: skip
    close(history[0]["loss"], g["loss"])
    grads = {name: p.grad for name, p in target.named_parameters() if p.grad is not None}
    assert set(grads) == set(g["trainable_params"])
    for name, expected in g["grad_norm"].items():
        close(grads[name].norm(), expected)
    close(history[0]["grad_norm"], torch.tensor(list(g["grad_norm"].values())).norm())


# ----------------------------------------------------------------------------------------------
# Behaviour


def run(cfg, source, clip_pair, seed=0):
    """Both stages -> mapper, adapted generator, history."""
    adapted, (mapper,), history = ipl.adapt(cfg, source, [clip_pair], rng=rng(seed))
    return mapper, adapted, history


def test_the_frozen_stay_as_they_are(source, clip_pair):
    clip_model = clip_pair[0]
    before = [copy.deepcopy(network.state_dict()) for network in (source, clip_model)]
    _, adapted, _ = run(QUICK, source, clip_pair)
    for module, state in zip((source, clip_model), before, strict=True):
        for name, x in module.state_dict().items():
            assert torch.equal(x, state[name]), name
        assert all(p.grad is None for p in module.parameters())
    changed = {name for name, x in adapted.state_dict().items() if (x != before[0][name]).any()}
    assert changed and all(name.startswith(("conv1.", "convs.")) for name in changed)
    assert not any(p.requires_grad for p in adapted.parameters())


@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_same_seed_same_history(source, clip_pair, noise):
    cfg = replace(QUICK, noise=noise, crop=0.2)
    torch.manual_seed(1)
    first = run(cfg, source, clip_pair)
    torch.manual_seed(2)
    again = run(cfg, source, clip_pair)
    other = run(cfg, source, clip_pair, seed=1)
    assert first[2] == again[2] != other[2]
    for name, x in again[1].state_dict().items():
        assert torch.equal(x, first[1].state_dict()[name])


def test_training_leaves_the_global_seed_alone(source, clip_pair):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run(replace(QUICK, steps=1, steps_mapper=1, noise="fresh", crop=0.1), source, clip_pair)
    assert torch.equal(torch.rand(3), expected)


def test_history(source, clip_pair):
    _, _, history = run(QUICK, source, clip_pair)
    assert [(x["stage"], x["step"]) for x in history] == [(s, i) for s in (1, 2) for i in range(3)]
    for row in history:
        assert all(type(x) in (int, float, list) for x in row.values())
    first = history[3]  # fixed noise: both images are equal at the first step
    assert first["loss"] == pytest.approx(1, abs=1e-4)  # images with and without a graph may
    assert first["delta_image_norm"] < 1e-4  # differ in their last digits
    assert 0 < first["grad_norm"] < 1e3
    assert history[4]["delta_image_norm"] > 0
    assert len(first["layers"]) == 4


@pytest.mark.parametrize(("step", "wanted"), [(0, "eps=0.1"), (2, "a smaller lr")])
def test_a_loss_that_is_not_finite_stops_the_run(source, clip_pair, step, wanted):
    """As that of equal images with eps = 0; no weight has changed by it."""
    directions, target = iter([1.0] * step + [torch.nan]), copy.deepcopy(source)
    with pytest.raises(FloatingPointError, match=f"stage 2, step {step}: loss is nan.*{wanted}"):
        ipl.adapt_generator(
            QUICK, source, [clip_pair], [lambda w, z, x: torch.full((2, 32), next(directions))],
            rng=rng(), target=target,
        )  # fmt: skip
    assert all(p.isfinite().all() for p in target.parameters())


def test_the_loss_falls_on_fixed_latents(source, clip_pair):
    cfg = replace(QUICK, steps=12, layers="all")
    z = normal(2, source.z_dim)
    _, history = of_labels(cfg, source, [clip_pair], draw_z=lambda n: z)
    assert history[-1]["loss"] < 0.8 < history[0]["loss"]
    assert history[0]["layers"] == list(range(source.num_ws))


def test_only_chosen_layers_change(source, clip_pair):
    cfg = replace(QUICK, steps=1, num_layers=2)
    target = copy.deepcopy(source)
    _, history = of_labels(cfg, source, [clip_pair], target=target)
    assert len(history[0]["layers"]) == 2
    chosen = {id(p) for j in history[0]["layers"] for p in target.layers()[j].parameters()}
    for (name, p), q in zip(target.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(p, q) != (id(p) in chosen), name


def test_layer_choice_every_n_steps(source, clip_pair, monkeypatch):
    chosen, select_layers = [], ipl.select_layers

    def counted(*args, **more):
        chosen.append(select_layers(*args, **more))
        return chosen[-1]

    monkeypatch.setattr(ipl, "select_layers", counted)
    cfg = replace(QUICK, steps=5, layer_every=2, noise="fresh", num_layers=None, eps=0.0)
    _, history = of_labels(cfg, source, [clip_pair])
    assert len(chosen) == 3  # at steps 0, 2, 4
    assert [row["layers"] for row in history] == [sorted(chosen[i // 2][0]) for i in range(5)]
    assert len(history[0]["layers"]) == int(2 * (2 * 5 - 2) / 3)  # the published number, R = 32
    assert history[0]["delta_image_norm"] > 0  # with eps = 0, thanks to fresh noise


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("autocast", ["clip", "all"])
def test_half_precision_is_close(source, clip_pair, autocast, half):
    cfg = replace(QUICK, steps=1, steps_mapper=1, eps=0.1, noise="fresh", layers="all")
    _, _, exact = run(cfg, source, clip_pair)
    _, adapted, history = run(replace(cfg, autocast=autocast, half=half), source, clip_pair)
    for row, expected in zip(history, exact, strict=True):
        assert row["loss"] != expected["loss"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.2)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


def test_freeze(source, clip_pair):
    cfg = replace(QUICK, layers="all", freeze="noise")
    adapted, _ = of_labels(cfg, source, [clip_pair])
    for (name, p), q in zip(adapted.named_parameters(), source.parameters(), strict=True):
        trained = name.startswith("conv") and "noise" not in name
        assert torch.equal(p, q) != trained, name


def test_the_average_follows_by_the_decay(source, clip_pair):
    cfg = replace(QUICK, steps=1, ema=0.75)
    target = copy.deepcopy(source)
    average, _ = of_labels(cfg, source, [clip_pair], target=target)
    networks = (network.parameters() for network in (average, source, target))
    for x, first, last in zip(*networks, strict=True):
        torch.testing.assert_close(x, 0.75 * first + 0.25 * last)


def test_directions(source, clip_pair, mapper, golden):
    """[B, e]: each prompt's own, or the labels' for all; and yours may read z and x_source."""
    w = golden["stage1"]["w"]
    own = ipl.prompt_directions(QUICK, clip_pair[0], mapper)(w)
    shared = ipl.label_direction(QUICK, clip_pair[0])(w)
    assert own.shape == shared.shape == (4, 32) and not own.requires_grad
    assert (own[0] - own[1]).norm() > 1e-3 and torch.equal(shared[0], shared[1])
    seen = []

    def direction(w, z, x_source):
        seen.append((w, z, x_source))
        return shared[: len(w)]

    ipl.adapt_generator(replace(QUICK, steps=1), source, [clip_pair], [direction], rng=rng())
    ((w, z, x_source),) = seen
    torch.testing.assert_close(source.mapping(z), w)
    torch.testing.assert_close(source.synthesis(w), x_source)


# ----------------------------------------------------------------------------------------------
# Several CLIPs


@pytest.fixture(scope="module")
def other_pair(clip_pair):
    """A second CLIP, of another opinion, and an embedding that is narrower."""
    other = copy.deepcopy(clip_pair[0])
    mix = normal(32, 24, seed=7) / 24**0.5
    other.visual.proj.data = other.visual.proj @ mix
    other.text_projection.data = other.text_projection @ mix.flip(0)
    return other, clip_pair[1]


def test_two_equal_clips_of_half_the_weight_are_one(source, clip_pair):
    cfg = replace(QUICK, clip_weights=(0.5, 0.5))
    adapted, history = of_labels(cfg, source, [clip_pair, clip_pair])
    one, rows = of_labels(QUICK, source, [clip_pair])
    assert [row["layers"] for row in history] == [row["layers"] for row in rows]
    for row, expected in zip(history, rows, strict=True):
        close(row["loss"], expected["loss"])
        close(row["delta_image_norm"], expected["delta_image_norm"], scale=1e-4)
    for p, q in zip(adapted.parameters(), one.parameters(), strict=True):
        close(p, q, rtol=1e-3, scale=1e-4)


@pytest.mark.parametrize("weights", [(), (2.0, 0.25)])
def test_losses_and_gradients_of_several_clips_are_summed(source, clip_pair, other_pair, weights):
    cfg = replace(QUICK, steps=1, noise="fresh", layers="all", clip_weights=weights)

    def step(cfg, *clips):
        target = copy.deepcopy(source)
        _, history = of_labels(cfg, source, clips, target=target)
        return history[0]["loss"], [p.grad for p in target.conv1.parameters()]

    loss, grads = step(cfg, clip_pair, other_pair)
    alone = [step(replace(cfg, clip_weights=()), clip) for clip in (clip_pair, other_pair)]
    a, b = weights or (1, 1)
    close(loss, a * alone[0][0] + b * alone[1][0])
    for grad, x, y in zip(grads, alone[0][1], alone[1][1], strict=True):
        close(grad, a * x + b * y)
    assert abs(alone[0][0] - alone[1][0]) > 1e-3


def test_layer_choice_of_several_clips(source, clip_pair, other_pair, monkeypatch):
    """It is made by the weighted sum of the losses of their texts."""
    seen, select_layers = [], ipl.select_layers

    def spy(generator, text_loss, w, k, **more):
        seen.append((text_loss, generator.synthesis(w)))
        return select_layers(generator, text_loss, w, k, **more)

    monkeypatch.setattr(ipl, "select_layers", spy)
    of_labels(replace(QUICK, steps=1, clip_weights=(1.0, 3.0)), source, [clip_pair, other_pair])
    ((text_loss, x),) = seen
    first, second = (towards(pair, "anime")(x) for pair in (clip_pair, other_pair))
    close(text_loss(x).detach(), (first + 3 * second).detach())


# ----------------------------------------------------------------------------------------------
# Crops


def test_source_and_target_share_their_crop(source, clip_pair):
    """With equal generators and fixed noise, only different crops could make a difference."""
    cfg = replace(QUICK, steps=1, crop=0.3)
    _, _, history = run(cfg, source, clip_pair)
    assert history[-1]["delta_image_norm"] < 1e-4


def test_fresh_noise_is_drawn_for_every_image(source, clip_pair, monkeypatch):
    drawn, synthesis = [], type(source).synthesis

    def spy(self, w, *, rng=None):
        drawn.append(rng)
        return synthesis(self, w, rng=rng)

    monkeypatch.setattr(type(source), "synthesis", spy)
    monkeypatch.setattr(ipl, "check_generator", lambda generator: None)
    for noise, fresh in (("fresh", True), ("fixed", False)):
        drawn.clear()
        run(replace(QUICK, steps=1, steps_mapper=1, noise=noise), source, clip_pair)
        assert len(drawn) == 4  # stage 1; the layer choice, source and target of stage 2
        assert all(isinstance(x, torch.Generator) == fresh for x in drawn)


def test_crops_stay_inside():
    windows = ipl.random_windows(64, 0.3, rng())
    scale, shift = windows[:, 0, 0], windows[:, :, 2]
    assert windows.shape == (64, 2, 3)
    assert ((0.7 <= scale) & (scale <= 1)).all() and scale.std() > 0.05
    assert (shift.abs() <= 1 - scale[:, None] + 1e-6).all() and shift.std() > 0.05


def test_a_window_shows_its_part():
    x, whole = normal(2, 3, 8, 8), torch.eye(2, 3).expand(2, -1, -1)
    torch.testing.assert_close(ipl.crop_images(x, whole), x, rtol=1e-4, atol=1e-5)
    assert ipl.crop_images(x, None) is x
    ramp = torch.linspace(-1, 1, 33).expand(1, 3, 33, 33)  # x rises from left to right
    right_half = torch.tensor([[[0.5, 0.0, 0.5], [0.0, 0.5, 0.0]]])
    seen = ipl.crop_images(ramp, right_half)
    assert seen[..., 0].min() > -0.05 and seen[..., -1].min() > 0.95


# ----------------------------------------------------------------------------------------------
# Samples


def test_samples_do_not_depend_on_their_number():
    few, many = (ipl.sample_latents(n, 5, seed=3) for n in (2, 9))
    assert torch.equal(few, many[:2])
    assert not torch.equal(few, ipl.sample_latents(2, 5, seed=4))


def test_sample_grid(source, target):
    grid = ipl.sample_grid(source, target, n=5, seed=1, truncation_psi=0.7, columns=3)
    R = 32
    assert grid.dtype == torch.uint8 and grid.shape == (4 * R, 3 * R, 3)
    cells = grid.unfold(0, R, R).unfold(1, R, R)  # [4, 3, 3, R, R]
    assert (cells[2:, 2] == 255).all()  # the sixth place is empty
    z = ipl.sample_latents(5, source.z_dim, seed=1)
    w = source.w_avg + 0.7 * (source.mapping(z) - source.w_avg)
    torch.testing.assert_close(ipl.truncate(source.mapping(z), source.w_avg, 0.7), w)
    for row, generator in ((0, source), (1, target)):
        x = ((generator.synthesis(w) + 1) * 127.5).round().clamp(0, 255)
        assert (cells[row].float() - x[:3]).abs().max() <= 1
        assert (cells[row + 2, :2].float() - x[3:]).abs().max() <= 1
