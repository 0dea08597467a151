"""python ipl.py video: what is in its frames, what plays them, and what it refuses."""

import contextlib
import http.server
import json
import queue
import resource
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import NADA, WORLD, answer, done, names
from conftest import GOLDEN, normal
from PIL import Image, ImageSequence

import ipl
from checkpoints import load_generator
from cli import sample, video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two finished runs of one source generator, some of others, and files of w."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        for target in ("anime", "sketch"):
            done(*WORLD, *NADA, "--lr", "0.1", "--ema", "0", "--target", target, "--out", target)
        done("--generator", GOLDEN / "nvidia_tiny.pkl", *WORLD[2:], *NADA, "--out", "other")
        classes = ["--generator", GOLDEN / "nvidia_variant_cond.pkl", *WORLD[2:], *NADA]
        for index in "13":
            done(*classes, "--class-index", index, "--out", f"class{index}")
        w = normal(1, load_generator(WORLD[1]).num_ws, 32).numpy()
        np.savez("me.npz", w=w)
        np.savez("none.npz", z=w)
        np.savez("shape.npz", w=w[:, :2])
        np.savez("nan.npz", w=w * np.nan)
        np.savez("object.npz", w=np.array([{}], dtype=object))
        np.savez("words.npz", w=w.astype(str))
        np.save("array.npy", w)
        (folder / "text.npz").write_text("no zip")
        (folder / "there.gif").touch()
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def singles(folder):
    """Source's and anime's pictures [4, 32, 32, 3] of seeds 0 to 3."""
    with contextlib.chdir(folder):
        done("sample", "--run", "anime", "--seeds", "0-3", "--outdir", "singly", "--trunc", "0.5")
        files = [[f"singly/{x}/seed000{i}.png" for i in range(4)] for x in ("source", "target")]
        return [np.stack([np.asarray(Image.open(path)) for path in row]) for row in files]


ROUGH = 10  # levels that 256 colours cost, in noisy pictures of 32 pixels


def frames_of(path):
    with Image.open(path) as film:
        return np.stack([np.asarray(x.convert("RGB")) for x in ImageSequence.Iterator(film)])


def far(a, b):
    """Mean distance of pictures, in levels of 255."""
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


# ----------------------------------------------------------------------------------------------
# Films


def test_a_walk_in_a_gif_has_the_source_left_and_the_targets_right_of_it(folder, singles):
    words = "video --run anime --run sketch --w-frames 3 --trunc 0.5 --output walk.gif"
    assert "walk.gif: 12 frames, 0.4 s" in done(*words.split())
    with Image.open("walk.gif") as film:
        assert film.size == (96, 32) and film.n_frames == 12 and film.info["loop"] == 0
        assert film.info["comment"].startswith(b"python ipl.py video --run anime --run sketch")
        times = [x.info["duration"] for x in ImageSequence.Iterator(film)]
    assert sum(times) == 400 and set(times) == {30, 40}  # 30 in a second, in hundredths
    frames, (source, target) = frames_of("walk.gif"), singles
    for i in range(4):
        left, middle, right = np.split(frames[3 * i], 3, axis=1)
        assert far(left, source[i]) < ROUGH and far(middle, target[i]) < ROUGH
        assert np.argmin([far(left, x) for x in [*source, *target]]) == i
        assert np.argmin([far(middle, x) for x in [*source, *target, right]]) == 4 + i


def stub():
    """A generator whose picture, of 1 pixel, is the first three numbers of w."""
    return SimpleNamespace(resolution=1, synthesis=lambda w: w[:, 0, :3, None, None])


