"""Few-shot adaptation: golden numbers of the seven methods, their loop, what it refuses.

Golden numbers are of published code's formulas, run on sines. Those of our own are derived here a
second time: in words of loops, or by hand in a comment.
"""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import close, normal, rng
from torch import nn

import ipl
from stylegan2_ops import Discriminator, Generator
from stylegan2_ops.losses import generator_loss
from variants import fewshot
from variants.fewshot import Config, adapt

QUICK = Config(
    steps=4, ema=0.5, mixing=0.5, flip=0.5, r1_every=2, path_every=2, image_every=2, cross_every=2,
    freeze_until=8, cr_flip=0.5, cr_shift=1 / 8, ewc=1.0, ewc_draws=2,
)  # fmt: skip
METHODS = "tgan freezed cr cdc dag rssa ewc".split()
PLAIN = {  # what makes each method plain fine-tuning
    "freezed": {"freeze_until": 32},
    "cr": {"cr": 0.0},
    "cdc": {"distance": 0.0, "anchors": False, "image_every": 1},
    "dag": {"dag": 0.0},
    "rssa": {"self_weight": 0.0, "cross_weight": 0.0, "anchors": False, "image_every": 1,
             "compression": ()},
    "ewc": {"ewc": 0.0},
}  # fmt: skip


def waves(*shape, offset=0.0):
    """sin(1 + offset), sin(2 + offset), ... row by row, in float64."""
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64) + offset).reshape(shape)


