"""The example of any generator: its wrapper round a network made here, and round the package's."""

import importlib.util
import sys

import pytest
import torch
from command import WORLD
from conftest import normal
from PIL import Image
from torch import nn

import ipl
from examples.any_generator import Wrapped, adapt, dcgan_of_faces, main


def dcgan(z_dim=6, width=4):
    """A DCGAN of 16 pixels with random weights, whose batch norm has seen other batches."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.ConvTranspose2d(z_dim, 2 * width, 4, 1, 0, bias=False), nn.BatchNorm2d(2 * width),
        nn.ReLU(True), nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width), nn.ReLU(True), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    with torch.no_grad():
        network(normal(32, z_dim, 1, 1))
    return Wrapped(network, z_dim, resolution=16)


def test_the_wrapper_fits_the_protocol():
    generator, w = dcgan(), normal(4, 6)
    ipl.check_generator(generator)
    images = generator.synthesis(w)
    torch.testing.assert_close(generator.synthesis(w[:1]), images[:1])  # of its own, in eval mode
    torch.testing.assert_close(generator.synthesis(w[:, None]), images)
    generator.train()
    with pytest.raises(ValueError, match="training mode"):
        ipl.check_generator(generator)


@pytest.mark.filterwarnings("ignore:after 3 steps")
def test_it_is_adapted_and_the_source_stays(clip_pair):
    generator = dcgan()
    before = {name: x.clone() for name, x in generator.state_dict().items()}
    adapted, history = adapt(generator, *clip_pair, "photo", "anime", steps=3, lr=0.01)
    after, state = generator.state_dict(), adapted.state_dict()
    assert len(history) == 3 and all(torch.equal(after[name], x) for name, x in before.items())
    trained = {name for name, _ in adapted.named_parameters()}
    assert {name for name in state if not torch.equal(state[name], before[name])} == trained
    grid = ipl.sample_grid(generator, adapted, n=2)
    assert grid.shape == (32, 32, 3) and not torch.equal(grid[:16], grid[16:])


def test_without_the_package_it_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gan_face_generate", None)
    with pytest.raises(SystemExit) as end:
        main(out=tmp_path / "x.png")
    err = capsys.readouterr().err
    assert end.value.code == 2 and "pip install --no-deps gan-face-generate" in err
    assert len(err.splitlines()) == 1 and not [*tmp_path.iterdir()]


@pytest.mark.skipif(
    not importlib.util.find_spec("gan_face_generate"),
    reason="needs pip install --no-deps gan-face-generate",
)
@pytest.mark.filterwarnings("ignore")
def test_the_package_of_faces(tmp_path):
    ipl.check_generator(dcgan_of_faces())
    main(clip=WORLD[3], steps=1, out=tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as page:
        assert page.width > 8 * 128 and page.height > 2 * 128
