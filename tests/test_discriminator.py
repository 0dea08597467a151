"""The discriminator: golden numbers, second derivatives, both layouts of files, its training."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, close, normal, refusal
from nvidia_pickles import Payload, dumps, network
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import miniature
from checkpoints import load_discriminator, load_generator, save_discriminator
from checkpoints.discriminator import WANTED
from miniature.train import discriminator as training
from stylegan2_ops import Discriminator, Generator
from stylegan2_ops.discriminator import minibatch_stddev
from stylegan2_ops.losses import discriminator_loss, generator_loss, path_lengths, r1_penalty

NVIDIAS = ["tiny", "tiny_py311", "variant_clamp", "variant_resnet"]
SMALL = {4: 3, 8: 2}


def waves(*shape, offset=0.0):
    """sin(1 + offset), sin(2 + offset), ... row by row, in float64."""
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64) + offset).reshape(shape)


def small(resolution=8, channels=SMALL, **kwargs):
    """A discriminator whose biases are not zero."""
    torch.manual_seed(0)
    D = Discriminator(resolution, channels, **kwargs)
    for i, p in enumerate(D.parameters()):
        if p.ndim == 1:
            p.data = 0.3 * normal(*p.shape, seed=i)
    return D


# ----------------------------------------------------------------------------------------------
# The network


def test_spread_of_groups():
    spread = minibatch_stddev(waves(8, 3, 4, 4))
    assert spread.shape == (8, 1, 4, 4)
    expected = torch.tensor([0.70058953, 0.70217226] * 4, dtype=torch.float64)
    torch.testing.assert_close(spread[:, 0, 1, 2], expected, rtol=0, atol=5e-9)
    x = normal(8, 3, 4, 4)  # i and j are of one group if i = j modulo 2
    changed = x.clone()
    changed[2] += 1
    same = (minibatch_stddev(changed) == minibatch_stddev(x))[:, 0, 0, 0]
    assert same.tolist() == 4 * [False, True]
    alone = minibatch_stddev(x[:1])
    close(alone, torch.full((1, 1, 4, 4), 1e-4))
    assert minibatch_stddev(x[:3]).unique().numel() == 1  # one group of three
    with pytest.raises(ValueError, match="a batch of 6 pictures does not part into groups of 4"):
        minibatch_stddev(x[:6])


def test_sizes_and_names():
    D = Discriminator(64, {4: 128, 8: 128, 16: 96, 32: 64, 64: 32})
    assert sum(p.numel() for p in D.parameters()) == 1_057_121
    assert len(D.convs) == 5 and D.config["channels"][64] == 32
    names = [*Discriminator(8, SMALL).state_dict()]
    assert names == [
        "convs.0.0.weight", "convs.0.1.bias",
        "convs.1.conv1.0.weight", "convs.1.conv1.1.bias",
        "convs.1.conv2.0.kernel", "convs.1.conv2.1.weight", "convs.1.conv2.2.bias",
        "convs.1.skip.0.kernel", "convs.1.skip.1.weight",
        "final_conv.0.weight", "final_conv.1.bias",
        "final_linear.0.weight", "final_linear.0.bias",
        "final_linear.1.weight", "final_linear.1.bias",
    ]  # fmt: skip
    for resolution in (4, 12):
        with pytest.raises(ValueError, match=f"a power of two from 8 on, not {resolution}"):
            Discriminator(resolution, SMALL)
    with pytest.raises(ValueError, match="no width for 32, 16 pixels"):
        Discriminator(32, SMALL)
    with pytest.raises(ValueError, match=r"images are \[B, 3, 8, 8\], not \[4, 3, 16, 16\]"):
        small()(normal(4, 3, 16, 16))


def test_forward_by_plain_convolutions():
    """From the formulas, with the published padding, on a batch of two groups."""
    D, x = small(16, {4: 5, 8: 4, 16: 3}).double(), waves(8, 3, 16, 16)
    p = dict(D.named_parameters())
    f = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64)
    f = f.outer(f) / 64

    def blurred(x, padding):
        return F.conv2d(F.pad(x, 4 * [padding]), f.expand(x.shape[1], 1, 4, 4), groups=x.shape[1])

    def conv(x, name, stride=1, padding=0):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight / weight[0].numel() ** 0.5, None, stride, padding)

    def active(x, name):
        return 2**0.5 * F.leaky_relu(x + p[f"{name}.bias"].view(-1, 1, 1), 0.2)

    y = active(conv(x, "convs.0.0"), "convs.0.1")
    for k in (1, 2):
        h = active(conv(y, f"convs.{k}.conv1.0", padding=1), f"convs.{k}.conv1.1")
        h = conv(blurred(h, 2), f"convs.{k}.conv2.1", stride=2)
        skip = conv(blurred(y, 1), f"convs.{k}.skip.1", stride=2)
        y = (active(h, f"convs.{k}.conv2.2") + skip) / 2**0.5
    groups = torch.stack([y[i::2] for i in range(2)])  # [2, 4, C, 4, 4]
    spread = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat(4)
    y = torch.cat([y, spread.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)], 1)
    y = active(conv(y, "final_conv.0", padding=1), "final_conv.1").flatten(1)
    w, b = (p[f"final_linear.0.{kind}"] for kind in ("weight", "bias"))
    y = 2**0.5 * F.leaky_relu(y @ w.T / w.shape[1] ** 0.5 + b, 0.2)
    torch.testing.assert_close(D.features(x), y)
    w, b = (p[f"final_linear.1.{kind}"] for kind in ("weight", "bias"))
    torch.testing.assert_close(D(x), y @ w.T / w.shape[1] ** 0.5 + b)


def test_a_fresh_one_keeps_the_variance():
    torch.manual_seed(0)
    D, spreads = Discriminator(64, dict.fromkeys((4, 8, 16, 32, 64), 32)), []
    for layer in D.convs:
        layer.register_forward_hook(lambda module, args, y: spreads.append(y.square().mean()))
    D(normal(16, 3, 64, 64))
    assert all(0.3 < b / a < 3 for a, b in pairwise(spreads)), spreads


# ----------------------------------------------------------------------------------------------
# Losses


def test_logistic_losses():
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [-3.0]])
    close(discriminator_loss(real, fake), 1.23142702, rtol=1e-6)
    close(generator_loss(fake), 1.76133217, rtol=1e-6)


def test_first_and_second_derivatives():
    """With respect to images and to all parameters, at 8 px, in float64."""
    D, images = small().double(), waves(4, 3, 8, 8).requires_grad_()
    names, values = zip(*D.named_parameters(), strict=True)

    def logits(images, *values):
        return functional_call(D, dict(zip(names, values, strict=True)), images)

    for check in gradcheck, gradgradcheck:
        assert check(logits, (images, *values), fast_mode=True)

    def penalty(*values):
        return r1_penalty(partial(logits_of, values), images)

    def logits_of(values, images):
        return logits(images, *values)

    # The leaky ReLU is straight and the spread is not: this is of the second order in D.
    assert gradcheck(penalty, values, fast_mode=True)


def test_r1_is_the_mean_square_of_the_slope():
    slope, images = waves(3, 8, 8), normal(5, 3, 8, 8).double()
    k = torch.tensor(2.0, requires_grad=True)
    penalty = r1_penalty(lambda x: k * (x * slope).sum((1, 2, 3))[:, None], images)
    torch.testing.assert_close(penalty, 4 * slope.square().sum())
    penalty.backward()
    torch.testing.assert_close(k.grad, 4 * slope.square().sum().float())
    assert not images.requires_grad and images.grad is None


def test_length_of_paths():
    """By finite differences of a generator; and its own derivative, which trains."""
    torch.manual_seed(1)
    G = Generator(8, {4: 4, 8: 3}, w_dim=3, n_mlp=1).double()
    ws = waves(2, G.num_ws, 3).requires_grad_()
    y = normal(2, 3, 8, 8).double()
    length = path_lengths(G.synthesis(ws), ws, y)
    J, e = torch.zeros_like(ws), 1e-6
    with torch.no_grad():
        for i in range(G.num_ws):
            for j in range(3):
                step = torch.zeros_like(ws)
                step[:, i, j] = e
                change = (G.synthesis(ws + step) - G.synthesis(ws - step)) / (2 * e)
                J[:, i, j] = (change * y).sum((1, 2, 3)) / 8
    torch.testing.assert_close(length, J.square().sum(2).mean(1).sqrt(), rtol=1e-6, atol=0)
    weight = G.convs[0].conv.weight

    def lengths(weight):
        images = functional_call(Synthesis(G), {"G.convs.0.conv.weight": weight}, ws)
        return path_lengths(images, ws, y)

    assert gradcheck(lengths, weight, fast_mode=True)


class Synthesis(torch.nn.Module):
    def __init__(self, G):
        super().__init__()
        self.G = G

    def forward(self, ws):
        return self.G.synthesis(ws)


# ----------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", NVIDIAS)
def test_logits_of_nvidias_pickles(name):
    golden = torch.load(GOLDEN / f"nvidia_{name.removesuffix('_py311')}_io.pt", weights_only=True)
    D = load_discriminator(GOLDEN / f"nvidia_{name}.pkl")
    assert not D.training and not any(p.requires_grad for p in D.parameters())
    expected = golden["D_logits_of_image_const"]
    close(D(golden["image_const"]), expected, rtol=0, scale=1e-5)
    assert D.conv_clamp == (1.25 if "clamp" in name else None) and D.stddev_group == 4


@pytest.mark.parametrize("new", [True, False])
def test_rosinalitys_checkpoints(tmp_path, new):
    """Beside other parts, alone, wrapped, without filters, in float16."""
    D, path, x = small(16, {4: 5, 8: 4, 16: 3}), tmp_path / "checkpoint.pt", normal(4, 3, 16, 16)
    state, expected = D.state_dict(), D(x)
    learned = {name: tensor for name, tensor in state.items() if not name.endswith(".kernel")}
    for content in (
        {"g": {}, "d": state, "g_ema": {}, "g_optim": {"state": {}}, "d_optim": {}, "iter": 3},
        state,
        {"d": learned},
    ):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        torch.testing.assert_close(load_discriminator(path)(x), expected)
    torch.save({"d": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    with pytest.warns(UserWarning, match="left out 'module.'"):
        torch.testing.assert_close(load_discriminator(path)(x), expected)
    torch.save({"d": {name: tensor.half() for name, tensor in state.items()}}, path)
    loaded = load_discriminator(path)
    assert loaded.channels == D.channels and next(loaded.parameters()).dtype == torch.float32
    close(loaded(x), expected, scale=5e-3)


@pytest.mark.parametrize("kwargs", [{}, {"stddev_group": 8}, {"conv_clamp": 0.5}])
def test_round_trip(tmp_path, kwargs):
    D, path = small(**kwargs), tmp_path / "discriminator.pt"
    for _ in range(2):  # the second time over a file that is there
        save_discriminator(D, path)
        assert [x.name for x in tmp_path.iterdir()] == [path.name]
    loaded = load_discriminator(path)
    assert loaded.config == D.config
    for name, tensor in D.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    content = torch.load(path, weights_only=True)
    assert content.keys() == ({"d", "discriminator_config"} if kwargs else {"d"})
    save_discriminator(D.half(), path)
    kept = torch.load(path, weights_only=True)["d"]
    assert all(x.dtype == torch.float16 for x in kept.values())


def test_a_clamp_bounds_every_convolution():
    D, outputs = small(conv_clamp=0.25), []
    for layer in (D.convs[0], D.convs[1].conv1, D.convs[1].conv2, D.final_conv):
        layer.register_forward_hook(lambda module, args, y: outputs.append(y.abs().max()))
    D(100 * normal(4, 3, 8, 8))
    assert outputs[0] == outputs[1] == 0.25 and max(outputs) == 0.25 and len(outputs) == 4


def changed(**tensors):
    """A state dict with other tensors; None leaves one out."""
    state = {**small().state_dict(), **{k.replace("__", "."): x for k, x in tensors.items()}}
    return {"d": {name: x for name, x in state.items() if x is not None}}


def with_config(**changes):
    return {"d": small().state_dict(), "discriminator_config": {**small().config, **changes}}


def other(path, **changes):
    return {"D": network("variant_resnet", path, part="D", **changes)}


CONV, NAN = "convs__1__conv1__0__weight", torch.full((2, 2, 3, 3), torch.nan)
REFUSED = [  # content: message
    ({"g_ema": {}, "latent_avg": 3}, f'it has no discriminator, "d"; wanted: {WANTED}'),
    ({"G_ema": None}, f'it has no discriminator, "D"; wanted: {WANTED}'),
    ({"x": 1}, f'it has no discriminator, "d" or "D"; wanted: {WANTED}'),
    ([1], f"not a discriminator's checkpoint; wanted: {WANTED}"),
    (changed(**{CONV: None}), "not a rosinality discriminator, it lacks 'convs.1.conv1.0.weight'"),
    (changed(**{CONV: torch.zeros(2, 3, 3, 3)}), "convs.1.conv1.0.weight is (2, 3, 3, 3), not (2"),
    (changed(**{CONV: NAN}), "not finite: 'convs.1.conv1.0.weight'"),
    (changed(extra=torch.zeros(1)), "not a rosinality discriminator, it has 'extra'"),
    (changed(extra=3), "'extra' is not a plain tensor of floats"),
    (with_config(stddev_group=0), "the config's stddev_group cannot be 0"),
    (with_config(conv_clamp=-1), "the config's conv_clamp cannot be -1"),
    (with_config(resolution=12), "resolution must be a power of two from 8 on, not 12"),
    (with_config(resolution=2**20), "the config's resolution cannot be 1048576"),
    (with_config(channels={4: 1}), "channels has no width for 8 pixels"),
    (with_config(channels=None), "the config's channels cannot be NoneType"),
    ({**with_config(), "discriminator_config": 3}, "the config does not consist of resolution, "),
    (other("", c_dim=5), "D.c_dim is 5; wanted: 0"),
    (other("b8", architecture="skip"), "D.b8.architecture is 'skip'; wanted: 'resnet'"),
    (other("b4", mbstd=None), "D has no 'b4.mbstd'; wanted: a minibatch standard deviation"),
    (other("b4.mbstd", group_size=None), "the config's stddev_group cannot be NoneType"),
    (other("b8.conv0", conv_clamp=1), "D: its blocks differ in conv_clamp"),
    (other("b8.conv0", weight=None), "D lacks 'b8.conv0.weight'"),
    (other("b8.conv0", weight=torch.zeros(2, 8, 3, 3)), "convs.2.conv1.0.weight is (2, 8, 3, 3)"),
    (other("", b4=None), "D is no StyleGAN2 discriminator: its blocks are not 4, 8, 16, ..."),
    ({"D": network("variant_resnet")}, "D is no StyleGAN2 discriminator: its blocks are not 4, 8"),
]  # fmt: skip


@pytest.mark.parametrize("content, message", REFUSED, ids=range(len(REFUSED)))
def test_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "network.pt"
    if isinstance(content, dict) and "D" in content:
        path.write_bytes(dumps(content))
    else:
        torch.save(content, path)
    assert refusal(load_discriminator, path).startswith(message)


def test_nothing_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "network.pkl"
    path.write_bytes(dumps(other("b8", x=Payload())))
    assert refusal(load_discriminator, path).startswith("D.b8 has 'x': the name 'posix.system'")
    torch.save({"d": small().state_dict(), "args": Payload()}, path)
    with pytest.warns(UserWarning, match="left unread, as nothing is run: 'posix.system'"):
        load_discriminator(path)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_a_generator_alone_has_none_and_the_reverse(tmp_path):
    said = refusal(load_discriminator, GOLDEN / "rosinality_tiny.pt")
    assert said == f'it has no discriminator, "d"; wanted: {WANTED}'
    save_discriminator(small(), tmp_path / "d.pt")
    assert 'it has no "g_ema"' in refusal(load_generator, tmp_path / "d.pt")
    said = refusal(load_discriminator, miniature.JUDGE)
    assert said == f'it has no discriminator, "d" or "D"; wanted: {WANTED}'


# ----------------------------------------------------------------------------------------------
# The miniature's


def test_each_step_trains_its_own_network():
    torch.manual_seed(0)
    G, D = Generator(8, {4: 4, 8: 3}, w_dim=3, n_mlp=1), small()
    cfg = training.Config(batch=4, r1=1e3)
    photos = (127.5 * (normal(9, 3, 8, 8).clamp(-1, 1) + 1)).to(torch.uint8)
    adams = (training.optimiser(x.parameters(), 0.01, 0, torch.device("cpu")) for x in (D, G))
    steps = training.game(D, G, *adams, photos, normal(9, 3), torch.tensor(0.5), cfg)
    step_d, step_r1, step_g = steps
    for step, moved in ((step_d, D), (step_r1, D), (step_g, G), (step_d, D)):
        before = {x: [p.clone() for p in x.parameters()] for x in (D, G)}
        assert step().isfinite().all()
        for x, old in before.items():
            same = [torch.equal(*pair) for pair in zip(old, x.parameters(), strict=True)]
            assert all(same) == (x is not moved)
    slope = step_r1()
    for _ in range(50):
        step_r1()
    assert step_r1() < slope / 2


def test_optimiser_with_lazy_regularisers():
    """StyleGAN2's numbers for a regulariser at every 16th step."""
    adam = training.optimiser([torch.zeros(1)], 0.002, 1 / 16, torch.device("cpu"))
    close(adam.defaults["lr"], 0.001882, rtol=1e-3)
    assert adam.defaults["betas"][0] == 0
    close(adam.defaults["betas"][1], 0.990585, rtol=1e-6)


