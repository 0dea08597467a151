"""The embedded diffusion model, and the command that trained it."""

import pytest
import torch
from conftest import rng
from PIL import Image

import ipl
from checkpoints.diffusion import load_unet
from cli import diffusion
from cli.settings import MINIATURE_DDPM
from diffusion import DiffusionGenerator, generate, invert, timesteps
from miniature import DDPM, faces
from miniature.judge import load_judge
from miniature.train import ddpm, pool
from miniature.train.generator import psnr
from miniature.truth_diffusion import InvertedTruth, large, small


def noise_for_photos(persons, styles, seed, **_):
    """In the place of the renderer, which draws in processes of its own."""
    shape = len(persons), 3, faces.SIZE, faces.SIZE
    return torch.randint(256, shape, generator=rng(seed), dtype=torch.uint8)


def test_training_stops_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool, "draw", noise_for_photos)
    monkeypatch.setattr(ddpm, "timesteps", lambda n, t0: timesteps(3, t0))  # of the report
    small = dict(pool=8, batch=2, held_out=8, device="cpu")

    def train(name, steps):
        out, state = tmp_path / name, tmp_path / f"{name}-state" / "state.pt"
        ddpm.main(ddpm.Config(steps=steps, out=out, state=state, **small))
        return torch.load(state, weights_only=True)

    whole = train("whole", 6)
    assert "40 steps" in capsys.readouterr().out
    with Image.open(tmp_path / "whole.png") as sheet:
        assert sheet.size == (8 * 64, 7 * 64)
    monkeypatch.setattr(ddpm, "trange", lambda *_, **__: range(3))  # stopped after three
    train("halves", 6)
    path = tmp_path / "halves-state" / "state.pt"
    torch.save(torch.load(path, weights_only=True) | {"done": 3}, path)
    monkeypatch.setattr(ddpm, "trange", lambda first, steps, **_: range(first, steps))
    halves = train("halves", 6)
    for part in ("unet", "average"):
        torch.testing.assert_close(halves[part], whole[part], rtol=0, atol=0)
    unet, _ = load_unet(tmp_path / "whole")
    saved = {name: x.half().float() for name, x in whole["average"].items()}
    torch.testing.assert_close(unet.state_dict(), saved, rtol=0, atol=0)


@pytest.fixture(scope="module")
def photos():
    persons = faces.sample_persons(6, rng(5))
    return small(faces.render(persons, faces.styles_of("photo", 6)), 64)


@pytest.fixture(scope="module")
def unet():
    return load_unet(DDPM)


def test_its_size():
    assert sum(path.stat().st_size for path in DDPM.iterdir()) <= 4 << 20


def test_it_inverts_persons_it_has_not_seen(unet, photos):
    network, alphas = unet
    latents = invert(network, photos, timesteps(40, 500), alphas)
    assert 0.5 < latents.std() < 1.2
    for steps, least in ((40, 35), (6, 22)):
        back = generate(network, latents, timesteps(steps, 500), alphas)
        assert psnr(back, photos).median() > least


def test_it_is_a_generator_and_the_judge_knows_its_persons(unet):
    network, alphas = unet
    generator = DiffusionGenerator(network, alphas, t0=500, steps=6).eval()
    truth = InvertedTruth(
        4, 1, load_judge(), generator.fill(torch.randn(2, generator.w_dim, generator=rng())),
        inversion_steps=20, picture_steps=20,
    )  # fmt: skip
    ipl.check_generator(generator.fill(truth.w))
    assert psnr(truth.generated, truth.draw("photo")).median() > 25
    assert truth.draw("anime").shape == (4, 3, faces.SIZE, faces.SIZE)
    figures = truth.figures(truth.generated, "anime")
    assert figures["target"] == 0 and figures["identity"] == 1
    assert large(small(truth.generated, 64)).abs().max() <= 1


def test_the_persons_of_a_run_are_those_of_its_truth():
    cfg = MINIATURE_DDPM
    unet, alphas = load_unet(DDPM)
    generator = DiffusionGenerator(unet, alphas)
    generator.bank = torch.zeros(3, generator.w_dim)
    z, photos, _ = diffusion.true_pairs(cfg, generator, n=2)
    assert z.argmax(1).tolist() == [0, 1]
    again = faces.render(diffusion.persons_of(cfg, 3)[:2], faces.styles_of("photo", 2))
    torch.testing.assert_close(photos, small(again, 64))
