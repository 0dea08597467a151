"""ipl.py in somebody's program: another generator, another state of torch, a CLIP of clip.load."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from conftest import QUICK, close, rng

import ipl

pytestmark = pytest.mark.filterwarnings("ignore:stage 1 learned", "ignore:after . steps")


class Toy(torch.nn.Module):
    """The smallest generator there is: two layers, 16 px, no StyleGAN and no noise."""

    z_dim, w_dim, num_ws, resolution = 8, 8, 2, 16

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.low, self.high = torch.nn.Linear(8, 48), torch.nn.Linear(8, 768)
        self.register_buffer("w_avg", torch.zeros(8))
        self.eval()

    def mapping(self, z):
        return z

    def synthesis(self, w, *, rng=None):
        low, high = (w, w) if w.ndim == 2 else (w[:, 0], w[:, 1])
        low = self.low(low).view(-1, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return (low + self.high(high).view(-1, 3, 16, 16)).tanh()

    def layers(self):
        return [self.low, self.high]


draw = Toy.synthesis


def another(**members):
    return type("Another", (Toy,), members)()


@pytest.mark.parametrize(
    ("generator", "words"),
    [
        (another(synthesis=lambda g, w, rng: (draw(g, w) + 1) / 2), r"lie in \[0\..*not \[-1, 1\]"),
        (another(synthesis=lambda g, w, rng: draw(g, w) / 0 * 0), r"lie in \[nan, nan\]"),
        (
            another(synthesis=lambda g, w, rng: draw(g, w.flatten(1)[:, :8] * w.ndim)),
            "a w for each",
        ),
        (another(synthesis=lambda g, w: draw(g, w)), "TypeError.*rng"),
        (another(synthesis=lambda g, w, rng: draw(g, w).detach()), "no gradient"),
        (another(layers=lambda g: {"low": g.low, "high": g.high}), "0 modules"),
        (another(layers=lambda g: [g.low]), r"1 modules in layers\(\); wanted: num_ws, 2"),
        (another(resolution=32), r"\[2, 3, 16, 16\].*wanted.*32, 32"),
        (Toy().train(), "training mode"),
        (Toy().double(), "float32|dtype"),
        (torch.nn.Linear(2, 2), "AttributeError.*num_ws"),
    ],
)
def test_generators_that_do_not_fit(generator, words, clip_pair):
    with pytest.raises(ValueError, match=words) as caught:
        ipl.train_mapper(QUICK, generator, *clip_pair, rng=rng())
    assert "\n" not in str(caught.value)


def test_a_generator_without_noise_or_stylegan(clip_pair):
    toy = Toy()
    before = copy.deepcopy(toy.state_dict())
    cfg = replace(QUICK, num_layers=1)
    adapted, _, history = ipl.adapt(cfg, toy, [clip_pair], rng=rng())
    assert len(history) == 6 and history[-1]["delta_image_norm"] > 0
    assert all(torch.equal(x, before[name]) for name, x in toy.state_dict().items())
    assert any(not torch.equal(x, before[name]) for name, x in adapted.state_dict().items())
    assert ipl.sample_grid(toy, adapted, n=3).shape == (2 * 16, 3 * 16, 3)
    adapted.low.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        ipl.sample_grid(toy, adapted)


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def usual(source, clip_pair):
    return ipl.adapt(QUICK, source, [clip_pair], rng=rng())


@pytest.mark.parametrize(
    "state",
    [
        float64,
        pytest.param(lambda: torch.device("meta"), id="device"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
        torch.inference_mode,
    ],
)
def test_the_state_of_torch_around_us_changes_nothing(source, clip_pair, usual, state):
    """The same numbers as without; and a CLIP that is loaded inside can be trained through."""
    with state():
        clips = [ipl.load_clip(clip_pair[0].state_dict())]
        adapted, _, history = ipl.adapt(QUICK, source, clips, rng=rng())
        grid = ipl.sample_grid(source, adapted, n=2)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    for row, expected in zip(history, usual[2], strict=True):
        close(row["loss"], expected["loss"])
        close(row["grad_norm"], expected["grad_norm"], rtol=1e-3)
    assert (grid.int() - ipl.sample_grid(source, usual[0], n=2).int()).abs().max() <= 1
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_a_clip_with_gradients_stays_as_it_is(source, clip_pair, usual):
    """As clip.load leaves it on a CPU; no gradient is left in it."""
    clip_model = copy.deepcopy(clip_pair[0]).requires_grad_()
    _, _, history = ipl.adapt(QUICK, source, [(clip_model, clip_pair[1])], rng=rng())
    assert all(p.grad is None and p.requires_grad for p in clip_model.parameters())
    for row, expected in zip(history, usual[2], strict=True):
        close(row["loss"], expected["loss"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "Anime ", "target": "anime"}, "source and target are both 'anime'"),
        ({"batch_mapper": 1}, r"Config\(batch_mapper=1\); wanted: at least 2"),
        ({"bank": 3}, r"Config\(bank=3\); wanted: at least 4"),
        ({"method": "NADA"}, r"Config\(method='NADA'\); wanted: one of"),
        ({"freeze": "i"}, "nothing to train: freeze='i'"),  # in weight and in bias
        ({"num_layers": 3}, "nothing to train: .*num_layers=3 of 2"),
        ({"clip_weights": (1.0, 2.0)}, "1 clips, 1 directions, 2 clip_weights"),
    ],
)
def test_settings_that_are_refused(clip_pair, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        ipl.adapt(replace(QUICK, **{"num_layers": 1} | settings), Toy(), [clip_pair], rng=rng())
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)


def test_networks_and_directions_that_are_refused(clip_pair):
    with torch.inference_mode():
        toy = Toy()
    with pytest.raises(ValueError, match="(?i)inference"):
        ipl.check_generator(toy)
    half = copy.deepcopy(clip_pair[0]).half()  # as clip.load leaves it on a GPU
    with pytest.raises(ValueError, match="clip_model is in torch.float16; wanted: float32"):
        ipl.adapt(QUICK, Toy(), [(half, clip_pair[1])], rng=rng())
    with pytest.raises(ValueError, match=r"a function \(w, z, x_source\)"):
        ipl.adapt_generator(QUICK, Toy(), [clip_pair], [torch.ones(32)], rng=rng())


def test_warnings(source, clip_pair):
    cfg = replace(QUICK, steps_mapper=1, ema=0.99)
    mute = ipl.LatentMapper(source.w_dim, 4, clip_pair[0].token_embedding.embedding_dim)
    mute.load_state_dict({name: 0 * x for name, x in mute.state_dict().items()})  # of equal prompts
    with pytest.warns(UserWarning) as caught:
        ipl.train_mapper(cfg, source, *clip_pair, rng=rng(), mapper=mute)
        direction = ipl.label_direction(cfg, clip_pair[0])
        ipl.adapt_generator(cfg, source, [clip_pair], [direction], rng=rng())
    words = " ".join(str(warning.message) for warning in caught)
    assert "stage 1 learned little" in words
    assert "after 3 steps 97% of the average is still the source generator" in words
