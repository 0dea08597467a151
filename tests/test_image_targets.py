"""Targets shown as pictures: the direction between images, alone and mixed with words."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import GOLDEN, SHORT, WORLD, answer, done, stopping
from conftest import close, rng
from PIL import Image

import ipl
from checkpoints import load_generator
from cli import image_targets
from cli.run_folder import read_config
from cli.settings import Settings

CFG = Settings(method="nada", target_images="somewhere", noise="fixed", eps=0.1)


@pytest.fixture(scope="module")
def world():
    generator = load_generator(GOLDEN / "rosinality_tiny.pt")
    targets = torch.rand(3, 3, 32, 32, generator=rng()) * 2 - 1
    return generator, [ipl.load_clip(GOLDEN / "clip_tiny.pt")], targets


def test_the_direction_between_images(world):
    """By hand: unit features, their means, which are not unit, and the unit step between them."""
    generator, clips, targets = world
    ((clip_model, transform),) = clips
    sources = targets.flip(0).sqrt().nan_to_num(0.5)
    more = image_targets.arguments(CFG, generator, clips, targets, sources)
    (direction,), (text,) = more["redirect"]([None]), more["texts"]
    means = []
    for images in (sources, targets):
        features = [clip_model.encode_image(transform(x[None]))[0] for x in images]
        means.append(sum(x / x.norm() for x in features) / len(features))
    step = means[1] - means[0]
    close(direction(torch.zeros(5, 1)), (step / step.norm()).expand(5, -1), scale=1e-5)
    close(text, means[1] / means[1].norm(), scale=1e-5)


@pytest.mark.parametrize("b", [0.0, 0.3])
def test_a_part_of_it_beside_the_words(world, b):
    generator, clips, targets = world
    more = image_targets.arguments(replace(CFG, image_weight=b), generator, clips, targets)
    alone = image_targets.arguments(CFG, generator, clips, targets)
    words = ipl.label_direction(CFG, clips[0][0])
    w = torch.zeros(2, 1)
    ((mixed,), (image,)) = more["redirect"]([words]), alone["redirect"]([words])
    close(mixed(w), (1 - b) * F.normalize(words(w), dim=-1) + b * image(w), scale=1e-5)
    assert not torch.allclose(mixed(w), image(w), atol=1e-2)


def test_the_layer_choice_looks_for_the_pictures(world, monkeypatch):
    generator, clips, targets = world
    cfg, seen = replace(CFG, steps=1, batch=1, layer_batch=1, num_layers=1, ema=0.1), []
    more = image_targets.arguments(cfg, generator, clips, targets)
    directions = more.pop("redirect")([None])
    before = ipl.domain_loss
    monkeypatch.setattr(ipl, "domain_loss", lambda x, y: seen.append(y) or before(x, y))
    ipl.adapt_generator(cfg, generator, clips, directions, rng=rng(), **more)
    assert seen and all(torch.equal(x, more["texts"][0]) for x in seen)


def test_pictures_of_the_source():
    with pytest.raises(ValueError, match="CLIP sees no difference"):
        image_targets.image_direction(torch.ones(4), torch.ones(4))


# ----------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where there are pictures, mine/, and the runs go."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "empty", "broken"):
        Path(name).mkdir()
    for i in range(2):
        pixels = torch.randint(256, (40, 32, 3), generator=rng(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"mine/{i}.png")
    Path("broken/a.png").write_bytes(Path("mine/0.png").read_bytes()[:90])
    return tmp_path


def test_pictures_alone_are_named_by_their_folder(folder):
    done(*WORLD, *SHORT, "--method", "nada", "--target-images", "mine")
    run = Path("runs/photo-to-mine-nada")
    assert read_config(run).target_images == str(folder / "mine")
    assert (run / "generator.pt").exists()


def test_other_pictures_do_not_go_on_with_a_run(folder):
    words = [*WORLD, *SHORT, "--target-images", "mine", "--image-weight", ".5", "--out", "run"]
    with stopping(3):
        assert answer(*words, "--save-every", "1")[0] == 130
    Path("mine/0.png").write_bytes(Path("mine/1.png").read_bytes())
    code, _, err = answer(*words, "--resume")
    assert code == 2 and "SHA-256" in err and "mine" in err


def test_a_note_beside_the_pictures_does_not_stop_a_run(folder):
    words = [*WORLD, *SHORT, "--target-images", "mine", "--image-weight", ".5", "--out", "run"]
    with stopping(3):
        assert answer(*words, "--save-every", "1")[0] == 130
    Path("mine/notes.txt").write_text("no picture")
    done(*words, "--resume")


@pytest.mark.parametrize("words, line", [
    ("--target-images nowhere --method nada", "--target-images nowhere: no such folder"),
    ("--target-images empty --method nada", "there is no picture in it"),
    ("--target-images broken --method nada", "cannot read broken/a.png"),
    ("--target-images mine", "--image-weight 1 leaves the prompts no part"),
    ("--target-images mine --image-weight 1.5", "--image-weight must be from 0 to 1"),
    ("--image-weight .5", "--image-weight is of target pictures"),
])  # fmt: skip
def test_bad_input(folder, words, line):
    code, _, err = answer(*WORLD, *SHORT, *words.split(), "--out", "run")
    assert code == 2 and line in err and len(err.splitlines()) == 1
    assert not Path("run").exists()
