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
from command import GOLDEN, NADA, answer, done

import ipl
from checkpoints import save_generator
from stylegan2_ops.generator import Generator

MARKER = Path(tempfile.gettempdir()) / "pwned_by_pickle"
RUN = f"--generator photo.pt --clip clip.pt {' '.join(NADA)}"


def make_files():
    """In the current folder: weights, what is none, a finished run, and one that was stopped."""
    for golden, name in (
        ("rosinality_tiny.pt", "photo.pt"), ("clip_tiny.pt", "clip.pt"),
        ("nvidia_hostile.pkl", "hostile.pkl"), ("nvidia_hostile_nested.pkl", "nested.pkl"),
        ("nvidia_variant_cond.pkl", "classes.pkl"),
    ):  # fmt: skip
        shutil.copy(GOLDEN / golden, name)
    for name, change in (("nan.pt", torch.nan), ("other.pt", 2)):
        state = torch.load("photo.pt", weights_only=True)
        state["g_ema"]["conv1.conv.weight"] *= change
        torch.save(state, name)
    small = Generator(resolution=32, channels={4: 4, 8: 4, 16: 4, 32: 4}, w_dim=16, n_mlp=2)
    save_generator(small, Path("w16.pt"))
    Path("folder.pt").mkdir()
    Path("empty.pt").touch()
    Path("text.pt").write_text("These are no weights.\n")
    Path("half.pt").write_bytes(Path("photo.pt").read_bytes()[:20_000])
    done(*RUN.split(), "--out", "finished")

    def stopped(stage, total, state, done=0):
        yield 0
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ipl, "progress", stopped)
        assert answer(*RUN.split(), "--out", "stopped", "--save-every", "1")[0] == 130
    shutil.copytree("finished", "elsewhere")