def exactly(found, expected, atol=5e-9):
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def same(a, b):
    """Two modules, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Generator(16, {4: 6, 8: 6, 16: 4}, w_dim=6, n_mlp=2)
        D = Discriminator(16, {4: 6, 8: 5, 16: 4})
    for name, p in G.named_parameters():
        if name.endswith("noise.weight"):
            p.data.fill_(0.1)
    return G.requires_grad_(False).eval(), D.requires_grad_(False)


@pytest.fixture(scope="module")
def shots():
    return normal(5, 3, 16, 16).clamp(-1, 1)


def codes_of(G, shots):
    return G.mapping(normal(len(shots), G.z_dim, seed=3))[:, None].expand(-1, G.num_ws, -1)


def run(networks, shots, loop=ipl.progress, seed=0, **changes):
    cfg = replace(QUICK, **changes)
    codes = codes_of(networks[0], shots) if cfg.method == "rssa" else None
    return adapt(cfg, *networks, shots, rng=rng(seed), codes=codes, steps=loop)


@pytest.fixture(scope="module")
def plain(networks, shots):
    return run(networks, shots, method="tgan")


# ----------------------------------------------------------------------------------------------
# The loop


def test_each_learns_and_leaves_the_source_alone(networks, shots):
    before = copy.deepcopy(networks)
    for method in METHODS:
        adapted, history, state = run(networks, shots, method=method)
        assert all(same(*pair) for pair in zip(networks, before, strict=True))
        assert not same(adapted, networks[0]) and not same(adapted, state["G"])
        own = {"cr": "consistency", "cdc": "distance", "dag": "dag", "rssa": "self",
               "ewc": "elastic"}.get(method, "loss")  # fmt: skip
        assert [row["step"] for row in history] == [0, 1, 2, 3] and all(own in x for x in history)
        assert [("r1" in row, "path" in row) for row in history] == 2 * [2 * (True,), 2 * (False,)]
        assert all(math.isfinite(x) for row in history for x in row.values() if x != "few-shot")


@pytest.mark.parametrize("method", PLAIN)
def test_with_weight_0_each_is_plain_fine_tuning(networks, shots, plain, method):
    """Bit for bit: the same operations, and zeros."""
    adapted, history, state = run(networks, shots, method=method, **PLAIN[method])
    assert same(adapted, plain[0]) and same(state["G"], plain[2]["G"])
    assert same(state["D"], plain[2]["D"])
    assert [row["loss"] for row in history] == [row["loss"] for row in plain[1]]


@pytest.mark.parametrize("method", ["tgan", "ewc"])
@pytest.mark.parametrize("freeze", ["noise", ""])
def test_what_of_the_generator_learns(networks, shots, freeze, method):
    """All but the mapping, and what `freeze` names."""
    G = run(networks, shots, method=method, freeze=freeze)[2]["G"]
    for (name, before), after in zip(networks[0].named_parameters(), G.parameters(), strict=True):
        rests = name.startswith("style.") or (freeze != "" and freeze in name)
        assert torch.equal(before, after) == rests, name


def test_classes_rest_with_the_mapping():
    G = Generator(8, {4: 4, 8: 3}, w_dim=3, n_mlp=1, c_dim=2)
    of_mapping = {p for name, p in G.named_parameters() if name.startswith(("style.", "embed."))}
    assert len(of_mapping) == 4 and of_mapping.isdisjoint(fewshot.learning(G, ""))


@pytest.mark.parametrize("method", PLAIN)
def test_with_its_weight_each_is_another(networks, shots, plain, method):
    assert not same(run(networks, shots, method=method)[2]["D"], plain[2]["D"])


class Stopped(Exception):
    pass


def keeper(n, kept):
    """The steps of a run that is stopped before step n, or goes on with what is kept."""

    def steps(stage, total, state):
        done = kept.get("done", 0)
        for name, part in state.items() if kept else ():
            if isinstance(part, list):
                part[:] = kept[name]
            elif isinstance(part, torch.Generator):
                part.set_state(kept[name])
            else:
                part.load_state_dict(kept[name])
        for step in range(done, total):
            if step == n:
                for name, part in state.items():
                    if isinstance(part, torch.Generator):
                        kept[name] = part.get_state()
                    else:
                        saved = list(part) if isinstance(part, list) else part.state_dict()
                        kept[name] = copy.deepcopy(saved)
                kept["done"] = step
                raise Stopped
            yield step

    return steps


@pytest.mark.parametrize("method", METHODS)
def test_goes_on_to_the_same_bits(networks, shots, method):
    whole, kept = run(networks, shots, method=method), {}
    for n in (1, 3):
        with pytest.raises(Stopped):
            run(networks, shots, method=method, loop=keeper(n, kept))
    adapted, history, state = run(networks, shots, method=method, loop=keeper(None, kept))
    assert same(adapted, whole[0]) and history == whole[1]
    assert all(same(state[x], whole[2][x]) for x in ("G", "D", "extras"))


def test_adam_and_what_a_step_trains():
    """StyleGAN2's numbers, for regularisers at every 16th and every 4th step."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    adam_d, adam_g = (fewshot.lazy_adam([p, q], 0.002, n) for n in (16, 4))
    assert adam_d.defaults["lr"] == pytest.approx(0.00188235, abs=1e-8)
    assert adam_d.defaults["betas"] == pytest.approx((0, 0.990585), abs=1e-6)
    assert adam_g.defaults["lr"] == pytest.approx(0.0016)
    assert adam_g.defaults["betas"] == pytest.approx((0, 0.991992), abs=1e-6)
    fewshot.take_step(adam_d, (p * torch.tensor([1.0, -1.0])).sum(), [p, q])
    assert torch.equal(q, torch.ones(2)) and p[0] < 1 < p[1]  # Adam passes over q


def test_mean_length_and_average(networks, shots):
    """a <- a + 0.01 (mean length - a), from 0; the average of G by hand."""
    seen = []

    def watch(stage, total, state):
        for step in range(total):
            before = state["mean_length"][0]
            yield step
            seen.append((before, state["mean_length"][0], copy.deepcopy(state["G"])))

    adapted, history, _ = run(networks, shots, method="tgan", loop=watch)
    assert seen[0][0] == 0 < seen[0][1] == seen[1][1] < seen[2][1]
    assert history[0]["path"] >= (99 * seen[0][1]) ** 2 * 0.999  # the lengths' mean is 100 a
    name, weight = "conv1.conv.weight", networks[0].conv1.conv.weight
    for _, _, G in seen:
        weight = 0.5 * weight + 0.5 * G.conv1.conv.weight
    close(adapted.state_dict()[name], weight, scale=1e-6)


