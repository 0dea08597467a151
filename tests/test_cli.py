"""The command line: what a run leaves, says and draws, whatever its surroundings are like."""

import contextlib
import json
import shlex
import shutil
import sys
import threading
import time
import warnings
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from command import (
    NADA,
    SHORT,
    WORLD,
    answer,
    done,
    history_of,
    names,
    same,
    start,
    stopping,
    two_clips,
)
from conftest import GOLDEN, assert_same
from PIL import Image
from safetensors.torch import load_file

import cli
import ipl
from checkpoints import load_generator
from cli import adapt, pictures, processes
from cli.settings import GROUPS, MINIATURE, Settings, command_of, parse

WITHOUT_MAPPER = {*"config.json curves.png generator.pt history.jsonl samples.png".split()}
FILES = WITHOUT_MAPPER | {"mapper.safetensors"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A finished run of tiny networks."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    done(*WORLD, *SHORT, "--out", run)
    return run


def picture(path):
    with Image.open(path) as image:
        return image.convert("RGB")


# ----------------------------------------------------------------------------------------------
# A run


def test_main_job_in_a_process(tmp_path):
    """Its files, and what it says without a terminal, as into a log file."""
    short = "--steps 1 --steps-mapper 1 --batch-mapper 4 --bank 0 --samples 2".split()
    job = start("--source", "photo", "--target", "anime", *short, folder=tmp_path)
    (out, err), run = job.communicate(), tmp_path / "runs" / "photo-to-anime"
    assert names(run) == FILES
    found = json.loads((run / "config.json").read_text())
    settings = Settings(**{k: tuple(x) if type(x) is list else x for k, x in found.items()})
    short = replace(MINIATURE, steps=1, steps_mapper=1, batch_mapper=4, bank=0, samples=2)
    assert settings == short
    assert [(row["stage"], row["step"]) for row in history_of(run)] == [(1, 0), (2, 0)]
    assert err.startswith("runs/photo-to-anime: stage 1, 1 steps of 4 images; stage 2, 1 steps")
    assert "stage 1: 100%" in err and "stage 2: 100%" in err and "loss=" in err
    assert "ipl.py: warning: after 1 steps 97% of the average is still the source" in err
    there, judge, after = out.splitlines()
    assert there.startswith("runs/photo-to-anime: ") and all(name in there for name in FILES)
    assert judge.startswith("the judge, of 64") and "python ipl.py sample --run" in after


def test_overwrite_replaces_a_whole_run_and_the_second_one_is_not_told_what_to_do_next(tiny):
    out = tiny.parent / "second"
    shutil.copytree(tiny, out)
    (out / "notes.txt").write_text("mine")
    said = done(*WORLD, *NADA, "--out", out, "--overwrite")
    assert names(out) == WITHOUT_MAPPER | {"notes.txt"}
    assert json.loads((out / "config.json").read_text())["method"] == "nada"
    assert "samples.png" in said and "ipl.py sample" not in said and "judge" not in said


def test_samples_of_a_seed(tiny, tmp_path):
    def draw(name, *args):
        done("sample", "--run", tiny, "--out", tmp_path / f"{name}.png", *args)
        return picture(tmp_path / f"{name}.png")

    ten, again = draw("ten", "--n", "10"), draw("again", "--n", "10", "--seed", "1")
    other, wild = draw("other", "--n", "10", "--seed", "2"), draw("wild", "--truncation-psi", "2")
    assert ten.tobytes() == again.tobytes() != other.tobytes()
    assert ten.width > 8 * 128 and ten.height > 4 * 128  # 8 pairs, then 2
    assert wild.tobytes() != draw("sixteen").tobytes()


def test_paths(tmp_path, monkeypatch):
    """`~` counts behind `=` too; a run has a name, and opens from another folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("rosinality_tiny.pt", "clip_tiny.pt"):
        shutil.copy(GOLDEN / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    done("--generator", "rosinality_tiny.pt", "--clip=~/clip_tiny.pt", *NADA, "--target", "Disney")
    monkeypatch.chdir("/")
    done("sample", "--run=~/runs/photo-to-disney-nada", "--out=~/grid.png")
    done("--generator=~/rosinality_tiny.pt", "--clip=~/clip_tiny.pt", *NADA, "--out=~/run")
    done("convert", "~/rosinality_tiny.pt", "~/copy.safetensors")
    assert "rosinality" in done("inspect", "~/rosinality_tiny.pt")
    assert {"run", "grid.png", "copy.safetensors"} < names(tmp_path)


# ----------------------------------------------------------------------------------------------
# Other generators, several CLIPs, several targets


def test_a_pickle_of_nvidia_and_several_clips_through_both_stages(tmp_path):
    out, source, clips = tmp_path / "run", GOLDEN / "nvidia_tiny.pkl", two_clips(tmp_path)
    done("--generator", source, *SHORT, *clips, "--out", out)
    source, adapted = load_generator(source), load_generator(out / "generator.pt")
    pairs = zip(source.parameters(), adapted.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)
    found = [(row["stage"], row["step"], row.get("clip")) for row in history_of(out)]
    assert found == [(1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, None), (2, 1, None)]
    assert json.loads((out / "config.json").read_text())["clip"] == clips[1:3]
    mappers = torch.nn.ModuleList([ipl.LatentMapper(32, 4, 64), ipl.LatentMapper(32, 4, 64)])
    mappers.load_state_dict(load_file(out / "mapper.safetensors"))


def test_a_conditional_generator_draws_the_class_that_is_asked_for(tmp_path):
    world, drawn = ["--generator", GOLDEN / "nvidia_variant_cond.pkl", *WORLD[2:], *NADA], []
    for index in "13":
        out = tmp_path / index
        done(*world, "--class-index", index, "--out", out)
        assert not (out / "generator.pt").exists()  # rosinality's layout has no classes
        said = done("inspect", out / "generator.safetensors")
        assert f"classes         5, of which it draws {index}\n" in said
        done("sample", "--run", out, "--n", "2", "--out", tmp_path / "grid.png")
        drawn.append(picture(tmp_path / "grid.png").tobytes())
    assert drawn[0] != drawn[1]
    done(*WORLD, *NADA, "--out", out, "--overwrite")
    assert names(out) == WITHOUT_MAPPER


def test_a_target_that_fails_does_not_keep_the_others_from_being_made(tmp_path):
    (tmp_path / "photo-to-anime-nada").touch()
    targets = ["--target", "anime", "--target", "a  sketch"]
    code, _, err = answer(*WORLD, *NADA, "--out", tmp_path, *targets)
    assert code == 2 and "photo-to-anime-nada: File exists" in err
    assert names(tmp_path / "photo-to-a-sketch-nada") == WITHOUT_MAPPER


def test_convert_and_inspect(tmp_path):
    """Each golden file there and back, and the facts that the golden images depend on."""
    for name, resolution, suffix, *facts in (
        ("rosinality_tiny.pt", 32, ".pt", "layout          rosinality's", "float16         none"),
        ("nvidia_tiny.pkl", 32, ".pt", "layout          NVIDIA's", "training state  "),
        ("nvidia_variant_clamp.pkl", 16, ".pt", "conv_clamp      1.25", "float16         2 h"),
        ("nvidia_variant_cond.pkl", 16, ".safetensors", "5, --class-index chooses"),
        ("nvidia_variant_resnet.pkl", 16, ".safetensors", "architecture    resnet", "1 to RGB"),
    ):
        said, copy = done("inspect", GOLDEN / name), tmp_path / f"copy{suffix}"
        assert all(x in said for x in (f"resolution      {resolution}\n", *facts))
        assert str(copy) in done("convert", GOLDEN / name, copy)
        index = 0 if "cond" in name else None
        assert_same(*(load_generator(x, class_index=index) for x in (GOLDEN / name, copy)))
    assert names(tmp_path) == {"copy.pt", "copy.safetensors"}


# ----------------------------------------------------------------------------------------------
# Settings and pictures


def test_published_defaults():
    expected = dict(
        n_ctx=4, ctx_init="a photo of a", residual="published", lambda_domain=1, lambda_source=0,
        lambda_image=0, bank=0, lr_mapper=0.05, batch_mapper=32, steps_mapper=300, lr=0.002,
        batch=2, steps=300, ema=0.99, layer_batch=8, layer_lr=0.01, num_layers=None, eps=0,
        noise="fresh", crop=0,
        layers="adaptive", freeze="", truncation_psi=0.7, autocast="none",
    )  # fmt: skip
    assert {name: getattr(Settings(), name) for name in expected} == expected


def test_without_a_generator_the_miniature_values_are_the_defaults():
    assert parse([]) == [MINIATURE]
    assert parse(["--steps", "7"]) == [replace(MINIATURE, steps=7)]
    assert parse(["--generator=x.pt", "--eps", "0.2"]) == [Settings(generator="x.pt", eps=0.2)]
    two = parse("--target zombie --clip a b --target monster".split())
    assert two == [replace(MINIATURE, target=x, clip=("a", "b")) for x in ("zombie", "monster")]


def test_help_has_every_setting_in_one_group():
    settings, said = [name for group in GROUPS.values() for name in group.split()], done("--help")
    assert sorted(settings) == sorted(field.name for field in fields(Settings))
    assert all(f"--{name.replace('_', '-')}" in said for name in settings)
    assert "Adam's learning rate" in said  # the comments of Config


def test_words_and_gaps_of_samples():
    grid = torch.zeros(4 * 64, 2 * 64, 3, dtype=torch.uint8)  # two pairs of rows, all black
    page = pictures.labelled(grid, 64, "photo", "photo with the eyes of an anime", "seed 0")
    black = (page == 0).all(dim=2)
    rows, columns = (black.float().mean(dim=axis) for axis in (1, 0))
    assert columns[-2 * 128 :].min() > 0.8 and columns[: -2 * 128].max() < 0.5  # a margin
    assert (rows == 0).nonzero().min() == 2 * 128  # a gap
    assert black[: 2 * 128, : -2 * 128].any() and black[4 * 128 + 8 :].any()  # words and the note


def test_samples_say_how_they_were_made_and_a_stopped_run_says_the_same(tmp_path, monkeypatch):
    """The words of a command that repeats it, and of the machine's paths none that nobody typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("rosinality_tiny.pt", "clip_tiny.pt"):
        shutil.copy(GOLDEN / name, tmp_path)
    words = ["--generator=~/rosinality_tiny.pt", "--clip=~/clip_tiny.pt", *NADA, "--target", "日本"]
    done(*words, "--seed", "3", "--out", tmp_path / "whole")
    words += ["--seed", "3", "--out", tmp_path / "stopped", "--save-every", "1"]
    with stopping(1):
        assert answer(*words)[0] == 130
    done(*words, "--resume")
    files = [(tmp_path / run / "samples.png").read_bytes() for run in ("whole", "stopped")]
    assert files[0] == files[1] and str(tmp_path).encode() not in files[0]
    with Image.open(tmp_path / "whole" / "samples.png") as image:
        assert image.text["seed"] == "3"
        command = shlex.split(image.text["command"])
    assert command[:2] == ["python", "ipl.py"] and "~/clip_tiny.pt" in command
    (run,) = parse([*map(str, words)])
    assert parse(command[2:]) == [replace(run, out=None, save_every=50)]


@pytest.mark.parametrize("words", [
    "", "--target 'pixel art' --steps 7", "--generator x.pt --clip a b --tf32 --betas 0.1 0.2",
    "--generator miniature-ddpm --no-plain-adam", "--clip a --clip-weights 2 --growth 1.5 3",
])  # fmt: skip
def test_the_command_of_a_run_repeats_it(words):
    (settings,) = parse(shlex.split(words))
    assert parse(shlex.split(command_of(settings))[2:]) == [settings]


def test_curves_have_words_for_every_number_and_are_light(tiny):
    for row in history_of(tiny):
        numbers = {name for name, value in row.items() if type(value) is float}
        panels = pictures.PANELS[row["stage"]].values()
        assert numbers == {name for panel in panels for name in panel}
    width, height = picture(tiny / "curves.png").size
    assert width == 830 and 400 < height < 600
    assert (tiny / "curves.png").stat().st_size < 200 << 10


# ----------------------------------------------------------------------------------------------
# The surroundings


def test_warnings_are_lines_and_a_picture_that_cannot_be_drawn_costs_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "curves", lambda *args: 1 / 0)
    with warnings.catch_warnings(action="error"):
        code, _, err = answer(*WORLD, *SHORT, "--lr-mapper", "1e-9", "--out", tmp_path / "run")
    assert code == 0 and "ipl.py: warning: stage 1 learned little" in err
    assert "another --lr-mapper\n" in err  # ipl.py speaks of lr_mapper
    assert "ipl.py: warning: curves.png could not be drawn (ZeroDivisionError" in err
    assert names(tmp_path / "run") == FILES - {"curves.png"}