def snapshot():
    """{path of each file and folder: bytes, or None}."""
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(Path().rglob("*"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(the folder of all rows, what is in it): a run knows its files by their full paths."""
    MARKER.unlink(missing_ok=True)
    folder = tmp_path_factory.mktemp("bad input").resolve()
    with contextlib.chdir(folder):
        make_files()
        return folder, snapshot()


# ----------------------------------------------------------------------------------------------
# What changes the folder before a command; perhaps with a function to call afterwards


def config(**changes):
    path = Path("finished/config.json")
    return lambda: path.write_text(json.dumps(json.loads(path.read_text()) | changes)) and None


def checkpoint(change):
    def apply():
        kept = torch.load("stopped/checkpoint.pt", weights_only=True)
        change(kept["settings"], kept["loops"]["stage 2"]["state"]["target"])
        torch.save(kept, "stopped/checkpoint.pt")

    return apply


def put(path, name):
    return lambda: shutil.copy(name, path) and None


def lock():
    folder = os.open("stopped", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    return lambda: os.close(folder)


def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


LONG = "ooh " * 75
ROWS = [  # (command, $RUN being a short run; a word of the answer; what happens before)
    # Settings
    ("--steps 0", "--steps"),
    ("--samples 10001", "--samples"),
    ("--batch-mapper 1", "--batch-mapper"),
    ("--lr nan", "--lr"),
    ("--ema 1", "--ema"),
    ("--seed=-1", "--seed"),
    ("--device warp", "warp"),
    ("--device cuda:99", "torch"),
    ("--noise fixed --eps 0", "--eps"),
    ("--resume --overwrite", "--overwrite"),
    ("--clip a b a", "twice"),
    ("--clip a b --clip-weights 1", "--clip-weights"),
    ("$RUN --num-layers 99", "--num-layers"),
    ("$RUN --freeze nois3", "noise"),
    ("$RUN --freeze .", "--freeze"),
    # Labels
    ("--target ' '", "--target"),
    ("--source 'pixel art' --target 'Pixel  ART'", "two domains"),
    ("--target anmie", "did you mean anime"),
    ("--source gorilla", "gorilla"),
    ("--target \x07anime", "control characters"),
    ("--target \udcff", "UTF-8"),
    (f"$RUN --target '{LONG}'", "77"),
    ("$RUN --n-ctx 75", "75 vectors"),
    (f"$RUN --ctx-init '{LONG}'", "--ctx-init"),
    ("--target anime --target cyberpunk", "cyberpunk"),
    ("--target anime --target Anime", "--out"),
    # Weights
    ("$RUN --generator nowhere.pt", "nowhere.pt"),
    ("$RUN --generator ftp://host/a.pt", "https://"),
    ("$RUN --generator=~/nowhere.pt", os.path.expanduser("~/nowhere.pt")),
    ("$RUN --generator nan.pt", "conv1.conv.weight"),
    ("$RUN --generator classes.pkl", "--class-index"),
    ("$RUN --class-index 0", "class"),
    *((f"$RUN --generator {name}", name) for name in ("folder.pt", "half.pt", "clip.pt")),
    *((f"inspect {name}", name) for name in ("empty.pt", "text.pt", "hostile.pkl", "nested.pkl")),
    ("convert nested.pkl copy.pt", "nested.pkl"),
    ("$RUN --generator nested.pkl", "nested.pkl"),
    ("$RUN --clip ViT-B/33", "ViT-B/32"),
    *((f"$RUN --clip {name}", name) for name in ("photo.pt", "text.pt", "hostile.pkl")),
    ("convert photo.pt copy.pkl", "copy.pkl"),
    ("convert photo.pt ./photo.pt", "itself"),
    ("convert photo.pt nowhere/copy.pt", "folder"),
    ("convert photo.pt folder.pt", "folder.pt"),
    ("convert classes.pkl copy.pt", ".safetensors"),
    # Finished runs
    ("sample --run nowhere", "nowhere"),
    ("sample --run stopped", "stopped"),
    ("sample --run finished --n 0", "--n "),
    ("sample --run finished --out grid.jpeg", ".png"),
    ("sample --run finished --out /proc/grid.png", "/proc"),
    ("sample --run finished", "config.json", lambda: os.unlink("finished/config.json")),
    ("sample --run finished", "config.json", put("finished/config.json", "text.pt")),
    ("sample --run finished", "config.json", config(colour="red")),
    ("sample --run finished", "--steps", config(steps="many")),
    ("sample --run finished", "gone.pt", config(generator="gone.pt")),
    ("sample --run finished", "w_dim", put("finished/generator.pt", "w16.pt")),
    ("sample --run finished", "grid.png", full_disk),
    # Folders
    ("$RUN --out finished", "--overwrite"),
    ("$RUN --out stopped", "--resume"),
    ("$RUN --out text.pt", "text.pt"),
    ("$RUN --out /proc/run", "/proc/run"),
    ("$RUN --out elsewhere", "config.json", lambda: os.unlink("elsewhere/generator.pt")),
    ("$RUN --out stopped --resume", "another process", lock),
    ("$RUN --out stopped --resume", "room", full_disk),
    # Resumed runs
    ("$RUN --out stopped --resume --steps 9 --lr 0.1", "--lr 0.002, not 0.1"),
    ("$RUN --out finished --resume --seed 9", "--seed 0, not 9"),
    ("$RUN --out stopped --resume", "SHA-256", put("photo.pt", "other.pt")),
    ("$RUN --out stopped --resume", "damaged", put("stopped/checkpoint.pt", "half.pt")),
    ("$RUN --out stopped --resume", "damaged", put("stopped/checkpoint.pt", "hostile.pkl")),
    ("$RUN --out stopped --resume", "no checkpoint", put("stopped/checkpoint.pt", "photo.pt")),
    ("$RUN --out stopped --resume", "does not fit", checkpoint(lambda _, target: target.popitem())),
    ("$RUN --out stopped --resume", "--device cuda, not cpu",
     checkpoint(lambda settings, _: settings.update(device="cuda"))),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0][:40]!a} {row[1][:10]!a}")
def test_one_line_and_no_file(folder, row):
    command, word, *prepare = row
    folder, contents = folder
    with contextlib.chdir(folder):
        undo = prepare[0]() if prepare else None
        before = snapshot()
        try:
            code, out, err = answer(*shlex.split(command.replace("$RUN", RUN)))
            after = snapshot()
        finally:
            if undo:
                undo()
            for path, data in contents.items():
                if data is not None:
                    path.write_bytes(data)
    assert code == 2, err
    *before_it, error = err.splitlines()  # what a run said before it failed
    assert error.startswith("ipl.py: error: ") and len(error) < 600 and error.isprintable()
    assert not any("rror" in line or "Traceback" in line for line in before_it)
    assert word in error and out == ""
    assert after == before and not MARKER.exists()


@pytest.mark.parametrize(
    "command, meant",
    [
        ("--stepps 3", "--steps"),
        ("--steps many", "--steps"),
        ("--residual gan", "published"),
        ("smaple --run x", "sample"),
        ("sample", "--run"),
    ],
)
def test_words_that_no_command_knows(folder, command, meant):
    """tyro says what is wrong with them."""
    with contextlib.chdir(folder[0]):
        code, out, err = answer(*command.split())
        assert (code, out) == (2, "") and meant in err and snapshot() == folder[1]
