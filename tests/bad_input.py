"""Everything that a user may get wrong, as a table, and what the command line answers.

    python -m tests.bad_input > docs/bad-input.md

A row is (what, command, words, prepare). The command is one for bash, in a folder that has each of
files() and of RUNS that it names; $RUN is a short run of tiny networks. prepare, if any, changes
the folder before, and may return a function to call afterwards. The answer must contain the words.
test_bad_input.py says what else it must be.
"""

import contextlib
import ctypes
import fcntl
import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import typing
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image

import ipl
from checkpoints import save_generator
from cli import run_folder
from stylegan2_ops.generator import Generator

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
RUN = "--generator photo.pt --clip clip.pt --method nada --layers all --steps 2 --batch 1"
RUN += " --samples 1 --device cpu"


class Row(NamedTuple):
    what: str
    command: str
    words: str
    prepare: typing.Callable | None = None


# ----------------------------------------------------------------------------------------------
# Files: name -> bytes, made once


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@functools.cache
def files():
    """{name: bytes, or None for a folder}."""
    photo, clip = ((GOLDEN / f"{x}_tiny.pt").read_bytes() for x in ("rosinality", "clip"))
    state = torch.load(GOLDEN / "rosinality_tiny.pt", weights_only=True)
    state["g_ema"]["conv1.conv.weight"] += 1
    broken = torch.load(GOLDEN / "rosinality_tiny.pt", weights_only=True)
    broken["g_ema"]["conv1.conv.weight"] *= torch.nan
    with tempfile.TemporaryDirectory() as folder:
        w16, safe = Path(folder) / "w16.pt", Path(folder) / "safe.safetensors"
        small = Generator(resolution=32, channels={4: 4, 8: 4, 16: 4, 32: 4}, w_dim=16, n_mlp=2)
        save_generator(small, w16)
        save_generator(small, safe)
        w16, safe = w16.read_bytes(), safe.read_bytes()
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    return {
        "photo.pt": photo,
        "clip.pt": clip,
        "classes.pkl": (GOLDEN / "nvidia_variant_cond.pkl").read_bytes(),
        "resnet.pkl": (GOLDEN / "nvidia_variant_resnet.pkl").read_bytes(),
        "hostile.pkl": (GOLDEN / "nvidia_hostile.pkl").read_bytes(),
        "other.pt": saved(state),
        "nan.pt": saved(broken),
        "w16.pt": w16,
        "folder.pt": None,
        "empty.pt": b"",
        "text.pt": b"These are no weights.\n",
        "picture.pt": png.getvalue(),
        "numbers.pt": saved([1, 2, 3]),
        "half.pt": photo[: len(photo) // 2],
        "half.pkl": (GOLDEN / "nvidia_tiny.pkl").read_bytes()[:200_000],
        "half.safetensors": safe[: len(safe) // 2],
        "half_clip.pt": clip[: len(clip) // 2],
    }


def train(out, *args, stop=None):
    """$RUN into the folder `out`. stop: the function of ipl or run_folder that interrupts it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if stop:
            module, name, count = stop
            function, calls = getattr(module, name), []

            def interrupted(*args, **more):
                calls.append(name)
                if len(calls) > count:
                    raise KeyboardInterrupt
                return function(*args, **more)

            stack.enter_context(mock.patch.object(module, name, interrupted))
            stack.enter_context(contextlib.suppress(SystemExit))
        ipl.main([*RUN.split(), "--save-every", "1", "--out", out, *args])


RUNS = {
    "finished": lambda: train("finished"),
    "stopped": lambda: train("stopped", stop=(ipl, "log_step", 1)),  # after one of two steps
    "trained": lambda: train("trained", stop=(run_folder, "save_run", 0)),  # nothing is written
}


def snapshot(folder):
    """{path of each file and folder: bytes, or None}."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def write(contents):
    for name, data in contents.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if data is None else path.write_bytes(data)


_runs = {}


def make(command):
    """The files and runs that a command names, in the current folder."""
    words = {word.split("/")[0] for word in re.split(r"[\s=;]", command)}
    names = words | {"photo.pt", "clip.pt"} if "$RUN" in command or words & RUNS.keys() else words
    write({name: data for name, data in files().items() if name in names})
    for name in RUNS.keys() & names:
        key = name, os.getcwd()  # a run knows its generator by the full path
        if key not in _runs:
            RUNS[name]()
            _runs[key] = {f"{name}/{x}": data for x, data in snapshot(Path(name)).items()}
        write(_runs[key])


# ----------------------------------------------------------------------------------------------
# Settings: for every field of Config what does not fit its type, and what its range leaves out

HUGE = str(2**31)
OUT_OF_RANGE = {
    "source": ["", "' '"],
    "target": ["", "'  '"],
    "generator": [""],
    "class_index": ["-1"],
    "clip": ["''"],
    "clip_weights": ["0", "-1", "nan", "inf", "'1 2'"],
    "method": [],
    "out": [""],
    "save_every": ["0", "-1", HUGE],
    "seed": ["-1", str(2**63)],
    "device": ["", "warp", "cpu:1", "cuda:99", "cuda:x", "meta"],
    "n_ctx": ["0", "-4", HUGE],
    "ctx_init": [],
    "residual": [],
    "lr_mapper": ["0", "-1", "1e-400"],
    "batch_mapper": ["0", "1", HUGE],
    "steps_mapper": ["0", HUGE],
    "lambda_domain": ["-1", "1e31"],
    "lambda_source": ["-0.5"],
    "lr": ["0", "-0.002", "1e400"],
    "batch": ["0", "-2", HUGE],
    "steps": ["0", "99999999999999999999"],
    "ema": ["1", "-0.1"],
    "eps": ["-0.1", "1e200"],
    "noise": [],
    "crop": ["1", "1.5", "-0.1"],
    "layers": [],
    "num_layers": ["0", "-1"],
    "layer_batch": ["0"],
    "layer_every": ["0", "-5"],
    "layer_lr": ["0", "-1"],
    "freeze": [],
    "truncation_psi": ["1001", "1e39"],
    "samples": ["0", "-1", "10001"],
}


def settings():
    for name, kind in typing.get_type_hints(ipl.Config).items():
        flag, kinds = f"--{name.replace('_', '-')}", {kind, *typing.get_args(kind)}
        wrong = OUT_OF_RANGE.get(name, [])
        for value in wrong:
            words = {"clip": "is neither a file nor"}.get(
                name, flag if name != "device" else "no device"
            )
            yield Row("out of range", f"ipl.py {flag} {value or shlex.quote('')}", words)
        if kind is bool:
            yield Row("a switch with a value", f"ipl.py {flag} yes", "Unrecognized options: yes")
            continue
        if typing.get_origin(kind) is typing.Literal:
            yield Row(
                "no such choice",
                f"ipl.py {flag} gan",
                f"invalid choice 'gan' for argument '{flag}'",
            )
        if int in kinds:
            for value in ("many", "1.5", "1e3", "''"):
                yield Row("no whole number", f"ipl.py {flag} {value}", f"wanted: {flag}")
        if float in kinds:
            yield Row("no number", f"ipl.py {flag} much", f"wanted: {flag}")
            for value in ("nan", "inf") * (name not in ("clip_weights",)):
                yield Row("no number to compute with", f"ipl.py {flag} {value}", f"{flag} must be")
        if typing.get_origin(kind) is not tuple:
            yield Row("no value", f"ipl.py {flag}", f"Missing value for argument '{flag}'")


# ----------------------------------------------------------------------------------------------
# Labels, files, runs


def labels():
    run, long = "ipl.py $RUN --n-ctx 4", "ooh " * 75
    yield Row(
        "not text", "ipl.py --target $'ani\\x07me'", r"--target is 'ani\x07me'; wanted: UTF-8"
    )
    yield Row(
        "not text", "ipl.py --target $'pixel\\nart'", r"--target is 'pixel\nart'; wanted: UTF-8"
    )
    yield Row("not text", "ipl.py --source $'\\xff'", r"--source is '\udcff'; wanted: UTF-8")
    yield Row("not text", "ipl.py --ctx-init $'a\\x1b[2J'", r"--ctx-init is 'a\x1b[2J'; wanted")
    for source, target in (("photo", "photo"), ("photo", "Photo"), ("photo", "' photo '"),
                           ("'pixel art'", "'Pixel  ART'")):  # fmt: skip
        yield Row("equal", f"ipl.py --source {source} --target {target}", "wanted: two domains")
    miniature = "the miniature's CLIP has never read"
    yield Row("unknown to the miniature", "ipl.py --target cyberpunk", f"{miniature} cyberpunk")
    yield Row("unknown to the miniature", "ipl.py --source gorilla", f"{miniature} gorilla")
    yield Row("unknown to the miniature", f"ipl.py --target {'x' * 300}", miniature)
    yield Row("longer than CLIP reads", f"{run} --target '{long}'", "tokens; this CLIP reads 77")
    yield Row("longer than CLIP reads", f"{run} --source '{long}'", "tokens; this CLIP reads 77")
    yield Row("longer than CLIP reads", f"{run} --n-ctx 75", "tokens; this CLIP reads 77")
    yield Row("too long for a template", f"{run} --target '{'ooh ' * 67}'", "shorter labels")
    yield Row(
        "too long with --ctx-init", f"{run} --ctx-init '{long}'", "wanted: shorter labels, or -"
    )
    two = "ipl.py --target anime"
    yield Row("the second is empty", f"{two} --target ''", "--target is empty")
    yield Row("the second is the source", f"{two} --target photo", "wanted: two domains")
    yield Row("the second is unknown", f"{two} --target cyberpunk", f"{miniature} cyberpunk")
    yield Row("the second has no value", f"{two} --target", "Missing value for argument '--target'")
    yield Row(
        "the second is too long", f"{run} --target anime --target '{long}'", "this CLIP reads 77"
    )
    yield Row(
        "the third is the first", f"{two} --target sketch --target Anime", "wanted: other words"
    )
    yield Row(
        "the second run is there",
        "ipl.py $RUN --target anime --target sketch --out runs",
        "runs/photo-to-sketch-nada has a samples.png",
        lambda: write({"runs/photo-to-sketch-nada/samples.png": b"mine"}),
    )


def words():
    yield Row(
        "unknown command", "ipl.py smaple --run x", "no command 'smaple'; wanted: sample, conv"
    )
    yield Row(
        "unknown flag", "ipl.py --stepps 3", "Unrecognized options: --stepps, 3; wanted: --steps"
    )
    yield Row(
        "unknown flag", "ipl.py sample --run x --colour red", "Unrecognized options: --colour"
    )
    yield Row("in a process, UTF-8", "PYTHONIOENCODING=utf-8 ipl.py --steps many", "--steps: ")
    yield Row("a word too many", "ipl.py --target pixel art", "Unrecognized options: art")
    yield Row("two opposites", "ipl.py --resume --overwrite", "wanted: one")
    yield Row("0 / 0 at the first step", "ipl.py --noise fixed --eps 0", "divides 0 by 0")
    yield Row("the same CLIP twice", "ipl.py --clip a b a", "wanted: --clip-weights")
    yield Row("a weight too many", "ipl.py $RUN --clip-weights 1 2", "for each CLIP of --clip")
    yield Row("a weight too few", "ipl.py --clip a b --clip-weights 1", "for each CLIP of --clip")
    yield Row("layers that are not there", "ipl.py $RUN --num-layers 99", "wanted: at most 8")
    yield Row(
        "layers that are not there",
        "ipl.py $RUN --freeze nois3",
        "must fit some of activate.bias, ",
    )
    yield Row("nothing left to train", "ipl.py $RUN --freeze .", "not all")
    yield Row(
        "no class", "ipl.py $RUN --generator classes.pkl", "wanted: a class index (--class-index"
    )
    yield Row(
        "no such class", "ipl.py $RUN --generator classes.pkl --class-index 5", "class 5 of 5"
    )
    yield Row(
        "no classes", "ipl.py $RUN --class-index 0", "class 0 of no classes; wanted: no class"
    )
    for command in ("inspect", "convert", "convert photo.pt", "sample"):
        yield Row("a word too few", f"ipl.py {command}", "Missing from ipl.py")


FOREIGN = {
    "missing": ("nowhere.pt", "wanted: a StyleGAN2 checkpoint"),
    "no name": ("''", "wanted: a StyleGAN2 checkpoint"),
    "a name too long": ("x" * 300, "wanted: a StyleGAN2 checkpoint"),
    "a folder": ("folder.pt", "Is a directory; wanted: a StyleGAN2 checkpoint"),
    "a device": ("/dev/null", "not a regular file"),
    "empty": ("empty.pt", "damaged, it is empty"),
    "cut short": ("half.pt", "damaged, or"),
    "cut short, a pickle": ("half.pkl", "damaged, or"),
    "cut short, safetensors": ("half.safetensors", "damaged, or"),
    "text": ("text.pt", "written by neither pickle nor torch.save"),
    "a picture": ("picture.pt", "written by neither pickle nor torch.save"),
    "something else": ("numbers.pt", 'it has no "g_ema"'),
    "a CLIP": ("clip.pt", "a CLIP, not a generator"),
    "a program": ("hostile.pkl", "hostile.pkl"),
    "another scheme": ("ftp://host/a.pt", "wanted: a StyleGAN2 checkpoint"),
    "a bad digest": ("https://host/a.pt#md5=1", "wanted: #sha256= and 64 hex digits"),
}


def generators():
    for what, (name, said) in FOREIGN.items():
        yield Row(what, f"ipl.py $RUN --generator {name}", said)
        yield Row(what, f"ipl.py inspect {name}", said)
        yield Row(what, f"ipl.py convert {name} copy.pt", said)
    yield Row("not finite", "ipl.py $RUN --generator nan.pt", "not finite: 'conv1.conv.weight'")
    yield Row("no such suffix", "ipl.py convert photo.pt copy.pkl", "wanted: a name in .pt")
    yield Row("no such folder", "ipl.py convert photo.pt a/copy.pt", "in a folder that is there")
    yield Row("onto a folder", "ipl.py convert photo.pt folder.pt", "cannot convert to folder.pt")
    yield Row("onto itself", "ipl.py convert photo.pt photo.pt", "to itself; wanted: another name")
    yield Row(
        "onto itself", "ipl.py convert photo.pt ./photo.pt", "to itself; wanted: another name"
    )
    yield Row("where nobody writes", "ipl.py convert photo.pt /proc/copy.pt", "cannot be written")
    yield Row(
        "without a place there", "ipl.py convert resnet.pkl copy.pt", "wanted: a .safetensors"
    )
    yield Row(
        "without a place there", "ipl.py convert classes.pkl copy.pt", "wanted: a .safetensors"
    )


def clips():
    wanted = "wanted: a file of tensors under OpenAI's key names"
    for what, name, said in (
        ("missing", "nowhere.pt", "is neither a file nor one of RN50"),
        ("no such model", "ViT-B/33", "is neither a file nor one of RN50"),
        ("a folder", "folder.pt", "is neither a file nor one of RN50"),
        ("a name too long", "x" * 300, "x"),
        ("empty", "empty.pt", wanted),
        ("cut short", "half_clip.pt", wanted),
        ("text", "text.pt", wanted),
        ("a picture", "picture.pt", wanted),
        ("something else", "numbers.pt", wanted),
        ("a generator", "photo.pt", wanted),
        ("a generator", "resnet.pkl", wanted),
        ("a program", "hostile.pkl", wanted),
        ("the second is missing", "clip.pt nowhere.pt", "'nowhere.pt' is neither a file nor"),
    ):
        yield Row(what, f"ipl.py $RUN --clip {name}", said)


def config(**changes):
    """-> what changes the config.json of `finished`."""

    def change():
        path = Path("finished/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def samples():
    yield Row("no run", "ipl.py sample --run nowhere", "nowhere is no finished run")
    yield Row("no run", "ipl.py sample --run ''", "is no finished run")
    yield Row("a file", "ipl.py sample --run text.pt", "text.pt is no finished run")
    yield Row("an empty folder", "ipl.py sample --run folder.pt", "is no finished run")
    yield Row("an unfinished run", "ipl.py sample --run stopped", "stopped is no finished run")
    run, file = "ipl.py sample --run finished", Path("finished/config.json")
    for what, said, prepare in (
        ("no config.json", "no config of a run", file.unlink),
        ("config.json is a folder", "no config", lambda: (file.unlink(), file.mkdir())),
        ("config.json is empty", "no config", lambda: file.write_text("")),
        ("config.json is cut short", "no config", lambda: file.write_text(file.read_text()[:99])),
        ("config.json is no text", "no config", lambda: file.write_bytes(b"\xff")),
        ("config.json is a list", "no config of a run", lambda: file.write_text("[]")),
        ("config.json of something else", "no config", config(colour="red")),
        ("config.json with a bad value", "--lr must be above 0", config(lr=0)),
        ("config.json with a bad value", "--source must be str", config(source=5)),
        ("config.json with a bad value", "--steps must be int", config(steps="many")),
        ("config.json with a bad value", "no config of a run", config(clip=None)),
        ("the source generator is gone", "no such file", config(generator="gone.pt")),
        ("the generator is cut short", "damaged",
         lambda: write({"finished/generator.pt": files()["half.pt"]})),
        ("the generator is a CLIP", "a CLIP, not a generator",
         lambda: write({"finished/generator.pt": files()["clip.pt"]})),
        ("the generator has another w_dim", "generator.pt has z_dim 16, w_dim 16 and num_ws 8; wan",
         lambda: write({"finished/generator.pt": files()["w16.pt"]})),
    ):  # fmt: skip
        yield Row(what, run, said, prepare)
    for args, said in (
        ("--n 0", "--n must be at least 1"),
        ("--n 10001", "--n must be at most 10000"),
        ("--n many", "--n"),
        ("--seed -1", "--seed must be 0 or more"),
        ("--truncation-psi nan", "--truncation-psi must be between"),
        ("--device warp", "no device 'warp'"),
        ("--out grid.jpeg", "wanted: a .png file"),
        ("--out finished/config.json/grid.png", "cannot write into"),
        ("--out /proc/grid.png", "cannot write into /proc"),
    ):
        yield Row("asked for", f"{run} {args}", said)
    folder = lambda: write({"grid.png": None})  # noqa: E731
    yield Row("a folder in the way", f"{run} --out grid.png", "wanted: a .png file", folder)


def checkpoint(change):
    """-> what changes the values in the checkpoint of `stopped`."""

    def apply():
        path = Path("stopped/checkpoint.pt")
        kept = torch.load(path, weights_only=True)
        path.write_bytes(saved(change(kept) or kept))

    return apply


def lock():
    folder = os.open("stopped", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    return lambda: os.close(folder)


def folders():
    yield Row(
        "a finished run", "ipl.py $RUN --out finished", "is a finished run; wanted: another --o"
    )
    yield Row(
        "an unfinished run", "ipl.py $RUN --out stopped", "unfinished run; wanted: --resume, "
    )
    yield Row("a file of yours", "ipl.py $RUN --out mine", "mine has a samples.png; wanted: ",
              lambda: write({"mine/samples.png": b"mine"}))  # fmt: skip
    yield Row("a folder in the way", "ipl.py $RUN --out mine --overwrite", "is a folder; wanted: ",
              lambda: write({"mine/samples.png": None}))  # fmt: skip
    yield Row(
        "a file in the way", "ipl.py $RUN --out text.pt", "cannot write into text.pt: File ex"
    )
    yield Row("a file in the way", "ipl.py $RUN --out text.pt/run", "cannot write into text.pt/run")
    yield Row("no place for folders", "ipl.py $RUN --out /proc/run", "cannot write into /proc/run")
    yield Row("a name too long", f"ipl.py $RUN --out {'x' * 300}", "File name too long")
    yield Row("read-only", "chmod 555 folder.pt; ipl.py $RUN --out folder.pt/run",
              "cannot write into folder.pt/run: Permission denied")  # fmt: skip
    yield Row("another process is at work", "ipl.py $RUN --out stopped --resume", "another process",
              lock)  # fmt: skip
    yield Row("full while a checkpoint is written",
              "ulimit -f 200; ipl.py $RUN --out stopped --resume",
              "stopped/checkpoint.pt: cannot be written: File too large; wanted: a ")  # fmt: skip
    yield Row("full while the results are written",
              "ulimit -f 4; ipl.py $RUN --out trained --resume",
              "cannot be written: File too large; wanted: a folder to write in")  # fmt: skip
    yield Row("full while a picture is written", "ulimit -f 4; ipl.py sample --run finished",
              "grid.png: cannot be written: File too large")  # fmt: skip


def resumed():
    for what, args, said in (
        ("other settings", "--steps 9", "was begun with --steps 2, not 9"),
        ("other settings", "--seed 1 --lr 0.1", "--seed 0, not 1; --lr 0.002, not 0.1"),
        ("another label", "--target sketch", "--target anime, not sketch"),
        ("another generator", "--generator other.pt", "was begun with --generator "),
        ("no such generator", "--generator nowhere.pt", "'nowhere.pt': no such file"),
    ):
        yield Row(what, f"ipl.py $RUN --out stopped --resume {args}", said)
    yield Row(
        "other settings", "ipl.py $RUN --out finished --resume --steps 9", "was begun with --ste"
    )
    run, file = "ipl.py $RUN --out stopped --resume", Path("stopped/checkpoint.pt")
    begun = "was begun with SHA-256 of"
    for what, said, prepare in (
        ("the generator's file is another, of another w_dim", begun,
         lambda: write({"photo.pt": files()["w16.pt"]})),
        ("the generator's file has other weights", begun,
         lambda: write({"photo.pt": files()["other.pt"]})),
        ("the generator's file is gone", "'photo.pt': no such file", lambda: os.unlink("photo.pt")),
        ("the CLIP's file is another", begun,
         lambda: write({"clip.pt": files()["clip.pt"] + b" "})),
        ("the checkpoint is empty", "damaged", lambda: file.write_bytes(b"")),
        ("the checkpoint is cut short", "damaged", lambda: os.truncate(file, 20_000)),
        ("the checkpoint is text", "damaged", lambda: file.write_text("hello")),
        ("the checkpoint is a program", "damaged",
         lambda: file.write_bytes(files()["hostile.pkl"])),
        ("the checkpoint is a generator", "no checkpoint of a run",
         lambda: file.write_bytes(files()["photo.pt"])),
        ("the checkpoint is a folder", "is a folder", lambda: (file.unlink(), file.mkdir())),
        ("the checkpoint holds something else", "no checkpoint of a run",
         checkpoint(lambda kept: {"settings": 3, "loops": 4})),
        ("the checkpoint holds something else", "no checkpoint of a run",
         checkpoint(lambda kept: kept | {"loops": [1]})),
        ("the checkpoint lacks the networks", "does not fit this run's networks",
         checkpoint(lambda kept: kept["loops"][0].update(states=[]))),
        ("the checkpoint is of other networks", "does not fit this run's networks",
         checkpoint(lambda kept: kept["loops"][0]["states"][0].popitem() and None)),
        ("the checkpoint is of another device", "device cuda, not cpu",
         checkpoint(lambda kept: kept["settings"].update(device="cuda"))),
    ):  # fmt: skip
        yield Row(what, run, said, prepare)


TABLE = {
    "Settings": list(settings()),
    "Words of the command line, and settings that do not go together": list(words()),
    "Labels": list(labels()),
    "Generators": list(generators()),
    "CLIPs": list(clips()),
    "Samples of a run": list(samples()),
    "Folders": list(folders()),
    "Resumed runs": list(resumed()),
}

# ----------------------------------------------------------------------------------------------
# Running a row


class Answer(NamedTuple):
    code: int
    out: str
    err: str
    before: dict
    after: dict


def obey_permissions():
    """Root may write anywhere; not without this capability, which the next exec takes away."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, 1):  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        raise OSError("cannot drop CAP_DAC_OVERRIDE")


def is_process(row):
    """Whether the row needs a process of its own."""
    return not row.command.startswith("ipl.py")


def as_process(command):
    command = command.replace("ipl.py", shlex.join([sys.executable, str(ROOT / "ipl.py")]))
    done = subprocess.run(
        ["bash", "-c", command.replace("$RUN", RUN)],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        preexec_fn=obey_permissions,
    )
    return done.returncode, *(
        x.decode(errors="backslashreplace") for x in (done.stdout, done.stderr)
    )


def in_process(command):
    line = command.removeprefix("ipl.py").replace("$RUN", RUN)
    argv = shlex.split(line)
    if "$'" in line:  # which only bash can read
        done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True)
        argv = [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with warnings.catch_warnings():
            try:
                ipl.main(argv)
            except SystemExit as exit_:
                code = exit_.code
    return code, out.getvalue(), err.getvalue()


def answer(row, folder):
    """What a row's command says and does in `folder`, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with contextlib.chdir(folder):
        make(row.command)
        undo = row.prepare and row.prepare()
        before = snapshot(folder)
        code, out, err = (as_process if is_process(row) else in_process)(row.command)
        after = snapshot(folder)
        if callable(undo):
            undo()
    return Answer(code, out, err, before, after)


# ----------------------------------------------------------------------------------------------
# The page


def line_of(row, err, folder):
    """A row of the page's tables."""
    said = err.strip().removeprefix("ipl.py: error: ").replace(f"{folder}/", "")
    said = re.sub(r"\b[0-9a-f]{16}\b", "...", said)
    command = re.sub("ipl.py", "python ipl.py", row.command, count=1)
    command = re.sub(r"(ooh ){9,}", "ooh ooh ... ", command)
    command, said = (re.sub(r"x{99,}", "xxx...xxx", x) for x in (command, said))
    command, said = (x.replace("|", r"\|").replace("``", "` `") for x in (command, said))
    return f"| {row.what} | `{command}` | {said.replace('<', '&lt;').replace('*', '&#42;')} |\n"


INTRO = f"""# Bad input

What people get wrong, and what is said to that. Each answer is one line on stderr, behind
`ipl.py: error: `; the exit code is 2, nothing is on stdout, and the folder is byte for byte as it
was before (one exception: results that are whole when the disk is full stay). Made by
`python -m tests.bad_input > docs/bad-input.md`; `tests/test_bad_input.py` holds every row to it.

The commands are for bash. `$RUN` stands for a short run of tiny networks:
`{RUN}`
"""


def page(lines):
    """lines: {(section, number of the row): its line}."""
    text = INTRO
    for section in TABLE:
        text += f"\n## {section}\n\n| what | command | answer |\n| --- | --- | --- |\n"
        text += "".join(line for (name, _), line in lines.items() if name == section)
    return text


def main():
    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve() / "here"
        for section, rows in TABLE.items():
            for i, row in enumerate(rows):
                lines[section, i] = line_of(row, answer(row, folder).err, folder)
    print(page(lines), end="")


if __name__ == "__main__":
    main()
