"""The command line: what a run leaves, says and draws, whatever its surroundings are like."""

import contextlib
import io
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from command import GOLDEN, NADA, ROOT, SHORT, WORLD, answer, done, history_of, same, start
from PIL import Image
from safetensors.torch import load_file

import cli
import ipl
from checkpoints import load_generator
from cli import pictures, processes
from cli.settings import GROUPS, MINIATURE, Settings, parse

FILES = "config.json curves.png generator.pt history.jsonl mapper.safetensors samples.png".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, its finished run, stdout, stderr) of a process of its own, of the miniature."""
    folder = tmp_path_factory.mktemp("cli")
    short = "--steps 1 --steps-mapper 1 --batch-mapper 4 --samples 2".split()
    job = start("--source", "photo", "--target", "anime", *short, folder=folder)
    out, err = job.communicate()
    assert job.returncode == 0, err
    return folder, folder / "runs" / "photo-to-anime", out, err


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


def test_run_folder(finished):
    _, run, _, _ = finished
    assert sorted(path.name for path in run.iterdir()) == FILES
    settings = Settings(**json.loads((run / "config.json").read_text()))
    assert replace(settings, clip=(), clip_weights=()) == replace(
        MINIATURE, steps=1, steps_mapper=1, batch_mapper=4, samples=2
    )
    assert [(row["stage"], row["step"]) for row in history_of(run)] == [(1, 0), (2, 0)]


def test_a_run_says_what_it_does_and_what_there_is(finished):
    """Without a terminal, as in a log file."""
    _, _, out, err = finished
    first, *_ = err.splitlines()
    assert (
        first == "runs/photo-to-anime: stage 1, 1 steps of 4 images; stage 2, 1 steps of 4 images"
    )
    for words in ("stage 1: 100%", "stage 2: 100%", "loss=", "ipl.py: warning: after 1 steps"):
        assert words in err
    assert "is still the source generator; wanted: more steps, or a smaller --ema\n" in err
    there, judge, after = out.splitlines()
    assert there.startswith("runs/photo-to-anime: ") and all(name in there for name in FILES)
    assert judge.startswith("the judge, of 128") and "same person 100%" in judge
    assert after.endswith("python ipl.py sample --run runs/photo-to-anime --n 16 --out grid.png")


def test_a_second_run_is_not_told_what_to_do_next(tiny):
    out = done(*WORLD, *NADA, "--out", tiny.parent / "second")
    assert "samples.png" in out and "ipl.py sample" not in out and "judge" not in out


def test_saved_networks_open(tiny):
    source, adapted = load_generator(WORLD[1]), load_generator(tiny / "generator.pt")
    pairs = zip(source.parameters(), adapted.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)
    torch.testing.assert_close(source.w_avg, adapted.w_avg)
    ipl.LatentMapper(32, 4, 64).load_state_dict(load_file(tiny / "mapper.safetensors"))


def test_samples_of_a_seed(tiny, tmp_path):
    def draw(name, *args):
        done("sample", "--run", tiny, "--out", tmp_path / f"{name}.png", *args)
        return picture(tmp_path / f"{name}.png")

    ten, again = draw("ten", "--n", "10"), draw("again", "--n", "10", "--seed", "1")
    other, wild = draw("other", "--n", "10", "--seed", "2"), draw("wild", "--truncation-psi", "2")
    assert ten.tobytes() == again.tobytes() != other.tobytes()
    assert ten.width > 8 * 128 and ten.height > 4 * 128  # 8 pairs, then 2
    assert wild.tobytes() != draw("sixteen").tobytes()


def test_nada_has_no_mapper_and_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done(*WORLD, *NADA, "--target", "Disney")
    run = tmp_path / "runs" / "photo-to-disney-nada"
    assert (run / "generator.pt").exists() and not (run / "mapper.safetensors").exists()


def test_overwrite_replaces_the_whole_run(tiny, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(tiny, out)
    (out / "notes.txt").write_text("mine")
    done(*WORLD, *NADA, "--out", out, "--overwrite")
    assert not (out / "mapper.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["method"] == "nada"
    assert (out / "notes.txt").read_text() == "mine"


def test_a_run_opens_from_another_folder(tmp_path, monkeypatch):
    shutil.copy(GOLDEN / "rosinality_tiny.pt", tmp_path / "g.pt")
    monkeypatch.chdir(tmp_path)
    done("--generator", "g.pt", *WORLD[2:], *NADA, "--out", "run")
    monkeypatch.chdir("/")
    done("sample", "--run", tmp_path / "run", "--out", tmp_path / "grid.png")


def test_a_tilde_is_the_home_behind_an_equals_sign_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("rosinality_tiny.pt", "clip_tiny.pt"):
        shutil.copy(GOLDEN / name, tmp_path)
    done("--generator=~/rosinality_tiny.pt", "--clip=~/clip_tiny.pt", *NADA, "--out=~/run")
    done("sample", "--run=~/run", "--out=~/grid.png")
    done("convert", "~/rosinality_tiny.pt", "~/copy.safetensors")
    assert "rosinality" in done("inspect", "~/rosinality_tiny.pt")
    assert {"run", "grid.png", "copy.safetensors"} < {path.name for path in tmp_path.iterdir()}


# ----------------------------------------------------------------------------------------------
# Other generators, several CLIPs, several targets


def test_a_pickle_of_nvidia_through_both_stages(tmp_path):
    out = tmp_path / "run"
    done("--generator", GOLDEN / "nvidia_tiny.pkl", *WORLD[2:], *SHORT, "--out", out)
    assert [row["stage"] for row in history_of(out)] == [1, 1, 2, 2]
    saved = torch.load(out / "generator.pt", weights_only=True)
    golden = torch.load(GOLDEN / "nvidia_tiny_as_rosinality.pt", weights_only=True)
    assert saved["g_ema"].keys() == golden["g_ema"].keys()


def test_a_conditional_generator_draws_the_class_that_is_asked_for(tmp_path):
    world = ["--generator", GOLDEN / "nvidia_variant_cond.pkl", *WORLD[2:], *NADA]
    drawn = []
    for index in "13":
        out = tmp_path / index
        done(*world, "--class-index", index, "--out", out)
        assert not (out / "generator.pt").exists()  # rosinality's layout has no classes
        assert f"classes         5, of which it draws {index}\n" in done(
            "inspect", out / "generator.safetensors"
        )
        done("sample", "--run", out, "--n", "2", "--out", tmp_path / "grid.png")
        drawn.append(picture(tmp_path / "grid.png").tobytes())
    assert drawn[0] != drawn[1]
    done(*WORLD, *NADA, "--out", out, "--overwrite")
    assert (out / "generator.pt").exists() and not (out / "generator.safetensors").exists()


def test_several_clips(tmp_path):
    other = torch.load(WORLD[3], weights_only=True)
    other["visual.proj"] = -other["visual.proj"]
    torch.save(other, tmp_path / "other.pt")
    out, clips = tmp_path / "run", [WORLD[3], str(tmp_path / "other.pt")]
    done(*WORLD[:2], *SHORT, "--clip", *clips, "--clip-weights", "1", "0.5", "--out", out)
    found = [(row["stage"], row["step"], row.get("clip")) for row in history_of(out)]
    assert found == [(1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, None), (2, 1, None)]
    assert json.loads((out / "config.json").read_text())["clip"] == clips
    saved = load_file(out / "mapper.safetensors")
    for i in "01":
        state = {name[2:]: x for name, x in saved.items() if name.startswith(f"{i}.")}
        ipl.LatentMapper(32, 4, 64).load_state_dict(state)


def test_a_target_that_fails_does_not_keep_the_others_from_being_made(tmp_path):
    (tmp_path / "photo-to-anime-nada").touch()
    code, _, err = answer(
        *WORLD, *NADA, "--out", tmp_path, "--target", "anime", "--target", "a  sketch"
    )
    assert code == 2 and "photo-to-anime-nada: File exists" in err
    assert (tmp_path / "photo-to-a-sketch-nada" / "generator.pt").exists()


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
        a, b = (load_generator(path, class_index=index) for path in (GOLDEN / name, copy))
        assert a.config == b.config and torch.equal(a.w_avg, b.w_avg)
        assert all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["nvidia_hostile", "nvidia_hostile_nested"])
def test_hostile_files_run_nothing_whatever_the_command(tmp_path, name):
    path, marker = GOLDEN / f"{name}.pkl", Path(tempfile.gettempdir()) / "pwned_by_pickle"
    marker.unlink(missing_ok=True)
    for words in (
        ["--generator", path, *WORLD[2:], *SHORT, "--out", tmp_path / "run"],
        ["--clip", path, *WORLD[:2], *SHORT, "--out", tmp_path / "run"],
        ["inspect", path],
        ["convert", path, tmp_path / "copy.pt"],
    ):
        code, _, err = answer(*words)
        assert code == 2 and str(path) in err
    assert not marker.exists() and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# Settings


def test_published_defaults():
    settings = Settings()
    expected = dict(
        n_ctx=4, ctx_init="a photo of a", residual="published", lambda_domain=1, lambda_source=0,
        lr_mapper=0.05, batch_mapper=32, steps_mapper=300, lr=0.002, batch=2, steps=300, ema=0.99,
        layer_batch=8, layer_lr=0.01, num_layers=None, eps=0, noise="fresh", crop=0,
        layers="adaptive", freeze="", truncation_psi=0.7, autocast="none",
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected


def test_without_a_generator_the_miniature_values_are_the_defaults():
    assert parse([]) == [MINIATURE]
    assert parse(["--steps", "7"]) == [replace(MINIATURE, steps=7)]
    assert parse(["--generator", "x.pt"]) == [Settings(generator="x.pt")]
    assert parse(["--generator=x.pt", "--eps", "0.2"]) == [Settings(generator="x.pt", eps=0.2)]
    two = parse("--target zombie --clip a b --target monster".split())
    assert two == [replace(MINIATURE, target=x, clip=("a", "b")) for x in ("zombie", "monster")]


def test_help_has_every_setting_in_one_group(capsys):
    names = [name for group in GROUPS.values() for name in group.split()]
    assert sorted(names) == sorted(field.name for field in fields(Settings))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and "python ipl.py --source photo --target anime" in said
    assert "ukiyo-e" in said and all(f"--{name.replace('_', '-')}" in said for name in names)
    assert "deviation 3" in said and "Adam's learning rate" in said  # comments of Config


# ----------------------------------------------------------------------------------------------
# Pictures


def test_words_and_gaps_of_samples():
    grid = torch.zeros(4 * 64, 2 * 64, 3, dtype=torch.uint8)  # two pairs of rows, all black
    page = pictures.labelled(grid, 64, "photo", "photo with the eyes of an anime", "seed 0")
    black = (page == 0).all(dim=2)
    rows, columns = (black.float().mean(dim=axis) for axis in (1, 0))
    assert columns[-2 * 128 :].min() > 0.8 and columns[: -2 * 128].max() < 0.5  # a margin
    (gaps,) = ((rows[1:] == 0) & (rows[:-1] > 0)).nonzero(as_tuple=True)
    assert len(gaps) >= 2 and page.shape[0] > 4 * 128 + 20  # a gap, and the note below
    assert black[: 2 * 128, : -2 * 128].any()  # words


def test_curves_are_readable_and_light(tiny):
    size = picture(tiny / "curves.png").size
    assert size[0] == 830 and 400 < size[1] < 600
    assert (tiny / "curves.png").stat().st_size < 200 << 10


def test_every_number_of_a_history_has_words(tiny):
    for row in history_of(tiny):
        numbers = {name for name, value in row.items() if type(value) is float}
        assert numbers == set(pictures.WORDS[row["stage"]].values())


# ----------------------------------------------------------------------------------------------
# The surroundings


@pytest.mark.parametrize("rc", ["text.usetex: True\nfigure.dpi: 9\n", "\xff: \xfe", "backend: nix"])
def test_settings_of_matplotlib_change_no_picture(tiny, tmp_path, rc):
    (tmp_path / "matplotlibrc").write_bytes(rc.encode("latin-1"))
    script = "from cli import pictures; import sys; sys.stdout.buffer.write(pictures.curves([]))"
    script = script.replace("[]", repr(history_of(tiny)))
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "module://nowhere"},
    )
    assert found.stderr == b""
    with Image.open(io.BytesIO(found.stdout)) as image, Image.open(tiny / "curves.png") as usual:
        assert image.size == usual.size


def test_a_picture_that_cannot_be_drawn_costs_a_warning(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(pictures, "curves", broken)
    code, out, err = answer(*WORLD, *NADA, "--out", tmp_path / "run")
    assert code == 0 and "warning: curves.png could not be drawn (RuntimeError: no fonts)" in err
    assert "samples.png" in out and not (tmp_path / "run" / "curves.png").exists()


class Broken(io.StringIO):
    """A stream as of a pipe whose reader is gone, of a full disk, or of a locale without é."""

    def __init__(self, error=None, encoding="utf-8"):
        super().__init__()
        self.error, self._encoding = error, encoding

    encoding = property(lambda self: self._encoding)

    def write(self, words):
        if self.error:
            raise self.error
        words.encode(self.encoding)
        return super().write(words)


@pytest.mark.parametrize(
    "stream",
    [Broken(BrokenPipeError(32, "Broken pipe")), Broken(OSError(28, "No space")), Broken(), None],
    ids=["pipe", "full", "closed", "none"],
)
def test_streams_that_take_nothing_spoil_no_run(tiny, tmp_path, stream):
    if isinstance(stream, Broken) and stream.error is None:
        stream.close()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        cli.main([*WORLD, *SHORT, "--out", str(tmp_path / "run")])
    same(tmp_path / "run", tiny)


def test_a_locale_without_letters(tmp_path):
    stream = Broken(encoding="ascii")
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        cli.main([*WORLD, *NADA, "--target", "caf\xe9", "--out", str(tmp_path / "\xe9")])
    assert r"\xe9: config.json, " in stream.getvalue() or r"\xe9: generator.pt" in stream.getvalue()
    assert json.loads((tmp_path / "\xe9" / "config.json").read_text("utf-8"))["target"] == "caf\xe9"


@pytest.mark.slow
def test_hostile_surroundings_of_a_process(tmp_path):
    """All at once: no home, no cache, no streams, warnings that are errors, an ASCII locale."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    words = [sys.executable, "-W", "error", ROOT / "ipl.py", *WORLD, *NADA, "--out", "run"]
    job = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *map(str, words)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere", "LC_ALL": "C", "PYTHONUTF8": "0",
             "XDG_CACHE_HOME": "/proc", "MPLCONFIGDIR": "/proc", "MPLBACKEND": "nix",
             "PYTHONIOENCODING": "ascii", "RANK": "x", "LOCAL_RANK": "x"},
    )  # fmt: skip
    assert job.returncode == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*FILES} - {"mapper.safetensors"}