def test_a_walk_is_a_smooth_loop_that_repeats_no_frame():
    keys = 0.8 * torch.rand(5, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([*video.walk([stub()], keys, 40)]).flatten(1).float()  # [200, 3]
    assert len(frames) == 200
    expected = ((keys[:, 0, 0] + 1) * 127.5).round()
    torch.testing.assert_close(frames[::40], expected, rtol=0, atol=1)
    steps = torch.cat([frames, frames[:1]]).diff(dim=0)
    assert steps.abs().max() < 10  # also from the last to the first
    assert steps.diff(dim=0).abs().max() <= 3  # a polygon's corners are sharper
    assert 0 < steps[-1].abs().max()


def test_cells_stand_row_after_row():
    keys = torch.linspace(-1, 1, 12)[:, None, None].expand(12, 1, 3)  # a grey for each person
    cells = keys.unflatten(0, (6, 2)).transpose(0, 1)
    frame = video.arranged(next(video.walk([stub(), stub()], cells, 2)), columns=3, rows=2)
    greys = ((torch.linspace(-1, 1, 12)[::2] + 1) * 127.5).round()
    assert frame.shape == (2, 6, 3)
    expected = greys.repeat_interleave(2).view(2, 6)
    torch.testing.assert_close(frame[..., 0].float(), expected, rtol=0, atol=1)


@torch.no_grad()
def test_a_blend_shows_every_generator_and_what_lies_between(source, target):
    w = source.mapping(normal(3, source.z_dim))[:, None].expand(-1, source.num_ws, -1)
    frames = torch.stack([*video.blends([source, target, source], w, 4)])[:, :, 0].float()
    assert frames.shape == (8, 3, 32, 32, 3)
    ends = [video.draw(x, w).float() for x in (source, target)]
    assert far(*ends) > 1
    assert far(frames[0], ends[0]) < 0.1 and far(frames[4], ends[1]) < 0.1
    assert far(frames[1], frames[7]) < 0.1  # there and back by the same way
    away = [far(x, ends[0]) for x in frames[:5]]
    assert away == sorted(away) and far(frames[2], frames[0]) > 0.2 * far(*ends)
    assert all(p.equal(q) for p, q in zip(source.parameters(), load(), strict=True))


def load():
    return load_generator(WORLD[1]).parameters()


def test_a_blend_of_two_runs_of_ones_own_person(folder):
    words = "--run anime --run sketch --projected-w me.npz --trunc 0 --blend --w-frames 2"
    assert "blend.gif: 6 frames" in done("video", *words.split(), "--output", "blend.gif")
    frames, w = frames_of("blend.gif"), torch.from_numpy(np.load("me.npz")["w"])
    assert frames.shape == (6, 32, 32, 3)
    files = WORLD[1], "anime/generator.pt", "sketch/generator.pt"
    pictures = [video.draw(load_generator(path), w)[0] for path in files]  # w is not truncated
    for i in range(3):
        assert far(frames[2 * i], pictures[i]) < ROUGH
        assert np.argmin([far(frames[2 * i], x) for x in pictures]) == i


def test_seeds_come_after_persons_of_files_in_a_grid(folder):
    words = "--run anime --projected-w me.npz --seeds 5,7-8 --grid 1x2 --w-frames 2 --fps 50"
    done("video", *words.split(), "--output", "both.gif")
    frames, w = frames_of("both.gif"), torch.from_numpy(np.load("me.npz")["w"])
    assert frames.shape == (4, 64, 64, 3)
    assert far(frames[0, :32, :32], video.draw(load_generator(WORLD[1]), w)[0]) < ROUGH


def test_an_mp4_of_any_size_has_every_frame(tmp_path):
    av = pytest.importorskip("av", reason="PyAV, of requirements-extra.txt")
    grey = torch.linspace(0, 255, 7).to(torch.uint8)
    frames = [torch.stack([g, 255 - g, g // 2]).expand(20, 36, 3).contiguous() for g in grey]
    video.write_mp4(tmp_path / "film.mp4", iter(frames), 12, "of a café")
    with av.open(tmp_path / "film.mp4") as film:
        stream = film.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 12)
        assert stream.codec_context.colorspace == 1 and film.metadata["comment"] == "of a café"
        shown = [x.reformat(format="rgb24", src_colorspace="ITU709") for x in film.decode(stream)]
    shown = np.stack([x.to_ndarray() for x in shown])
    assert len(shown) == 7 and (shown[:, 24:] > 240).all()  # a white border
    assert all(far(x[2:18, 2:32], y[2:18, 2:32]) < 4 for x, y in zip(shown, frames, strict=True))


PAGE = """<!doctype html><meta charset="utf-8"><img src="film.gif"><video src="film.mp4"></video>
<script>
const img = document.querySelector("img"), film = document.querySelector("video");
async function look() {
  await img.decode();
  const gif = new ImageDecoder({type: "image/gif", data: (await fetch("film.gif")).body});
  await gif.completed;
  film.muted = true;
  await film.play();
  await new Promise(done => film.addEventListener("ended", done));
  film.currentTime = 0;
  await new Promise(done => film.addEventListener("seeked", done));
  const canvas = new OffscreenCanvas(film.videoWidth, film.videoHeight), pen = canvas.getContext("2d");
  pen.drawImage(film, 0, 0);
  return {gif: [img.naturalWidth, img.naturalHeight, gif.tracks.selectedTrack.frameCount],
          film: [film.videoWidth, film.videoHeight], seconds: film.duration,
          pixels: [...pen.getImageData(0, 0, canvas.width, canvas.height).data]};
}
look().catch(error => ({error: String(error)})).then(
  found => fetch("/found", {method: "POST", body: JSON.stringify(found)}));
</script>"""  # noqa: E501


def browse(folder, browser, profile):
    """What the page's script finds, of a real browser. folder: what it may read."""
    found = queue.Queue()

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    def handle(*args):
        return Server(*args, directory=folder)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = "--headless --no-sandbox --disable-gpu --autoplay-policy=no-user-gesture-required"
        page = f"http://127.0.0.1:{server.server_port}/page.html"
        command = [browser, *flags.split(), f"--user-data-dir={profile}", page]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        job = subprocess.Popen(command, **quiet)
        try:
            return found.get(timeout=120)
        finally:
            job.terminate()
            job.wait()
            server.shutdown()


@pytest.mark.slow
def test_a_browser_plays_both(folder, singles, tmp_path):
    pytest.importorskip("av", reason="PyAV, of requirements-extra.txt")
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, which is Debian's package of that name")
    for suffix in ("gif", "mp4"):
        words = "video --run anime --w-frames 5 --fps 20 --trunc 0.5 --output"
        done(*words.split(), tmp_path / f"film.{suffix}")
    (tmp_path / "page.html").write_text(PAGE)
    found = browse(tmp_path, browser, tmp_path / "profile")
    assert "error" not in found, found
    assert found["gif"] == [64, 32, 20] and found["film"] == [64, 32]
    assert abs(found["seconds"] - 1) < 0.1
    pixels = np.array(found["pixels"]).reshape(32, 64, 4)[..., :3]
    assert abs((pixels[:, :32] - singles[0][0].astype(float)).mean((0, 1))).max() < 4  # no tint


def test_w_of_a_file_without_the_one_and_in_double_precision(folder):
    generator, w = load_generator(WORLD[1]), np.load("me.npz")["w"]
    np.savez("flat.npz", w=w[0].astype(">f8"), beside=np.zeros(3))
    for name in ("me.npz", "flat.npz"):
        found, _ = video.read_w(folder / name, generator)
        torch.testing.assert_close(found, torch.from_numpy(w))


# ----------------------------------------------------------------------------------------------
# Bad input

ONE = "--run anime --output new.gif"
ROWS = [  # (flags, a word of the answer)
    ("--output new.gif", "--run"), ("--run nowhere --output new.gif", "nowhere"),
    ("--run anime --run other --output new.gif", "nvidia_tiny.pkl"),
    ("--run anime --run other --output new.gif", "rosinality_tiny.pt"),
    ("--run anime --run other --blend --output new.gif", "one source generator"),
    ("--run class1 --run class3 --output new.gif", "class 1, and class3 adapts"),
    ("--run anime --output there.gif", "there already"), ("--run anime --output new.avi", ".mp4"),
    ("--run anime --output /proc/no/new.gif", "/proc/no"),
    (f"{ONE} --seeds 5-2", "0-35"), (f"{ONE} --seeds a", "0-35"), (f"{ONE} --seeds=", "empty"),
    (f"{ONE} --seeds 0-10000", "10,001"), (f"{ONE} --seeds 4294967296", "2^32"),
    (f"{ONE} --seeds 1,,2", "0-35"), (f"{ONE} --seeds 3", "--blend"),
    (f"{ONE} --grid 4x", "4x2"), (f"{ONE} --grid 3x1", "6"), (f"{ONE} --blend --grid 4x2", "8"),
    (f"{ONE} --fps 0", "50"), (f"{ONE} --fps 60", "50"), (f"{ONE} --w-frames 1", "--w-frames"),
    (f"{ONE} --w-frames 9999", "20000"), (f"{ONE} --trunc nan", "--truncation-psi"),
    (f"{ONE} --device warp", "warp"),
    *((f"{ONE} --blend --projected-w {name}", word) for name, word in (
        ("nowhere.npz", "No such file"), ("none.npz", "there is no w"), ("text.npz", "text.npz"),
        ("nan.npz", "not finite"), ("object.npz", "object.npz"), ("array.npy", "array.npy"),
        ("shape.npz", "[1, 2, 32]"), ("shape.npz", "[1, 8, 32]"), ("words.npz", "<U"),
    )),
]  # fmt: skip


@pytest.mark.parametrize("flags, word", ROWS)
def test_one_line_and_no_file(folder, flags, word):
    before = names(folder)
    code, out, err = answer("video", *flags.split())
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert err.startswith("ipl.py: error: ") and word in err
    assert names(folder) == before


def test_an_mp4_without_its_library_is_refused_before_the_first_frame(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(video, "draw", lambda *_: 1 / 0)
    code, _, err = answer("video", "--run", "anime", "--output", "new.mp4")
    assert code == 2 and err.count("\n") == 1 and "pip install av" in err and ".gif" in err


def test_a_full_disk_and_pictures_that_are_not_finite_leave_no_file(folder, monkeypatch):
    before, limit = names(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limit[1]))
    try:
        code, _, err = answer("video", *ONE.split(), "--w-frames", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2 and "new.gif: cannot be written" in err and names(folder) == before
    monkeypatch.setattr(ipl, "truncate", lambda w, *_: w * torch.nan)
    code, _, err = answer("video", *ONE.split(), "--w-frames", "2")
    assert code == 2 and "not finite" in err and names(folder) == before


# ----------------------------------------------------------------------------------------------
# sample --seeds, list, and what pictures say of themselves


def test_seeds():
    assert sample.seeds_of("0-3") == [0, 1, 2, 3]
    assert sample.seeds_of("7, 3,5-6,3") == [7, 3, 5, 6, 3]
    assert sample.seeds_of("0-9999")[-1] == 9999 and sample.seeds_of(f"{2**32 - 1}")
    z = sample.latents_of([7, 0], 5)
    expected = np.concatenate([np.random.RandomState(x).randn(1, 5) for x in (7, 0)])
    np.testing.assert_allclose(z, expected, rtol=1e-6)


def test_samples_of_seeds_in_a_grid_and_singly(folder, singles):
    done("sample", "--run", "anime", "--seeds", "3,0", "--truncation-psi", "0.5", "--out", "a.png")
    grid = np.asarray(Image.open("a.png"))
    source, target = (x[[3, 0]].repeat(4, 1).repeat(4, 2) for x in singles)  # 128 pixels each
    left = grid.shape[1] - 256
    for row, pictures in enumerate((source, target)):
        for column, picture in enumerate(pictures):
            top, x = 128 * row, left + 128 * column
            assert far(grid[top : top + 128, x : x + 128], picture) < 0.1
    assert Image.open("a.png").text == {
        "seed": "3,0",
        "command": "python ipl.py sample --run anime --seeds 3,0 --truncation-psi 0.5",
    }
    assert Image.open("singly/target/seed0002.png").text["seed"] == "2"
    done("sample", "--run", "anime", "--n", "2", "--outdir", "ours", "--out", "b.png")
    assert names(folder / "ours" / "source") == {"sample0000.png", "sample0001.png"}
    for words in ("5-2", "a", " ", "0-10000"):
        code, _, err = answer("sample", "--run", "anime", "--seeds", words)
        assert code == 2 and err.count("\n") == 1 and "0-35" in err


def test_list_has_the_targets_and_the_runs(folder):
    said = done("list", "--folder", folder)
    assert all(word in said for word in ("ukiyo-e", "woodblock", "finished runs in", ": 5"))
    assert "anime  photo to anime, nada, seed 0" in said
    code, _, err = answer("list", "--folder", "nowhere")
    assert code == 2 and err.count("\n") == 1 and "nowhere: no folder" in err
    folder.joinpath("none").mkdir()
    assert "finished runs in none: none" in done("list", "--folder", "none")