def test_shots_of_a_batch():
    """Each as often as another; all once in a batch of all; a mirrored one with probability p."""
    shots = torch.arange(3.0).view(3, 1, 1, 1) + torch.linspace(0, 0.5, 4)  # [3, 1, 1, 4]
    for n, counts in ((3, {1}), (2, {0, 1}), (7, {2, 3})):
        drawn = fewshot.some_shots(shots, n, 0.0, rng())[:, 0, 0, 0]
        assert {int((drawn == i).sum()) for i in range(3)} == counts
    drawn = fewshot.some_shots(shots, 3000, 0.25, rng())
    assert abs((drawn[..., 0] % 1 > 0).float().mean() - 0.25) < 0.03


def test_mixed_codes(networks):
    G = networks[0]
    w = fewshot.mixed_codes(G, 3, 0.0, rng())
    assert torch.equal(w, w[:, :1].expand(-1, G.num_ws, -1)) and w.shape == (3, G.num_ws, 6)
    cuts = set()
    for seed in range(60):
        w = fewshot.mixed_codes(G, 2, 1.0, rng(seed))
        changes = (w[:, 1:] != w[:, :-1]).any(-1)
        assert torch.equal(changes[0], changes[1]) and changes[0].sum() == 1
        cuts.add(int(changes[0].nonzero()) + 1)
    assert cuts == set(range(1, G.num_ws))


# ----------------------------------------------------------------------------------------------
# FreezeD


def test_frozen_names():
    D = Discriminator(64, dict.fromkeys((4, 8, 16, 32, 64), 2))
    frozen = fewshot.frozen_names(D, 16)  # fromRGB, 64 -> 32, 32 -> 16
    assert {name.split(".")[1] for name in frozen} == {"0", "1", "2"}
    assert all(name.startswith("convs.") for name in frozen)
    assert fewshot.frozen_names(D, 64) == {"convs.0.0.weight", "convs.0.1.bias"}
    assert not fewshot.frozen_names(D, 128)


def test_frozen_layers_stay_and_let_gradients_through(networks, shots):
    G, D = networks
    frozen = fewshot.frozen_names(D, QUICK.freeze_until)
    learned = run(networks, shots, method="freezed")[2]["D"]
    for name, p in D.named_parameters():
        assert torch.equal(p, learned.get_parameter(name)) == (name in frozen), name
    slopes = []
    for rest in (set(), frozen):
        judge, images = copy.deepcopy(D), G.synthesis(G.mapping(normal(4, 6))).requires_grad_()
        for name, p in judge.named_parameters():
            p.requires_grad_(name not in rest)
        slopes.append(torch.autograd.grad(generator_loss(judge(images)), images)[0].norm())
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=0)
    assert slopes[0] > 0


# ----------------------------------------------------------------------------------------------
# CR


def test_consistency_of_logits(monkeypatch):
    """(2 - 1.5)^2 = .25 and (-1 - 0)^2 = 1: the mean is .625, and 10 times it 6.25."""
    x = torch.zeros(2, 3, 8, 8)
    logits = torch.tensor([[2.0], [-1.0]], requires_grad=True)
    other = torch.tensor([[1.5], [0.0]], requires_grad=True)
    loss = fewshot.logit_consistency(lambda x: other, x, logits, QUICK, rng())
    exactly(10 * loss, 6.25)
    loss.backward()  # through both
    assert torch.equal(logits.grad, -other.grad) and logits.grad.abs().min() > 0
    D = Discriminator(8, {4: 3, 8: 2})
    x = normal(4, 3, 8, 8)
    still = replace(QUICK, cr_flip=0.0, cr_shift=0.0)
    assert fewshot.logit_consistency(D, x, D(x), still, rng()) == 0
    assert fewshot.logit_consistency(D, x, D(x), QUICK, rng()) > 0


