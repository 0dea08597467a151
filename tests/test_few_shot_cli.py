"""python ipl.py few-shot: runs of the tiny generator, resumed; what it refuses, in one line."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from command import GOLDEN, answer, done, history_of, names, networks, same, stopping
from conftest import rng
from PIL import Image

import miniature
from checkpoints import load_generator, save_discriminator
from cli import few_shot, pictures
from cli.few_shot import Settings
from cli.invert import projected
from miniature import faces
from stylegan2_ops import Discriminator
from variants.fewshot import PUBLISHED

SHORT = "--generator g.pt --discriminator d.pt --steps 3 --ema .5 --shots 3 --samples 2".split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        D = Discriminator(32, {4: 4, 8: 4, 16: 4, 32: 4})
        save_discriminator(Discriminator(16, {4: 4, 8: 4, 16: 4}), folder / "small.pt")
    save_discriminator(D, folder / "d.pt")
    shutil.copy(GOLDEN / "rosinality_tiny.pt", folder / "g.pt")
    content = torch.load(folder / "g.pt", weights_only=True)
    torch.save(content | torch.load(folder / "d.pt", weights_only=True), folder / "both.pt")
    return folder


@pytest.fixture
def folder(weights, tmp_path, monkeypatch):
    """Networks, five pictures of other sizes and shapes in mine/, and the runs go there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "curves", lambda history: b"a picture")
    for path in weights.iterdir():
        Path(path.name).symlink_to(path)
    for name in ("mine", "empty", "copies", "broken"):
        Path(name).mkdir()
    for i in range(5):
        pixels = torch.randint(256, (20 + 9 * i, 50, 3), generator=rng(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"mine/{i}.{'png' if i else 'jpg'}")
    for i in range(3):
        shutil.copy("mine/1.png", f"copies/{i}.png")
        Path(f"broken/{i}.png").write_bytes(Path("mine/1.png").read_bytes()[:90])
    return tmp_path


def few(*words):
    return "few-shot", *SHORT, "--images", "mine", *words


def config(run):
    return json.loads((Path(run) / "config.json").read_text())


def test_a_run_and_new_samples_of_it(folder):
    said = done(*few("--method", "tgan"))
    run = folder / "runs" / "mine-few-shot-tgan"
    assert said.startswith("runs/mine-few-shot-tgan: generator.pt, config.json, history.jsonl")
    files = "generator.pt config.json history.jsonl curves.png samples.png"
    assert names(run) == set(files.split())
    assert [row["step"] for row in history_of(run)] == [0, 1, 2]
    with Image.open(run / "samples.png") as picture:  # 3 columns; shots, two generators, nearest
        assert picture.height > 4 * 128 and picture.width > 3 * 128
    assert few_shot.read_config(run).images == str(folder / "mine")
    old = config(run)
    assert old.pop("freeze") == "noise"
    (folder / "old").mkdir()
    (folder / "old/config.json").write_text(json.dumps(old))
    assert few_shot.read_config(folder / "old").freeze == ""  # there was no such setting
    assert load_generator(run / "generator.pt").resolution == 32
    done("sample", "--run", run, "--n", "2", "--out", "more.png")
    assert (folder / "more.png").exists()
    assert "is a finished run" in done(*few("--method", "tgan", "--resume"))


def test_the_seed_chooses_the_shots(folder):
    runs = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        done(*few("--method", "tgan", "--seed", seed, "--out", name))
        runs[name] = config(name)["chosen"]
    everything = {path.name for path in Path("mine").iterdir()}
    assert runs["a"] == runs["b"] != runs["c"]
    assert all(len(set(x)) == 3 and set(x) < everything for x in runs.values())
    a, b = networks(Path("a")), networks(Path("b"))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("method", ["cdc", "rssa"])
def test_goes_on_to_the_same_bits(folder, monkeypatch, method):
    monkeypatch.setattr(few_shot, "projected", partial(projected, steps=3))
    words = few("--method", method, "--save-every", "1")
    done(*words, "--out", "whole")
    with stopping(2):
        assert answer(*words, "--out", "run")[0] == 130
    kept = torch.load("run/checkpoint.pt", weights_only=True)["loops"]["stage few-shot"]
    parts = "G D extras average adam_d adam_g mean_length rng own history"
    assert kept["done"] == 2 and set(kept["state"]) == {*parts.split()}
    done(*words, "--out", "run", "--resume")
    same(Path("run"), Path("whole"))
    assert not Path("run/checkpoint.pt").exists()


def test_other_pictures_do_not_go_on_with_a_run(folder):
    words = few("--method", "tgan", "--save-every", "1", "--out", "run")
    with stopping(1):
        assert answer(*words)[0] == 130
    shutil.copytree("mine", "kept")
    chosen = [path.name for path in few_shot.choose(Settings(images="mine", shots=3))]
    for change in ("one more", "renamed", "overwritten", "too few"):
        shutil.rmtree("mine")
        shutil.copytree("kept", "mine")
        if change == "one more":
            shutil.copy("mine/1.png", "mine/9.png")
        elif change == "renamed":
            for path in Path("mine").iterdir():
                path.rename(path.with_stem(f"a{path.stem}"))
        elif change == "overwritten":
            Image.new("RGB", (9, 9)).save(Path("mine", chosen[0]))
        else:
            for name in chosen:
                Path("mine", name).unlink()
        code, _, err = answer(*words, "--resume")
        assert code == 2 and "SHA-256" in err and "mine" in err, change


def test_what_is_not_chosen_changes_nothing(folder):
    words = few("--method", "tgan", "--save-every", "1", "--out", "run")
    with stopping(1):
        assert answer(*words)[0] == 130
    chosen = few_shot.choose(Settings(images="mine", shots=3))
    Image.new("RGB", (9, 9)).save(next(x for x in Path("mine").iterdir() if x not in chosen))
    Path("mine/notes.txt").write_text("no picture")
    done(*words, "--resume")


def test_networks(folder):
    """Of one file; of a file each; a fresh discriminator."""
    cpu = torch.device("cpu")
    both, apart, fresh = (
        few_shot.load_networks(Settings(generator=G, discriminator=D), cpu)[1]
        for G, D in (("both.pt", None), ("g.pt", "d.pt"), ("g.pt", "none"))
    )
    assert torch.equal(both.convs[0][0].weight, apart.convs[0][0].weight)
    assert fresh.resolution == 32 and fresh.channels == load_generator("g.pt").channels


def test_the_worlds_own_shots():
    """Its persons are those of their codes, and other ones with another seed."""
    G = load_generator(miniature.GENERATOR)
    settings = Settings(target="anime", shots=2)
    shots, chosen, codes = few_shot.read_shots(settings, G)
    assert shots.shape == (2, 3, 128, 128) and chosen[1] == "anime, person 1 of seed 80000"
    z = torch.randn(2, faces.W_DIM, generator=rng(few_shot.PERSONS))
    torch.testing.assert_close(codes()[:, 3], G.mapping(z))
    other = few_shot.read_shots(Settings(target="anime", shots=2, seed=1), G)[0]
    assert not torch.equal(shots, other)


def test_published_numbers_are_the_start():
    """What is given beside them counts."""
    default = few_shot.command(["few-shot", "--published"]).__defaults__[0]
    assert default.steps == PUBLISHED.steps and default.mixing == 0.9 and default.method == "cdc"
    assert (default.lr, default.freeze, default.ewc) == (0.002, "", 5e8)
    assert few_shot.command(["few-shot"]).__defaults__[0] == Settings()


@pytest.mark.parametrize("words, line", [
    ("--images mine --shots 6", "--images mine: 5 pictures, not 6; wanted: --shots 5 or less"),
    ("--images mine --method rssa --batch 1", "rssa compares the images of a batch, and --batch 1"),
    ("--images mine --method rssa --freeze x", "--freeze 'x' must fit some of what learns in G"),
    ("--images empty", "--images empty: 0 pictures, not 3; wanted: a folder with some of .bmp"),
    ("--images nowhere", "--images nowhere: no such folder"),
    ("--images broken", "cannot read broken/0.png"),
    ("--images mine/1.png", "--images mine/1.png: a file; wanted: a folder"),
    ("", "neither --images nor --target; wanted: --images FOLDER, or --target anime"),
    ("--images mine --target anime", "both --images and --target; wanted: --images FOLDER"),
    ("--target anime", "--target is for the miniature; wanted: --images FOLDER"),
    ("--images mine --shots 0", "--shots must be at least 1"),
    ("--images mine --lr 0", "--lr must be above 0"),
    ("--images mine --batch 6", "--batch 6; wanted: a multiple of 4, D's groups"),
    ("--images mine --discriminator g.pt", 'g.pt: it has no discriminator, "d"; wanted: '),
    ("--images mine --discriminator small.pt", "D is of 16 px and G of 32"),
    ("--images mine --shots 1 --method rssa", "rssa draws all codes to the shots', and there is"),
    ("--images mine --resume --overwrite", "wanted: one"),
])  # fmt: skip
def test_bad_input(folder, words, line):
    code, _, err = answer("few-shot", *SHORT, *words.split(), "--out", "run")
    assert code == 2 and line in err and len(err.splitlines()) == 1, err
    assert not Path("run").exists()


def test_bad_input_of_the_miniature():
    for words, line in (
        (["--target", "ponies"], "--target 'ponies' is none of anime, sketch"),
        (["--target", "photo"], "--target 'photo' is none of anime"),
    ):
        code, _, err = answer("few-shot", *words)
        assert code == 2 and line in err and len(err.splitlines()) == 1


def test_warnings(folder):
    for words, line in (
        (["--shots", "1", "--method", "cdc"], "cdc has an anchor for each shot"),
        (["--images", "copies", "--method", "tgan"], "1.png are the same picture"),
    ):
        code, _, err = answer(*few(*words, "--overwrite"))
        assert code == 0 and "ipl.py: warning: " in err and line in err


@pytest.mark.slow
def test_the_embedded_world_has_all_it_takes(tmp_path):
    """Its generator, its discriminator and shots of its own."""
    words = "few-shot --target Zombie --steps 2 --ema .3 --shots 2 --samples 2".split()
    code, said, err = answer(*words, "--out", tmp_path / "run")
    assert code == 0 and "samples.png" in said, err
    rows = history_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1] and abs(rows[0]["distance"]) < 1e-3
    chosen = json.loads((tmp_path / "run" / "config.json").read_text())["chosen"]
    assert chosen == ["zombie, person 0 of seed 80000", "zombie, person 1 of seed 80000"]
