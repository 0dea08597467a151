"""report: one file that holds all it shows, runs nothing, and escapes every word."""

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from command import NADA, SHORT, WORLD, answer, done
from PIL import Image

from checkpoints import load_generator
from cli import report
from cli.run_folder import read_config
from cli.settings import MINIATURE, parse

LABEL = "a <b>&\"' sketch"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """IPL's, and NADA's to a label that would be markup."""
    folder = tmp_path_factory.mktemp("runs")
    done(*WORLD, *SHORT, "--out", folder / "ipl")
    done(*WORLD, *NADA, "--target", LABEL, "--out", folder / "nada & <i>")
    return [folder / "ipl", folder / "nada & <i>"]


def flags(runs):
    return [x for run in runs for x in ("--run", run)]


class Page(HTMLParser):
    """The words, tags and pictures of a page, whose tags have to be closed in their order."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.words, self.open = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data if "style" not in self.open else ""


def pixels(image):
    start, data = image["src"].split(",", 1)
    assert start == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        return np.asarray(found.convert("RGB"))


def test_a_page_holds_all_it_shows_and_runs_nothing(runs, tmp_path):
    said = done("report", *flags(runs), "--seeds", "0-2,7", "--out", tmp_path / "new" / "x.html")
    path = tmp_path / "new" / "x.html"
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert said.startswith(f"{path}: 2 runs, ") and path.stat().st_size < report.MOST_BYTES
    assert not {"script", "link", "iframe", "object", "a", "b", "i"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import| on\w+=", text)
    assert {name for _, a in page.tags for name in a} & {"href", "src", "srcset"} == {"src"}
    assert all(image["src"].startswith("data:image/") for image in page.images)
    assert all(image["alt"] for image in page.images)
    metas = [a for tag, a in page.tags if tag == "meta"]
    assert metas[0] == {"charset": "utf-8"} and metas[1]["name"] == "viewport"
    assert LABEL in page.words and "nada & <i>" in page.words and LABEL not in text
    assert len(page.images) == 3 * 4 + 2  # source, two runs, and curves
    assert "--method" in page.words and "--lr-mapper" not in page.words
    assert re.search(r"loss of the last 10 steps: stage 1 \d\.\d+; stage 2 \d", page.words)
    assert list((tmp_path / "new").iterdir()) == [path]


def test_the_pictures_are_those_of_nvidias_draw(runs, tmp_path):
    done("report", *flags(runs[:1]), "--seeds", "5", "--truncation-psi", "0.5",
         "--out", tmp_path / "x.html")  # fmt: skip
    shown = Page(tmp_path / "x.html").images
    z = torch.from_numpy(np.random.RandomState(5).randn(1, 32)).float()
    for image, path in zip(shown, (WORLD[1], runs[0] / "generator.pt"), strict=False):
        generator = load_generator(path)
        w = generator.mapping(z)
        with torch.no_grad():
            x = generator.synthesis(generator.w_avg + 0.5 * (w - generator.w_avg))[0]
        expected = ((x.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert abs(pixels(image) - expected).max() <= 1 and image["alt"].endswith("seed 5")


def test_commands_repeat_the_runs(runs):
    for run in runs:
        words = shlex.split(report.command_of(read_config(run)))
        assert words[:2] == ["python", "ipl.py"] and len(words) < 40
        assert parse(words[2:]) == [replace(read_config(run), out=None, device="auto")]
    plain = report.command_of(MINIATURE)
    assert plain == "python ipl.py --source photo --target anime"
    odd = parse(["--target=-x $HOME", "--betas", "0.5", "0.9", "--freeze", "", "--plain-adam"])
    assert parse(shlex.split(report.command_of(odd[0]))[2:]) == odd


def test_settings_that_differ(runs):
    found = [read_config(run) for run in runs]
    text = "".join(report.settings_of(found, ["one", "two"]))
    between, alike = text.split("<p>In all runs")
    assert all(x in between for x in ("--method", "--target", "--layers", "one", "two"))
    assert "--clip" in alike and "--method" not in alike and "--out" not in text


def test_large_pictures_shrink_and_a_large_page_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SIDE", 8)
    done("report", *flags(runs[:1]), "--seeds", "0", "--out", tmp_path / "x.html")
    assert pixels(Page(tmp_path / "x.html").images[0]).shape == (8, 8, 3)
    large = report.encoded(torch.zeros(3, 256, 256, dtype=torch.uint8))
    assert large.startswith(b"\xff\xd8") and "image/jpeg" in report.picture(large, "x")
    monkeypatch.setattr(report, "MOST_BYTES", 10_000)
    code, _, err = answer("report", *flags(runs[:1]), "--out", tmp_path / "y.html")
    assert code == 2 and "fewer --seeds" in err and not (tmp_path / "y.html").exists()


def changed(run, folder, **values):
    """A copy of a run with other settings in its config.json."""
    shutil.copytree(run, folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | values))
    return folder


def test_bad_input_is_one_line_and_leaves_nothing(runs, tmp_path):
    run, here = runs[0], tmp_path / "here"
    here.mkdir()
    shutil.copy(WORLD[1], tmp_path / "other.pt")
    other = changed(run, tmp_path / "other", generator=str(tmp_path / "other.pt"))
    ddpm = changed(run, tmp_path / "ddpm", generator="miniature-ddpm")
    broken, empty = changed(run, tmp_path / "broken"), changed(run, tmp_path / "empty")
    (broken / "history.jsonl").write_text('{"stage": 3}\n')
    (empty / "history.jsonl").write_text("")
    (tmp_path / "none").mkdir()
    for words, said in (
        ([], "no --run"), (["--run", tmp_path / "none"], "no finished run"),
        (flags([run, run]), "same folder twice"), (flags([run, other]), "runs of one source"),
        (flags([ddpm]), "diffusion model"), (flags([broken]), "history.jsonl"),
        (flags([empty]), "history.jsonl"), ([*flags([run]), "--seeds", "5-2"], "--seeds"),
        ([*flags([run]), "--truncation-psi", "nan"], "--truncation-psi"),
        ([*flags([run]), "--out", here / "x.png"], ".html"),
        ([*flags([run]), "--out", run / "config.json" / "x.html"], "cannot write"),
    ):  # fmt: skip
        code, out, err = answer("report", "--out", here / "x.html", *words)
        last = err.splitlines()[-1]
        assert code == 2 and out == "" and said in last and "Traceback" not in err, err
        assert last.startswith("ipl.py: error: ") and not [*here.iterdir()]
    _, _, err = answer("report", "--out", here / "x.html", *flags([run, other]))
    assert "rosinality_tiny.pt" in err and "other.pt" in err


@pytest.mark.slow
def test_the_miniature_has_truth_and_figures(tmp_path):
    words = "--method nada --steps 1 --samples 1 --ema 0".split()
    done(*words, "--target", "anime", "--out", tmp_path / "run")
    done("report", *flags([tmp_path / "run"]), "--seeds", "0-1", "--out", tmp_path / "x.html")
    page = Page(tmp_path / "x.html")
    assert len(page.images) == 3 * 2 + 1 and "the truth" in page.images[4]["alt"]
    source, adapted, truth = (pixels(image).astype(int) for image in page.images[0:6:2])
    assert abs(adapted - source).mean() < abs(truth - source).mean()  # after one step
    assert "target domain" in page.words


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the program chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_wide_and_narrow(runs, tmp_path, width):
    done("report", *flags(runs), "--seeds", "0-1", "--out", tmp_path / "x.html")
    picture = tmp_path / "shown.png"
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400",
         f"--screenshot={picture}", f"file://{tmp_path / 'x.html'}"],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    shown = Image.open(picture).convert("RGB")
    assert shown.width == width and len(shown.getcolors(1 << 24)) > 50