def test_transformed_images():
    """Each is the image or its mirror image, moved by up to a pixel, with zeros behind it."""
    x = normal(300, 3, 8, 8)
    moved, seen = fewshot.transformed(x, 0.5, 1 / 8, rng()), set()
    padded = F.pad(torch.stack([x, x.flip(3)]), 4 * [1])
    for i in range(len(x)):
        fits = [
            (flip, row, column)
            for flip, row, column in itertools.product(range(2), range(3), range(3))
            if torch.equal(padded[flip, i, :, row : row + 8, column : column + 8], moved[i])
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 18
    assert torch.equal(fewshot.transformed(x, 0.0, 0.0, rng()), x)
    assert torch.equal(fewshot.transformed(x, 1.0, 0.0, rng()), x.flip(3))


# ----------------------------------------------------------------------------------------------
# CDC


def by_loops(source, target, layers):
    """L_distance in CDC's own order: for each anchor, a row of three similarities."""
    total = []
    for i, layer in enumerate(layers):
        rows = []
        for maps in (source, target):
            flat = maps[layer].flatten(1)
            others = [j for j in range(len(flat)) if j != i]
            rows.append(torch.stack([F.cosine_similarity(flat[i], flat[j], 0) for j in others]))
        p, q = (row.softmax(0) for row in rows)
        total.append((p * (p / q).log()).sum())
    return torch.stack(total)


def test_distance_consistency():
    source = [waves(4, 3, 2, 2), waves(4, 2, 4, 4, offset=0.3)]
    target = [waves(4, 3, 2, 2, offset=0.5) ** 2, waves(4, 2, 4, 4, offset=1.7) ** 2]
    layers = torch.tensor([0, 1, 0, 1])
    loss = fewshot.distance_consistency(source, target, layers)
    exactly(1000 * loss, 3.568645, atol=5e-7)
    anchors = by_loops(source, target, layers)  # derived a second time
    exactly(anchors.mean(), 0.01070593)
    exactly(loss, anchors.sum() / 12, atol=1e-12)  # over all 12 entries
    maps = [x.clone().requires_grad_() for x in source]
    equal = fewshot.distance_consistency(source, maps, layers)
    slopes = torch.autograd.grad(equal, maps)
    assert equal.abs() < 1e-15 and all(x.abs().max() < 1e-12 for x in slopes)


@pytest.mark.parametrize("same_noise", [True, False])
def test_distance_begins_at_0_with_equal_noise_alone(networks, shots, same_noise):
    row = run(networks, shots, method="cdc", same_noise=same_noise)[1][0]
    assert (abs(row["distance"]) < 1e-7) == same_noise


def test_where_patches_are_judged():
    """By hand: at 256 px 1, conv1 3, blur 6, conv2 8 | 12, 18, 22 | 30, 42, 50; the head adds 2 at
    stride 8: 66. (block, 2): after conv2."""
    assert fewshot.patch_place(256) == (3, 2)
    assert fewshot.patch_place(128) == (2, 2)  # 30 px; 38 after conv1 of block 3
    assert fewshot.patch_place(64) == (2, 1)  # 16 px
    assert fewshot.patch_place(1024) == (5, 2)
    assert fewshot.patch_place(256, 82 / 256) == (4, 1)
    assert fewshot.patch_place(256, 138 / 256) == (4, 2)
    assert fewshot.patch_place(256, 170 / 256) == (5, 1)


@pytest.mark.parametrize("place, field", [((1, 1), 5), ((1, 2), 12), ((2, 1), 16), ((2, 2), 30)])
def test_a_patch_sees_so_many_pixels(place, field):
    """And its logits have a place each."""
    D = Discriminator(64, dict.fromkeys((4, 8, 16, 32, 64), 3)).double()
    head = fewshot.patch_head(D, place, rng()).double()
    images = waves(2, 3, 64, 64).requires_grad_()
    logits = fewshot.patch_logits(D, head, images, place)
    side = 64 >> (place[0] - 2 + place[1])
    assert logits.shape == (2, 1, side, side)
    (slope,) = torch.autograd.grad(logits[0, 0, side // 2, side // 2], images)
    seen = slope[0].abs().sum(0)
    assert ((seen.sum(0) > 0).sum(), (seen.sum(1) > 0).sum()) == (field, field)


def test_patches_and_anchors_take_turns(networks, shots, monkeypatch):
    """At an anchor step the head of patches does not learn; latents are near the anchors there."""
    heads, mapped = [], []
    mapping = Generator.mapping
    monkeypatch.setattr(Generator, "mapping", lambda G, z: mapped.append(z) or mapping(G, z))

    def watch(stage, total, state):
        mapped.clear()
        for step in range(total):
            yield step
            heads.append([p.clone() for p in state["extras"].parameters()])
            anchors = state["extras"].anchors
            near = [torch.cdist(z, anchors).min() < 1.0 for z in mapped if len(z) == 4]
            assert any(near) == (step % 2 == 0), step
            mapped.clear()

    extras = run(networks, shots, method="cdc", anchor_spread=0.01, loop=watch)[2]["extras"]
    assert extras.anchors.shape == (5, 6) and len(heads[0]) == 2
    moved = [not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(heads)]
    assert moved == [True, False, True]


# ----------------------------------------------------------------------------------------------
# DAG


def test_transforms():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    turns = [T(x).flatten().tolist() for T in fewshot.transforms("rotation")]
    assert turns == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]]
    flips = [T(x).flatten().tolist() for T in fewshot.transforms("fliprot")]
    assert flips == [[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2], [1, 3, 0, 2]]
    crops = [T(torch.arange(64.0).view(1, 1, 8, 8)) for T in fewshot.transforms("cropping")]
    assert [int(x[0, 0, 0, 0]) for x in crops] == [0, 0, 2, 16, 18]
    assert crops[3][0, 0, 0].tolist() == [16, 16, 17, 18, 19, 19, 20, 21]
    assert crops[3][0, 0, :, 0].tolist() == [16, 16, 24, 32, 40, 40, 48, 56]
    images = normal(2, 3, 8, 8)
    first, *others = fewshot.transforms("rotation")
    for T, back in zip(others, reversed(others), strict=True):
        assert torch.equal(back(T(images)), images) and not torch.equal(T(images), images)
    assert torch.equal(first(images), images)


def test_the_loss_of_transformed_images(networks):
    """All: the mean over heads, summed over policies. One: that of a single head, each at times."""
    D = networks[1]
    heads = nn.ModuleDict({
        policy: nn.ModuleList(copy.deepcopy(D.final_linear[1]) for _ in range(n))
        for policy, n in (("rotation", 4), ("cropping", 5))
    })  # fmt: skip
    for i, p in enumerate(heads.parameters()):
        p.data += 0.1 * i
    images = normal(4, 3, 16, 16)
    each = {
        policy: [
            F.softplus(-heads[policy][j](D.features(T(images)))).mean()
            for j, T in enumerate(fewshot.transforms(policy))
        ]
        for policy in heads
    }
    cfg = replace(QUICK, dag_all=True)
    loss = fewshot.augmented_loss(D, heads, generator_loss, [images], cfg, rng())
    close(loss, sum(sum(x) / len(x) for x in each.values()))
    heads = nn.ModuleDict({"rotation": heads["rotation"]})
    some = {
        round(float(fewshot.augmented_loss(D, heads, generator_loss, [images], QUICK, rng(i))), 5)
        for i in range(40)
    }
    assert some == {round(float(x), 5) for x in each["rotation"]}


# ----------------------------------------------------------------------------------------------
# RSSA


def test_correlations_within_an_image():
    """The golden number, and once more by loops: position by position of each window."""
    maps = waves(2, 3, 8, 8), waves(2, 3, 8, 8, offset=0.9) ** 2
    loss = fewshot.self_correlation(*maps)
    exactly(loss, 0.51448903)
    total = []
    for corners in ([(0, 0), (0, 2), (2, 0), (2, 2)], [(1, 1)]):
        differences = []
        for b, (top, left) in itertools.product(range(2), corners):
            f = [
                F.avg_pool2d(F.normalize(x, dim=1), 2)[b, :, top : top + 2, left : left + 2]
                for x in maps
            ]
            for p, q in itertools.product(range(4), repeat=2):
                s, t = (x.flatten(1)[:, p] @ x.flatten(1)[:, q] for x in f)
                d = (s - t).abs()
                differences.append(d - 0.5 if d > 1 else d**2 / 2)
        total.append(torch.stack(differences).mean())
    exactly(loss, sum(total), atol=1e-12)
    assert fewshot.self_correlation(maps[0], maps[0]) == 0


def test_correlations_between_images():
    maps = waves(4, 3, 4, 4), waves(4, 3, 4, 4, offset=0.9) ** 2
    exactly(fewshot.cross_correlation(*maps), 0.65343833)
    exactly(fewshot.cross_correlation(*maps, cuts=2), 0.61564423)
    assert fewshot.cross_correlation(maps[0], maps[0]) == 0
    total = 0  # in RSSA's own order: an image and all after it, their mean times their number
    for i in range(3):
        rows = []
        for x in maps:
            f = F.normalize(x, dim=1).flatten(2)
            rows.append((f[i].T @ f[i + 1 :]).softmax(-1))
        total += (rows[0] - rows[1]).abs().mean() * (3 - i) * 16
    exactly(fewshot.cross_correlation(*maps), total / 6, atol=1e-12)


def test_which_maps_have_structure(monkeypatch):
    """At 256 px those of RSSA: from 64 px up; and 4 to 64 with the first of 128, the last three in
    16 windows."""
    sides = [4, *(S for S in (8, 16, 32, 64, 128, 256) for _ in range(2))]
    maps, seen = [torch.empty(1, 1, S, S, device="meta") for S in sides], []

    def note(source, target, cuts=None):
        seen.append((source.shape[-1], cuts))
        return 0

    monkeypatch.setattr(fewshot, "self_correlation", note)
    fewshot.structural_loss(fewshot.self_correlation, maps, maps)
    assert seen == [(S, None) for S in (64, 64, 128, 128, 256, 256)]
    seen.clear()
    fewshot.structural_loss(lambda *x: note(*x), maps, maps)
    assert seen == [(S, 1) for S in (4, 8, 8, 16, 16, 32, 32)] + [(64, 4), (64, 4), (128, 4)]


def test_codes_are_drawn_to_the_shots():
    """The golden projection; its matrix P once more by the normal equations."""
    codes, w = waves(2, 1, 5), torch.arange(1, 6, dtype=torch.float64).view(1, 1, 5)
    moved = fewshot.compressor(codes, 4, (0.85,))(w)
    exactly(moved[0, 0], [-3.550119, -0.336608, 3.462197, 4.491602, 1.943086], atol=5e-7)
    A = codes[:, 0]
    inside = A.T @ torch.linalg.solve(A @ A.T, A @ w[0, 0])
    inside = inside * w.norm() / inside.norm()
    exactly(moved[0, 0], 0.85 * inside + 0.15 * w[0, 0], atol=1e-12)
    codes = waves(3, 14, 20)
    within = torch.einsum("k,kwi->wi", torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), codes)
    exactly(fewshot.compressor(codes, 256, (1.0,) * 9)(within[None])[0], within, atol=1e-9)


