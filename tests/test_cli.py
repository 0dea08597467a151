"""Sections 9 and 10: the command line, with the golden files as small weights."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import ipl
from checkpoints import load_generator
from cli import processes

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
WORLD = ["--generator", str(GOLDEN / "rosinality_tiny.pt"), "--clip", str(GOLDEN / "clip_tiny.pt")]
pytestmark = pytest.mark.filterwarnings("ignore:stage 1 learned little")
SHORT = "--steps-mapper 2 --batch-mapper 4 --steps 2 --layer-batch 2 --samples 3".split()


def picture(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def call(folder, *args):
    """The script in a process of its own, started from another folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "ipl.py"), *args],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, its finished run, what the process said)."""
    folder = tmp_path_factory.mktemp("cli")
    done = call(folder, "--source", "photo", "--target", "anime", *WORLD, *SHORT)
    assert done.returncode == 0, done.stderr
    return folder, folder / "runs" / "photo-to-anime", done


def test_run_folder(finished):
    _, run, _ = finished
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "curves.png",
        "generator.pt",
        "history.jsonl",
        "mapper.safetensors",
        "samples.png",
    ]
    cfg = ipl.Config(**json.loads((run / "config.json").read_text()))
    assert (cfg.target, cfg.steps, cfg.residual, cfg.eps) == ("anime", 2, "published", 0.0)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in history] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert picture(run / "samples.png").size == (3 * 128, 2 * 128)
    assert picture(run / "curves.png").width > 1000


def test_run_says_where_the_picture_is_and_how_to_go_on(finished):
    _, _, done = finished
    assert done.stdout.startswith(f"{Path('runs/photo-to-anime/samples.png')}: photo above, anime")
    for words in ("stage 1", "stage 2", "ipl.py sample --run", "--method nada", "--clip ViT-B/32"):
        assert words in done.stdout
    (line,) = done.stderr.splitlines()  # no bar: no terminal. CLIP's weights are random
    assert line.startswith("ipl.py: warning: stage 1 learned little: ") and "of 4 images" in line


def test_saved_networks_open(finished):
    from safetensors.torch import load_file

    _, run, _ = finished
    source, adapted = (load_generator(p) for p in (WORLD[1], run / "generator.pt"))
    assert any(
        not torch.equal(p, q)
        for p, q in zip(source.parameters(), adapted.parameters(), strict=True)
    )
    torch.testing.assert_close(source.w_avg, adapted.w_avg)
    mapper = ipl.LatentMapper(32, 4, 64)
    mapper.load_state_dict(load_file(run / "mapper.safetensors"))


def test_sample_as_a_process(finished):
    folder, run, _ = finished
    done = call(folder, *f"sample --run {run} --n 10 --seed 1 --out grid.png".split())
    assert (done.returncode, done.stderr) == (0, "")
    assert picture(folder / "grid.png").size == (8 * 128, 4 * 128)  # 8 pairs, then 2


def test_samples_of_a_seed(finished, tmp_path):
    _, run, _ = finished

    def draw(name, *args):
        ipl.main(["sample", "--run", str(run), "--out", str(tmp_path / f"{name}.png"), *args])
        return picture(tmp_path / f"{name}.png")

    two, five = draw("two", "--n", "2"), draw("five", "--n", "5")
    assert five.crop((0, 0, *two.size)).tobytes() == two.tobytes()
    again = draw("again", "--n", "2", "--seed", "1")
    other = draw("other", "--n", "2", "--seed", "2")
    wild = draw("wild", "--n", "2", "--truncation-psi", "1.5")
    assert again.tobytes() == two.tobytes() != other.tobytes()
    assert wild.tobytes() != two.tobytes()


def test_nada_has_no_mapper_and_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ipl.main([*WORLD, *SHORT, "--target", "Disney", "--method", "nada"])
    run = tmp_path / "runs" / "photo-to-disney-nada"
    assert (run / "generator.pt").exists() and not (run / "mapper.safetensors").exists()
    assert "samples.png" in capsys.readouterr().out


def test_overwrite_replaces_the_whole_run(finished, tmp_path, capsys):
    _, run, _ = finished
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "notes.txt").write_text("mine")
    ipl.main([*WORLD, *SHORT, "--method", "nada", "--out", str(out), "--overwrite"])
    assert not (out / "mapper.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["method"] == "nada"
    assert (out / "notes.txt").read_text() == "mine"


# ----------------------------------------------------------------------------------------------
# Other generators, several CLIPs


def test_a_pickle_of_nvidia_through_both_stages(tmp_path, capsys):
    path, out = GOLDEN / "nvidia_tiny.pkl", tmp_path / "run"
    ipl.main(["--generator", str(path), *WORLD[2:], *SHORT, "--out", str(out)])
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in history] == [1, 1, 2, 2]
    saved = torch.load(out / "generator.pt", weights_only=True)
    golden = torch.load(GOLDEN / "nvidia_tiny_as_rosinality.pt", weights_only=True)
    assert saved["g_ema"].keys() == golden["g_ema"].keys()
    ipl.main(["sample", "--run", str(out), "--n", "1", "--out", str(tmp_path / "one.png")])
    assert picture(tmp_path / "one.png").size == (128, 256)


def test_a_conditional_generator_draws_the_class_that_is_asked_for(tmp_path, capsys):
    world = ["--generator", str(GOLDEN / "nvidia_variant_cond.pkl"), *WORLD[2:], *SHORT]
    words = refused(capsys, *world, "--out", str(tmp_path / "run"))
    assert "class None of 5 classes; wanted: a class index (--class-index) from 0 to 4" in words
    assert not (tmp_path / "run").exists()

    pictures = []
    for index in "13":
        out = tmp_path / index
        ipl.main([*world, "--method", "nada", "--class-index", index, "--out", str(out)])
        assert load_generator(out / "generator.safetensors").class_index == int(index)
        assert not (out / "generator.pt").exists()  # rosinality's layout has no classes
        ipl.main(["inspect", str(out / "generator.safetensors")])
        assert f"classes         5, of which it draws {index}" in capsys.readouterr().out
        drawn = tmp_path / f"{index}.png"
        ipl.main(["sample", "--run", str(out), "--n", "2", "--out", str(drawn)])
        pictures.append(picture(drawn).tobytes())
    capsys.readouterr()
    assert pictures[0] != pictures[1]
    assert "is a finished run" in refused(capsys, *WORLD, *SHORT, "--out", str(out))
    ipl.main([*WORLD, *SHORT, "--method", "nada", "--out", str(out), "--overwrite"])
    assert (out / "generator.pt").exists() and not (out / "generator.safetensors").exists()


def test_several_clips(tmp_path, capsys):
    from safetensors.torch import load_file

    other = torch.load(WORLD[3], weights_only=True)
    other["visual.proj"] = -other["visual.proj"]
    torch.save(other, tmp_path / "other.pt")
    out, clips = tmp_path / "run", [WORLD[3], str(tmp_path / "other.pt")]
    weights = ["--clip-weights", "1", "0.5"]
    ipl.main([*WORLD[:2], *SHORT, "--clip", *clips, *weights, "--out", str(out)])
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    found = [(row["stage"], row["step"], row.get("clip")) for row in history]
    assert found[:4] == [(1, step, name) for name in clips for step in (0, 1)]
    assert found[4:] == [(2, 0, None), (2, 1, None)]
    assert json.loads((out / "config.json").read_text())["clip"] == clips
    saved = load_file(out / "mapper.safetensors")
    for i in "01":
        state = {name[2:]: x for name, x in saved.items() if name.startswith(f"{i}.")}
        ipl.LatentMapper(32, 4, 64).load_state_dict(state)
    ipl.main(["sample", "--run", str(out), "--n", "1", "--out", str(tmp_path / "one.png")])


def test_convert_and_inspect(tmp_path, capsys):
    """Each golden file there and back, and the facts that the golden images depend on."""
    expected = {
        "rosinality_tiny.pt": ("rosinality's", 32, "w_dim    32, 32", "float16         none"),
        "nvidia_tiny.pkl": ("NVIDIA's", 32, "training state  training_set_kwargs, G, D, augment"),
        "nvidia_variant_clamp.pkl": ("NVIDIA's", 16, "conv_clamp      1.25", "float16         2 h"),
        "nvidia_variant_cond.pkl": ("NVIDIA's", 16, "classes         5, --class-index chooses"),
        "nvidia_variant_resnet.pkl": ("NVIDIA's", 16, "architecture    resnet", "1 to RGB"),
    }
    for name, (layout, resolution, *facts) in expected.items():
        suffix = ".safetensors" if "cond" in name or "resnet" in name else ".pt"
        ipl.main(["inspect", str(GOLDEN / name)])
        said = capsys.readouterr().out
        num_ws = 2 * resolution.bit_length() - 4
        for fact in (f"layout          {layout}\n", f"resolution      {resolution}\n",
                     f"num_ws          {num_ws}\n", *facts):  # fmt: skip
            assert fact in said
        copy = tmp_path / f"copy{suffix}"
        ipl.main(["convert", str(GOLDEN / name), str(copy)])
        assert str(copy) in capsys.readouterr().out
        index = 0 if "cond" in name else None
        a, b = (load_generator(path, class_index=index) for path in (GOLDEN / name, copy))
        assert a.config == b.config and torch.equal(a.w_avg, b.w_avg)
        assert all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())
        ipl.main(["inspect", str(copy)])
        again = capsys.readouterr().out.splitlines()
        assert set(again) >= {line for line in said.splitlines() if "layout" not in line
                              and "training state" not in line}  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["nvidia_hostile", "nvidia_hostile_nested"])
def test_hostile_files_run_nothing_whatever_the_command(tmp_path, capsys, name):
    path, marker = GOLDEN / f"{name}.pkl", Path(tempfile.gettempdir()) / "pwned_by_pickle"
    marker.unlink(missing_ok=True)
    for args in (
        ["--generator", str(path), *WORLD[2:], *SHORT, "--out", str(tmp_path / "run")],
        ["inspect", str(path)],
        ["convert", str(path), str(tmp_path / "copy.pt")],
        ["--clip", str(path), *WORLD[:2], *SHORT, "--out", str(tmp_path / "run")],
    ):
        assert str(path) in refused(capsys, *args)
    assert not marker.exists() and not list(tmp_path.iterdir())


def test_convert_to_itself_would_lose_the_training_state(tmp_path, capsys):
    path = tmp_path / "network.pt"
    shutil.copy(WORLD[1], path)
    before = path.read_bytes()
    (tmp_path / "link.pt").symlink_to(path)
    for target in (path, tmp_path / "link.pt"):
        assert "to itself" in refused(capsys, "convert", str(path), str(target))
    (tmp_path / "folder.pt").mkdir()
    assert "cannot conv" in refused(capsys, "convert", str(path), str(tmp_path / "folder.pt"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_help_of_commands_speaks_to_users(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        ipl.main([command, "--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and "Checkpoint, a file or a URL." in said
    assert "Raises" not in said and "Error" not in said


# ----------------------------------------------------------------------------------------------
# Runs that go wrong; bad input is in test_bad_input.py


def refused(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        ipl.main(list(args))
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("ipl.py: error: ") and said.err.count("\n") == 1
    return said.err


def test_a_run_that_diverges_says_so_and_spoils_nothing(finished, capsys):
    _, run, _ = finished
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    args = "--lr 1e20 --method nada --noise fixed --eps 0.1 --layers all --steps 5".split()
    with pytest.raises(SystemExit) as exit_:
        ipl.main([*WORLD, *SHORT, *args, "--out", str(run), "--overwrite"])
    words = capsys.readouterr().err
    assert exit_.value.code == 1 and words.startswith("ipl.py: error: stage 2, step 1: ")
    assert "wanted: a smaller rate (--lr)" in words and words.count("\n") == 1
    kept = torch.load(run / "checkpoint.pt", weights_only=True)["loops"]
    assert [loop["step"] for loop in kept] == [1]
    assert all(x.isfinite().all() for x in kept[0]["states"][0].values())
    (run / "checkpoint.pt").unlink()
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_main_job_on_the_miniature(tmp_path):
    short = "--steps 1 --steps-mapper 1 --batch-mapper 4 --samples 2".split()
    done = call(tmp_path, "--source", "photo", "--target", "anime", *short)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "photo-to-anime"
    assert json.loads((run / "config.json").read_text())["residual"] == "none"
    assert picture(run / "samples.png").size == (2 * 128, 2 * 128)
    done = call(tmp_path, "sample", "--run", str(run), "--n", "1", "--out", "one.png")
    assert done.returncode == 0, done.stderr
    done = call(tmp_path, "--target", "anime cyberpunk")
    assert done.returncode == 2 and "has never read cyberpunk" in done.stderr


def test_a_run_opens_from_another_folder(tmp_path, monkeypatch):
    shutil.copy(GOLDEN / "rosinality_tiny.pt", tmp_path / "g.pt")
    shutil.copy(GOLDEN / "clip_tiny.pt", tmp_path / "c.pt")
    monkeypatch.chdir(tmp_path)
    ipl.main(["--generator", "g.pt", "--clip", "c.pt", *SHORT, "--method", "nada", "--out", "run"])
    monkeypatch.chdir("/")
    ipl.main(["sample", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "grid.png")])


# ----------------------------------------------------------------------------------------------
# Defaults


def test_without_a_generator_the_miniature_values_are_the_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr(ipl, "adapt", seen.append)
    ipl.main([])
    ipl.main(["--steps", "7"])
    ipl.main(["--generator", "x.pt"])
    ipl.main(["--generator", "x.pt", "--eps", "0.2"])
    assert seen[0] == ipl.MINIATURE
    assert seen[1] == replace(ipl.MINIATURE, steps=7)
    assert seen[2] == ipl.Config(generator="x.pt")
    assert seen[3] == ipl.Config(generator="x.pt", eps=0.2)


def test_published_defaults():
    cfg = ipl.Config()
    assert (cfg.n_ctx, cfg.ctx_init, cfg.residual) == (4, "a photo of a", "published")
    assert (cfg.lambda_domain, cfg.lambda_source) == (1, 0)
    assert (cfg.lr_mapper, cfg.batch_mapper, cfg.steps_mapper) == (0.05, 32, 300)
    assert (cfg.lr, cfg.batch, cfg.steps, cfg.ema) == (0.002, 2, 300, 0.99)
    assert (cfg.layer_batch, cfg.layer_lr, cfg.num_layers) == (8, 0.01, None)
    assert (cfg.eps, cfg.noise, cfg.crop, cfg.layers, cfg.freeze) == (0, "fresh", 0, "adaptive", "")
    assert cfg.truncation_psi == 0.7


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        ipl.main(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for name in ipl.asdict(ipl.Config()):
        assert f"--{name.replace('_', '-')}" in said


# ----------------------------------------------------------------------------------------------
# Memory


FAULTS = """
import resource, sys, torch
from cli.processes import keep_memory

keep_memory(sys.argv[1] == "keep")
counts = []
for _ in range(20):
    torch.ones(2**24)  # 64 MB
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[-1] - counts[9])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_large_tensors_get_the_memory_of_those_before():
    """By the pages that the system had to clear for the last ten of twenty."""
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, way],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for way in ("keep", "give back")
    )
    assert 10 * kept < given_back


def test_a_run_keeps_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(processes, "keep_memory", lambda: calls.append(True))
    processes.make_all([], None)
    assert calls == [True]