@pytest.mark.parametrize("kind", ["full", "closed", "none", "ascii"])
def test_streams_that_take_nothing_spoil_no_run(tiny, tmp_path, kind):
    """A pipe whose reader is gone is like a full disk; ASCII has no é."""
    path, stream, out = tmp_path / "said", None, tmp_path / "caf\xe9"
    if kind != "none":
        stream = open("/dev/full" if kind == "full" else path, "w", encoding="ascii")
    if kind == "closed":
        stream.close()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        cli.main([*WORLD, *SHORT, "--out", str(out)])
    if stream:
        stream.close()
    same(out, tiny)
    assert kind != "ascii" or r"caf\xe9: generator.pt, " in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams, rc",
    [
        ("<&- >&- 2>&-", b"text.usetex: True\nfigure.dpi: 9\n"),
        ("> /dev/full 2> /dev/full", b"\xff: \xfe"),
        ("2>&1 | true", b""),
    ],
)
def test_hostile_surroundings_of_a_process(tiny, tmp_path, streams, rc):
    """No home, no cache, warnings that are errors, an ASCII locale, somebody else's variables."""
    (tmp_path / "matplotlibrc").write_bytes(rc)
    command = f'"$@" {streams}', "bash", sys.executable, "-W", "error"
    job = start(
        *WORLD, *SHORT, "--out", "run", folder=tmp_path,
        before=["bash", "-o", "pipefail", "-c", *command], HOME="/nowhere", LC_ALL="C",
        PYTHONUTF8="0", PYTHONIOENCODING="ascii", XDG_CACHE_HOME="/proc", MPLCONFIGDIR="/proc",
        MPLBACKEND="nix", RANK="x", LOCAL_RANK="x",
    )  # fmt: skip
    said = job.communicate()
    assert job.returncode == 0 and names(tmp_path / "run") == FILES, said
    for name in ("curves.png", "samples.png"):
        assert picture(tmp_path / "run" / name).size == picture(tiny / name).size


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for module in (None, type(sys)("clip")):  # none, and another one of that name
        monkeypatch.setitem(sys.modules, "clip", module)
        code, _, err = answer(*WORLD, *NADA, "--out", tmp_path / "run")
        assert code == 2 and err.count("\n") == 1 and "clip" in err and "pip install" in err
    assert not names(tmp_path)