def test_published_strengths_of_compression():
    """At 256 px: 0 for w of index 0-2, .05 for 3-6, .45 for 7-8, .65 for 9-10, .85 for 11-13."""
    codes, w = torch.zeros(2, 14, 3).double(), torch.zeros(1, 14, 3).double()
    codes[:, :, 0], w[..., 1] = 1, 1
    w[..., 0] = 1e-7  # nearly at a right angle to the span: w' = s (1, 0) + (1 - s) (0, 1)
    s = fewshot.compressor(codes, 256, Config.compression)(w)[0, :, 0]
    expected = 3 * [0] + 4 * [0.05] + 2 * [0.45] + 2 * [0.65] + 3 * [0.85]
    exactly(s, expected, atol=1e-6)


# ----------------------------------------------------------------------------------------------
# EWC


class OneNumber(nn.Module):
    """G(z) = theta z, of one number."""

    z_dim, num_ws = 1, 1

    def __init__(self, theta):
        super().__init__()
        self.theta, self.w_avg = nn.Parameter(torch.tensor(theta)), torch.zeros(1)

    def mapping(self, z):
        return z

    def synthesis(self, w, rng=None):
        return self.theta * w


def test_fisher_information():
    """By hand, with D(x) = x: d log sigmoid(theta z) / d theta = z sigmoid(-theta z)."""
    G = OneNumber(0.7)
    (F_i,) = fewshot.fisher_information(G, lambda x: x, [*G.parameters()], 50, rng(4))
    chance = rng(4)
    z = torch.stack([torch.randn(1, 1, generator=chance) for _ in range(50)]).double()
    exactly(F_i, (z * torch.sigmoid(-0.7 * z)).square().mean(), atol=1e-6)


