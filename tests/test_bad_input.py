"""What people get wrong: exit code 2, one line on stderr, and the folder is as it was.

The hostile files would leave a file in the temporary folder, if anything of them were run.
"""

import contextlib
import fcntl
import json
import os
import resource
import shlex
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from command import GOLDEN, NADA, answer, done, stopping

MARKER = Path(tempfile.gettempdir()) / "pwned_by_pickle"
RUN = f"--generator photo.pt --clip clip.pt {' '.join(NADA)}"


def snapshot():
    """{path of each file and folder of the current one: bytes, or None}."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(weights, what is none, a finished run and a stopped one; what is in there)."""
    MARKER.unlink(missing_ok=True)
    folder = tmp_path_factory.mktemp("bad input")
    golden = "rosinality_tiny.pt clip_tiny.pt nvidia_hostile.pkl nvidia_hostile_nested.pkl"
    here = "photo.pt clip.pt hostile.pkl nested.pkl classes.pkl"
    for name, copy in zip([*golden.split(), "nvidia_variant_cond.pkl"], here.split(), strict=True):
        shutil.copy(GOLDEN / name, folder / copy)
    with contextlib.chdir(folder):
        state = torch.load("photo.pt", weights_only=True)
        state["g_ema"]["conv1.conv.weight"] *= torch.nan
        torch.save(state, "nan.pt")
        Path("folder.pt").mkdir()
        Path("empty.pt").touch()
        Path("text.pt").write_text("These are no weights.\n")
        Path("half.pt").write_bytes(Path("photo.pt").read_bytes()[:20_000])
        done(*RUN.split(), "--out", "finished")
        with stopping(1):
            assert answer(*RUN.split(), "--out", "stopped", "--save-every", "1")[0] == 130
        shutil.copytree("finished", "elsewhere")
        return folder, snapshot()


# ----------------------------------------------------------------------------------------------
# What changes the folder before a command; perhaps it returns a function to call afterwards


def put(path, name):
    return lambda: shutil.copy(name, path)


def config(**changes):
    path = Path("finished/config.json")
    return lambda: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def checkpoint(change):
    def apply():
        kept = torch.load("stopped/checkpoint.pt", weights_only=True)
        change(kept["settings"], kept["loops"]["stage 2"]["state"]["target"])
        torch.save(kept, "stopped/checkpoint.pt")

    return apply