def test_codes_stray_by_so_much():
    torch.manual_seed(0)
    G = Generator(8, {4: 4, 8: 3}, w_dim=3, n_mlp=1).requires_grad_(False)
    codes, z = [], normal(2000, 3)
    G.synthesis = lambda w, rng: codes.append(w)
    for stray in (0.0, 0.5):
        training.generate(G, z, stray)
    assert torch.equal(codes[0], G.mapping(z))
    close((codes[1] - codes[0]).std(), 0.5, rtol=0.05)


@pytest.mark.parametrize("wrong", [{"batch": 6}, {"held_out": 0}])
def test_training_refuses_what_makes_no_groups(wrong):
    with pytest.raises(SystemExit, match="^--[a-z-]* is [06]; wanted: a multiple of 4"):
        training.main(training.Config(**wrong))


def test_pairs_are_of_one_person_and_the_auc_of_any():
    found = training.ordered(torch.tensor([1.0, 0, 3]), torch.tensor([2.0, -1, 2]))
    assert [*found.values()] == pytest.approx([2 / 3, 5 / 9])


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(tmp_path, capsys):
    cfg = training.Config(
        pool=8, steps=3, rest=1, batch=4, r1_every=2, held_out=8, device="cpu", threads=1,
        out=tmp_path / "d.pt", state=tmp_path / "state.pt",
    )  # fmt: skip
    training.main(cfg)
    assert "D right on renders" in capsys.readouterr().out
    stopped = load_discriminator(cfg.out).state_dict()
    assert cfg.out.stat().st_size < 4 << 20
    training.main(replace(cfg, steps=5))
    went_on = load_discriminator(cfg.out).state_dict()
    at_once = replace(cfg, steps=5, out=tmp_path / "e.pt", state=tmp_path / "other.pt")
    training.main(at_once)
    for name, x in load_discriminator(at_once.out).state_dict().items():
        torch.testing.assert_close(went_on[name], x, rtol=1e-2, atol=1e-3)
    name = "convs.1.conv1.0.weight"
    assert not torch.equal(went_on[name], stopped[name])