def test_elastic_penalty(networks):
    """2 (3 - 1)^2 + 5 (1 - 2)^2 + 0 = 13; and F of a network is never below 0."""
    tensors = [[3.0], [1.0, 9.0]], [[1.0], [2.0, 4.0]], [[2.0], [5.0, 0.0]]
    parameters, start, fisher = ([torch.tensor(x) for x in part] for part in tensors)
    assert fewshot.elastic_penalty(parameters, start, fisher) == 13
    assert fewshot.elastic_penalty(parameters, parameters, fisher) == 0
    G, D = (copy.deepcopy(x).requires_grad_() for x in networks)
    fisher = fewshot.fisher_information(G, D, fewshot.learning(G, "noise"), 3, rng())
    assert all((x >= 0).all() for x in fisher) and sum(x.sum() for x in fisher) > 0


# ----------------------------------------------------------------------------------------------
# One shot, and bad input


def test_one_shot_has_no_spread(networks, shots):
    """The spread of a batch, which of copies is 0, is that of single pictures: nothing to see."""
    for k, group in ((5, 4), (4, 4), (3, 1), (1, 1)):
        state = run(networks, shots[:k], method="tgan", loop=lambda *_: [])[2]
        assert state["D"].stddev_group == group
    assert networks[1].stddev_group == 4