def test_a_slow_half_precision_is_told(monkeypatch):
    times = iter([0, 1] * 5 + [0, 2] * 5)  # of float32, then of bfloat16
    monkeypatch.setattr(processes, "time", type(time)("time"))
    monkeypatch.setattr(processes.time, "perf_counter", lambda: next(times), raising=False)
    with pytest.warns(UserWarning, match="emulates bfloat16, 2 times.*wanted: --autocast none"):
        processes.warn_of_emulation(Settings(autocast="clip"), torch.device("cpu"))
    processes.warn_of_emulation(Settings(), torch.device("cpu"))


def test_a_run_in_another_thread_has_no_handlers(tiny, tmp_path):
    """Only the main thread may have some."""
    thread = threading.Thread(target=done, args=(*WORLD, *SHORT, "--out", tmp_path / "run"))
    thread.start()
    thread.join()
    same(tmp_path / "run", tiny)


def test_memory_is_kept_if_asked_for_and_by_the_miniature(tmp_path):
    with mock.patch.object(processes, "keep_memory") as keep:
        done(*WORLD, *NADA, "--out", tmp_path / "a")
        assert not keep.called
        done(*WORLD, *NADA, "--out", tmp_path / "b", "--keep-memory")
        keep.assert_called_once_with()
        adapt.prepare(replace(MINIATURE, target="anime", method="nada", out=str(tmp_path / "c")))
        assert keep.call_count == 2
    processes.keep_memory()  # there may be no glibc
    processes.keep_memory(False)