def lock():
    folder = os.open("stopped", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    return lambda: os.close(folder)


def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


LONG = "ooh " * 75
SAMPLE, RESUME = "sample --run finished", "$RUN --out stopped --resume"
ROWS = [  # (command, $RUN being a short run; a word of the answer; what happens before)
    *((words, words.split()[0]) for words in (
        "--steps 0", "--samples 10001", "--batch-mapper 1", "--lr nan", "--ema 1",
    )),
    *((words, words.split()[-1]) for words in (
        "--device warp", "--source gorilla", "inspect empty.pt", "inspect text.pt",
        "inspect hostile.pkl", "convert photo.pt copy.pkl", "convert photo.pt folder.pt",
        "sample --run nowhere", "sample --run stopped",
    )),
    *((f"$RUN {words}", words.split()[-1]) for words in (
        "--generator nowhere.pt", "--generator folder.pt", "--generator half.pt", "--out text.pt",
        "--generator clip.pt", "--generator nested.pkl", "--clip photo.pt", "--clip text.pt",
        "--clip hostile.pkl", "--out /proc/run",
    )),
    # Settings and labels
    ("--seed=-1", "--seed"), ("--device cuda:99", "torch"), ("--noise fixed --eps 0", "--eps"),
    ("--resume --overwrite", "--overwrite"), ("$RUN --num-layers 99", "--num-layers"),
    ("--clip a b a", "twice"), ("--clip a b --clip-weights 1", "--clip-weights"),
    ("$RUN --freeze nois3", "noise"), ("$RUN --freeze .", "--freeze"),
    ("--target ' '", "--target"), ("--target anmie", "did you mean anime"),
    ("--source 'pixel art' --target 'Pixel  ART'", "two domains"),
    ("--target \x07anime", "control characters"), ("--target \udcff", "UTF-8"),
    (f"$RUN --target '{LONG}'", "77"), (f"$RUN --ctx-init '{LONG}'", "--ctx-init"),
    ("$RUN --n-ctx 75", "75 vectors"), ("--target anime --target cyberpunk", "cyberpunk"),
    ("--target anime --target Anime", "--out"),
    # Weights
    ("$RUN --generator ftp://host/a.pt", "https://"), ("$RUN --clip ViT-B/33", "ViT-B/32"),
    ("$RUN --generator=~/nowhere.pt", os.path.expanduser("~/nowhere.pt")),
    ("$RUN --generator nan.pt", "conv1.conv.weight"), ("$RUN --class-index 0", "class"),
    ("$RUN --generator classes.pkl", "--class-index"), ("convert classes.pkl a.pt", ".safetensors"),
    ("convert photo.pt ./photo.pt", "itself"), ("convert photo.pt nowhere/copy.pt", "folder"),
    ("convert nested.pkl copy.pt", "nested.pkl"),
    # Runs that are there
    (f"{SAMPLE} --n 0", "--n "), (f"{SAMPLE} --out grid.jpeg", ".png"),
    (SAMPLE, "config.json", lambda: os.unlink("finished/config.json")),
    (SAMPLE, "config.json", put("finished/config.json", "text.pt")),
    (SAMPLE, "config.json", config(colour="red")), (SAMPLE, "--steps", config(steps="many")),
    (SAMPLE, "gone.pt", config(generator="gone.pt")),
    (SAMPLE, "w_dim", put("finished/generator.pt", GOLDEN / "nvidia_variant_clamp.pkl")),
    (SAMPLE, "grid.png", full_disk), (f"{SAMPLE} --out /proc/grid.png", "/proc"),
    ("$RUN --out finished", "--overwrite"), ("$RUN --out stopped", "--resume"),
    ("$RUN --out elsewhere", "config.json", lambda: os.unlink("elsewhere/generator.pt")),
    ("$RUN --out finished --resume --seed 9", "--seed 0, not 9"),
    (f"{RESUME} --steps 9 --lr 0.1", "--lr 0.002, not 0.1"),
    (RESUME, "another process", lock), (RESUME, "room", full_disk),
    (RESUME, "SHA-256", put("photo.pt", "nan.pt")),
    (RESUME, "damaged", put("stopped/checkpoint.pt", "half.pt")),
    (RESUME, "damaged", put("stopped/checkpoint.pt", "hostile.pkl")),
    (RESUME, "no checkpoint", put("stopped/checkpoint.pt", "photo.pt")),
    (RESUME, "does not fit", checkpoint(lambda _, target: target.popitem())),
    (RESUME, "--device cuda, not cpu", checkpoint(lambda kept, _: kept.update(device="cuda"))),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0][:40]!a} {row[1][:10]!a}")
def test_one_line_and_no_file(folder, row):
    command, word, *prepare = row
    folder, contents = folder
    with contextlib.chdir(folder), contextlib.ExitStack() as stack:
        for path in (path for path, data in contents.items() if data is not None):
            stack.callback(path.write_bytes, contents[path])
        if prepare and callable(undo := prepare[0]()):
            stack.callback(undo)
        before = snapshot()
        code, out, err = answer(*shlex.split(command.replace("$RUN", RUN)))
        after = snapshot()
    assert code == 2, err
    *before_it, error = err.splitlines()  # what a run said before it failed
    assert error.startswith("ipl.py: error: ") and len(error) < 600 and error.isprintable()
    assert not any("rror" in line or "Traceback" in line for line in before_it)
    assert word in error and out == ""
    assert after == before and not MARKER.exists()


@pytest.mark.parametrize("command", ["--stepps 3", "--steps many", "smaple --run x", "sample"])
def test_words_that_no_command_knows(folder, command):
    """tyro says what is wrong with them."""
    with contextlib.chdir(folder[0]):
        assert answer(*command.split())[:2] == (2, "") and snapshot() == folder[1]