@pytest.mark.parametrize("changes, k, words", [
    ({"method": "cdc"}, 1, "cdc has an anchor for each shot, and there is one"),
    ({"method": "tgan", "steps": 1001}, 4, "D sees each shot 1000 times; wanted: fewer steps"),
    ({"method": "tgan", "ema": 0.9}, 4, "the average will be the source still"),
])  # fmt: skip
def test_warnings(networks, shots, changes, k, words):
    with pytest.warns(UserWarning, match=words):
        run(networks, shots[:k], loop=lambda *_: [], **changes)


@pytest.mark.parametrize("change, words", [
    (lambda G, D, x: (G, D, x[:0]), r"shots are \[0, 3, 16, 16\]; wanted: \[k, 3, 16, 16\]"),
    (lambda G, D, x: (G, D, x[..., :8]), r"shots are \[5, 3, 16, 8\]"),
    (lambda G, D, x: (G, D, x / 0), "finite"),
    (lambda G, D, x: (G, Discriminator(8, {4: 2, 8: 2}), x), "D is of 8 px and G of 16"),
    (lambda G, D, x: (OneNumber(1.0), D, x), "generator does not fit"),
])  # fmt: skip
def test_refused(networks, shots, change, words):
    G, D, x = change(*networks, shots)
    with pytest.raises(ValueError, match=words) as error:
        adapt(replace(QUICK, method="tgan"), G, D, x, rng=rng())
    assert "\n" not in str(error.value)


def test_refused_settings(networks, shots):
    with pytest.raises(ValueError, match="batch=6; wanted: a multiple of 4"):
        run(networks, shots, method="tgan", batch=6)
    with pytest.raises(ValueError, match="rssa draws all codes to the shots', and there is one"):
        run(networks, shots[:1], method="rssa")
    for freeze in ("nois3", "style", "."):
        words = f"freeze='{freeze}' must fit some of what learns in G, not all"
        with pytest.raises(ValueError, match=words):
            run(networks, shots, method="tgan", freeze=freeze)
    with pytest.raises(ValueError, match=r"wanted: codes \[5, 6, 6\]"):
        adapt(replace(QUICK, method="rssa"), *networks, shots, rng=rng())


def test_a_loss_that_is_not_finite_ends_the_run(networks, shots):
    with pytest.raises(FloatingPointError, match="stage few-shot, step .*; wanted: a smaller lr"):
        run(networks, shots, method="tgan", lr=1e30)
