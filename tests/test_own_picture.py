"""invert and edit: a picture of one's own, its w, and what adapted generators draw from that."""

import contextlib
import copy
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from command import GOLDEN, NADA, WORLD, answer, done, names
from conftest import close, normal
from PIL import Image

from benchmarks import inversion
from checkpoints import load_generator
from cli import edit, invert
from cli.align import cut, face_quad, find_face, read_square

FACE = torch.tensor([[40.0, 50], [60, 50], [50, 60], [43, 75], [57, 75]])  # upright


def picture(path="picture.png", size=(48, 48), mode="RGB", seed=0, **how):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(pixels).resize(size).convert(mode).save(path, **how)


def npz(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of tiny networks, pictures, files with and without w."""
    folder = tmp_path_factory.mktemp("own picture")
    with contextlib.chdir(folder):
        done(*WORLD, *NADA, "--out", "run")
        shutil.copytree("run", "inversion")
        for run, found in (("other-source", "other.pt"), ("ddpm", "miniature-ddpm")):
            shutil.copytree("run", run)
            config = json.loads(Path("run/config.json").read_text()) | {"generator": found}
            Path(run, "config.json").write_text(json.dumps(config))
        state = torch.load(WORLD[1], weights_only=True)
        state["g_ema"]["conv1.conv.weight"] *= 1.1
        torch.save(state, "other.pt")
        picture()
        picture("small.png", (31, 48))
        Path("text.png").write_text("This is no picture.\n")
        Path("empty.png").touch()
        Path("cut.png").write_bytes(Path("picture.png").read_bytes()[:-500])
        w = np.zeros((1, 8, 32), np.float32)
        npz("w.npz", w=w)
        npz("none.npz", v=w)
        npz("shape.npz", w=w[0, :3])
        npz("nan.npz", w=w * np.nan)
        npz("object.npz", w=w.astype(object))
        npz("words.npz", w=w.astype(str))
        npz("foreign.npz", w=w, generator="0" * 64)
        Path("cut.npz").write_bytes(Path("w.npz").read_bytes()[:300])
    return folder


# ----------------------------------------------------------------------------------------------
# Inversion


def test_distance_of_a_checkerboard():
    """By hand: pixels differ by 1 or -1; each difference of two neighbours by 2; the mean is 0."""
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    x = torch.stack([board, torch.ones(16, 16), torch.zeros(16, 16)])[:, None].expand(-1, 3, -1, -1)
    close(invert.distance(x, torch.zeros_like(x)), [1 + 4 + 4, 4.0, 0])


def test_the_first_step_is_of_rate_0_at_the_mean_w(source):
    w = invert.project(source, torch.zeros(2, 3, 32, 32), steps=1)
    z = torch.from_numpy(np.random.RandomState(123).randn(10_000, source.z_dim)).float()
    close(w, source.mapping(z).mean(0).expand(2, source.num_ws, -1))


@pytest.mark.parametrize("space", ["w", "w+"])
def test_a_picture_of_the_generator_is_found_again(source, space):
    before = copy.deepcopy(source.state_dict())
    with torch.no_grad():
        images = source.synthesis(source.mapping(normal(2, source.z_dim)))
        start = invert.psnr(source.synthesis(source.w_avg[None]), images)
    w = invert.project(source, images, steps=40, space=space)
    assert w.shape == (2, source.num_ws, source.w_dim)
    assert torch.equal(w, w[:, :1].expand_as(w)) == (space == "w")
    assert (invert.psnr(source.synthesis(w), images) > start + 6).all()
    assert all(torch.equal(x, before[name]) for name, x in source.state_dict().items())
    alone = invert.project(source, images[1:], steps=40, space=space)
    close(alone, w[1:], rtol=1e-3, scale=1e-3)


def test_what_is_not_finite_ends_at_its_step(source):
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="step 0 of the inversion; wanted: a smaller lr"):
        invert.project(source, images, distance=lambda x, y: x.sum((1, 2, 3)) * torch.inf)


def test_files_of_invert(folder, tmp_path):
    with contextlib.chdir(folder):
        said = done("invert", "--run", "run", "--image", "picture.png", "--num-steps", "3",
                    "--outdir", tmp_path)  # fmt: skip
        source = load_generator(WORLD[1])
        square = read_square("picture.png", 32)
    assert names(tmp_path) == {"proj00.png", "projected_w.npz"} and " dB\n" in said
    file = np.load(tmp_path / "projected_w.npz", allow_pickle=False)
    assert file["w"].shape == (1, 8, 32) and file["w"].dtype == np.float32
    assert str(file["generator"]) == invert.digest(source)
    assert np.array_equal(file["image"], invert.as_pixels(square))
    drawn = source.synthesis(torch.from_numpy(file["w"]))[0].clamp(-1, 1)
    with Image.open(tmp_path / "proj00.png") as image:
        apart = np.asarray(image, int) - invert.as_pixels(drawn).int().numpy()
    assert abs(apart).max() <= 1


def test_several_pictures_are_a_file_each(folder, tmp_path):
    with contextlib.chdir(folder):
        done("invert", "--generator", WORLD[1], "--target", "picture.png", "picture.png",
             "--num-steps", "2", "--space", "w", "--outdir", tmp_path)  # fmt: skip
    files = (f"proj0{i}{end}" for i in range(2) for end in (".png", "_projected_w.npz"))
    assert names(tmp_path) == {*files}


# ----------------------------------------------------------------------------------------------
# Edit


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image, int)


def test_edit_draws_the_w_through_each_run(folder, tmp_path):
    """A w without its picture or its generator, as others write it."""
    with contextlib.chdir(folder):
        done("edit", "--run", "run", "--run", "inversion", "--projected-w", "w.npz", "w.npz",
             "--outdir", tmp_path)  # fmt: skip
        adapted = load_generator("run/generator.pt")
    rows = "inversion", "run", "inversion-1"
    assert names(tmp_path) == {"edit.png", *(f"{x}0{i}.png" for x in rows for i in range(2))}
    drawn = invert.as_pixels(adapted.synthesis(torch.zeros(1, 8, 32))[0]).int().numpy()
    assert abs(pixels_of(tmp_path / "run01.png") - drawn).max() <= 1
    assert (pixels_of(tmp_path / "inversion00.png") != pixels_of(tmp_path / "run00.png")).any()


def test_edit_of_a_picture_by_strength_0_is_its_inversion(folder, tmp_path):
    with contextlib.chdir(folder):
        done("edit", "--run", "run", "--image", "picture.png", "--num-steps", "2", "--strength",
             "0", "--outdir", tmp_path, "--pti", "2")  # fmt: skip
    assert names(tmp_path) == {"edit.png", "picture00.png", "inversion00.png", "run00.png"}
    apart = pixels_of(tmp_path / "inversion00.png") - pixels_of(tmp_path / "run00.png")
    assert abs(apart).max() <= 1


def test_weights_are_blended_and_noise_is_not(source, target):
    tuned = copy.deepcopy(source)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.5
        target.noises.noise_0 += 1
    mixed = edit.blended(source, target, 1.5, tuned)
    for name, p in mixed.named_parameters():
        a, b = source.get_parameter(name), target.get_parameter(name)
        close(p, a + 1.5 * (b - a) + 0.5)
    assert torch.equal(mixed.noises.noise_0, target.noises.noise_0)
    ends = [(0, source), (1, target)]
    for strength, expected in ends:
        each = zip(edit.blended(source, target, strength).parameters(), expected.parameters(),
                   strict=True)  # fmt: skip
        assert all(torch.equal(a, b) for a, b in each)


def test_pti_comes_nearer_and_leaves_the_source_alone(source):
    images, w = normal(1, 3, 32, 32).clamp(-1, 1) / 2, source.w_avg.repeat(1, source.num_ws, 1)
    before = copy.deepcopy(source.state_dict())
    tuned = edit.tune(source, w, images, 10)
    far, near = (invert.distance(x.synthesis(w), images) for x in (source, tuned))
    assert near < 0.95 * far
    assert all(torch.equal(x, before[name]) for name, x in source.state_dict().items())


def test_grid_fills_its_last_block_with_white():
    rows = [torch.full((3, 3, 2, 2), value) for value in (-1.0, 0.5)]
    found = edit.grid(rows, columns=2)
    assert found.shape == (8, 4, 3) and found[4:6, 2:].min() == 255 and found[4:6, :2].max() == 0


# ----------------------------------------------------------------------------------------------
# Squares


@pytest.mark.parametrize("align", ["none", "crop"])
def test_the_middle_of_what_is_no_square(tmp_path, align):
    image = Image.new("RGB", (80, 40), "red")
    image.paste("blue", (20, 0, 60, 40))
    image.save(tmp_path / "wide.png")
    noted = pytest.warns(UserWarning, match="the middle of 80x40")
    with noted if align == "none" else contextlib.nullcontext():
        found = read_square(tmp_path / "wide.png", 32, align)
    assert found.shape == (3, 32, 32) and found[2].min() > 0.9 and found[0].max() < -0.9


def test_square_of_an_upright_face():
    """By hand: eyes 20 apart, the mouth 25 below: half a side is max(2 * 20, 1.8 * 25) = 45, and
    the center lies a tenth of 25 below the eyes."""
    close(face_quad(FACE).float(), [[5.0, 7.5], [5, 97.5], [95, 97.5], [95, 7.5]])
    far = FACE.clone()
    far[3:, 1] -= 10  # now the eyes count
    close(face_quad(far).float(), [[10.0, 11.5], [10, 91.5], [90, 91.5], [90, 11.5]])


def test_a_turned_face_is_turned_back():
    turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    close(face_quad(FACE @ turn).float(), face_quad(FACE).float() @ turn)
    image = Image.new("RGB", (100, 130), "white")
    points = (FACE - 50) @ turn + 60
    for x, y in points[[0, 1, 3, 4]].round().int().tolist():
        image.paste("black", (x - 2, y - 2, x + 3, y + 3))
    square = cut(image, face_quad(points), 90).resize((90, 90))
    dark = np.argwhere(np.asarray(square.convert("L")) < 128)  # rows, columns
    upper, lower = dark[dark[:, 0] < 55], dark[dark[:, 0] >= 55]
    for found, row in ((upper, 50 - 7.5), (lower, 75 - 7.5)):  # one pixel is one unit of FACE
        assert abs(found[:, 0] - row).max() < 5
        left, right = (found[found[:, 1] < 45], found[found[:, 1] >= 45])
        assert abs(left[:, 1].mean() + right[:, 1].mean() - 90) < 2


def test_what_lies_outside_is_mirrored_and_what_is_inside_stays():
    """Nearly all of a face of a large picture of it, which is cut at its upper left."""
    pixels = np.random.default_rng(0).integers(60, 200, (12, 12, 3), np.uint8)
    whole = Image.fromarray(pixels).resize((240, 240))
    quad = face_quad(FACE + 60)
    expected = np.asarray(cut(whole, quad, 64), int)
    found = np.asarray(cut(whole.crop((80, 80, 240, 240)), quad - 80, 64), int)
    inside = slice(80, None)  # of 256; 90 units are 256 pixels, the cut is at 15
    apart = abs(found - expected)
    assert apart[inside, inside].max() <= 2 and 0 < apart.mean() < 30
    shrunk = np.asarray(cut(whole.resize((2400, 2400)), quad * 10 + 4.5, 64), int)
    assert abs(shrunk - expected).mean() < 3


def detector(monkeypatch, boxes, points):
    """A stand-in for facenet-pytorch."""
    found = boxes and torch.tensor(boxes).numpy(), None, points and torch.stack(points).numpy()
    network = SimpleNamespace(detect=lambda image, landmarks: found)
    for name in ("facenet_pytorch", "facenet_pytorch.models", "facenet_pytorch.models.mtcnn"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].MTCNN = lambda keep_all, device: network


def test_the_largest_face_counts(monkeypatch, tmp_path):
    boxes = [[0.0, 0, 10, 10], [20.0, 20, 80, 90]]
    detector(monkeypatch, boxes, [FACE / 5, FACE])
    picture(tmp_path / "two.png", (100, 100))
    with pytest.warns(UserWarning, match="the largest of 2 faces"):
        square = read_square(tmp_path / "two.png", 32, "face")
    points, n = find_face(Image.new("RGB", (100, 100)), "two.png")
    assert torch.equal(points, FACE) and n == 2 and square.shape == (3, 32, 32)


def test_real_detector_finds_nothing_in_a_plain_wall():
    pytest.importorskip("facenet_pytorch", reason="optional: finds faces for --align face")
    with pytest.raises(ValueError, match="no face is found"):
        find_face(Image.new("RGB", (128, 128), "grey"), "wall.png")


# ----------------------------------------------------------------------------------------------
# What people get wrong

INVERT, EDIT = "invert --run run --num-steps 2 --image", "edit --run run"
ROWS = [  # (command, a word of the answer)
    *((f"{INVERT} {name}", f"cannot read {name}: {words}") for name, words in (
        ("text.png", "no picture, or damaged"), ("empty.png", "it is empty"),
        ("cut.png", "no picture, or damaged"), ("small.png", "it has 31x48 pixels"),
    )),
    (f"{INVERT} gone.png", "no such file"), (f"{INVERT} run", "not a file"),
    (f"{INVERT} picture.png --align face", "pip install --no-deps facenet-pytorch"),
    (f"{INVERT} picture.png --num-steps 0", "--num-steps"),
    (f"{INVERT} picture.png --lr nan", "--lr"), (f"{INVERT} picture.png --seed=-1", "--seed"),
    (f"{INVERT} picture.png --outdir text.png", "text.png"),
    (f"{INVERT} picture.png --outdir /proc/out", "/proc/out"),
    (f"{INVERT} picture.png --device warp", "warp"),
    (f"{INVERT} picture.png --generator other.pt", "one of them"),
    ("invert --image picture.png --generator gone.pt", "gone.pt"),
    ("invert --image picture.png --generator text.png", "text.png"),
    ("invert --image picture.png --run gone", "config.json"),
    ("invert --image picture.png --run ddpm", "diffusion"),
    ("invert --run run --image", "names no picture"),
    ("edit --projected-w w.npz", "wanted: --run FOLDER"),
    (EDIT, "--projected-w FILE.npz or --image FILE"),
    (f"{EDIT} --projected-w w.npz --image picture.png", "either"),
    *((f"{EDIT} --projected-w w.npz --strength={x}", f"--strength must be from 0 to 2, not {x}")
      for x in ("nan", "-0.1", "2.1")),
    (f"{EDIT} --projected-w w.npz --pti=-1", "--pti"),
    (f"{EDIT} --projected-w w.npz --pti 2", "--image FILE"),
    (f"{EDIT} --projected-w w.npz --outdir /proc/out", "/proc/out"),
    (f"{EDIT} --image text.png", "cannot read text.png"),
    (f"{EDIT} --image picture.png --num-steps 0", "--num-steps"),
    *((f"{EDIT} --projected-w {name}", f"{name}: {words}") for name, words in (
        ("gone.npz", "No such file"), ("text.png", "no .npz"), ("cut.npz", "damaged"),
        ("none.npz", "there is no w"), ("shape.npz", "its w is [3, 32], float32; wanted: a .npz "
         "with w [1, 8, 32]"), ("nan.npz", "its w is not finite"),
        ("object.npz", "damaged, or more than"), ("words.npz", "its w is"),
        ("foreign.npz", "its w is of the generator 000000000000, the"),
    )),
    ("edit --run gone --projected-w w.npz", "gone is no finished run"),
    ("edit --run ddpm --projected-w w.npz", "ddpm is of a diffusion model"),
    (f"{EDIT} --run other-source --projected-w w.npz", "run adapts "),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_one_line_and_no_file(folder, monkeypatch, row):
    command, word = row
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)  # as if it were not there
    with contextlib.chdir(folder):
        before = {*Path().rglob("*")}
        code, out, err = answer(*shlex.split(command))
        assert {*Path().rglob("*")} == before
    assert code == 2 and out == "" and err.startswith("ipl.py: error: "), err
    assert word in err and err.count("\n") == 1 and len(err) < 600


def test_no_face(folder, monkeypatch):
    detector(monkeypatch, None, None)
    with contextlib.chdir(folder):
        code, _, err = answer(*shlex.split(f"{INVERT} picture.png --align face"))
    assert code == 2 and "picture.png: no face is found" in err and "--align crop" in err


def test_benchmark_runs(capsys):
    inversion.main("--n 2 --num-steps 1".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 persons: PSNR ") and "same person 100.0%" in lines[1]


def test_layouts_of_one_generator_have_one_digest(tmp_path, source):
    done("convert", WORLD[1], tmp_path / "copy.safetensors")
    copied = load_generator(tmp_path / "copy.safetensors")
    assert invert.digest(copied) == invert.digest(source)
    assert invert.digest(load_generator(GOLDEN / "nvidia_tiny.pkl")) != invert.digest(source)