def test_warnings_are_lines_whatever_the_filters(tmp_path):
    with warnings.catch_warnings(action="error"):
        code, _, err = answer(*WORLD, *SHORT, "--lr-mapper", "1e-9", "--out", tmp_path / "run")
    assert code == 0 and "ipl.py: warning: stage 1 learned little" in err
    assert "wanted: more --steps-mapper, or another --lr-mapper\n" in err


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for module, words in (
        (None, "clip"),
        (type(sys)("clip"), "pip install clip-anytorch"),  # another one of that name
    ):
        monkeypatch.setitem(sys.modules, "clip", module)
        code, _, err = answer(*WORLD, *NADA, "--out", tmp_path / "run")
        assert code == 2 and err.count("\n") == 1 and words in err and "pip install" in err
    assert not list(tmp_path.iterdir())


def test_a_slow_half_precision_is_told(monkeypatch):
    cpu, tried = torch.device("cpu"), []

    def clock():
        tried.append(len(tried))
        return tried[-1] % 2 * (2 if tried[-1] > 9 else 1)  # the second ten: half precision

    monkeypatch.setattr(processes.time, "perf_counter", clock)
    with pytest.warns(UserWarning, match="emulates bfloat16.*wanted: --autocast none"):
        processes.warn_of_emulation(Settings(autocast="clip"), cpu)
    processes.warn_of_emulation(Settings(), cpu)


def test_device_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=f"torch {torch.__version__[:4]}.* sees no GPU"):
        processes.pick_device("cuda:7")
    assert processes.pick_device("cpu").type == "cpu"


def test_signals_in_another_thread_are_left_alone():
    """Only the main thread may have handlers."""
    from threading import Thread

    before, found = signal.getsignal(signal.SIGINT), []

    def run():
        with processes.deferred_signals() as received:
            found.append((received, signal.getsignal(signal.SIGINT)))

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert found == [([], before)]


# ----------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_large_tensors_get_the_memory_of_those_before():
    """By the pages that the system had to clear for the last ten of twenty."""

    def faults(keep):
        processes.keep_memory(keep)
        counts = []
        for _ in range(20):
            torch.ones(2**24)  # 64 MB
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        return counts[-1] - counts[9]

    try:
        assert 10 * faults(True) < faults(False)
    finally:
        processes.keep_memory(False)


def test_memory_is_kept_if_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "keep_memory", lambda: calls.append(True))
    done(*WORLD, *NADA, "--out", tmp_path / "a")
    assert calls == []
    done(*WORLD, *NADA, "--out", tmp_path / "b", "--keep-memory")
    assert calls == [True]
