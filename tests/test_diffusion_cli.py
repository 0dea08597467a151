"""The command line with a diffusion model for a generator: runs, resuming, files, bad input."""

import contextlib
import json
import shlex
import shutil

import pytest
import torch
from command import answer, done, history_of, names, stopping
from conftest import GOLDEN, rng
from PIL import Image
from safetensors.torch import load_file

from checkpoints import CheckpointError
from checkpoints.diffusion import is_diffusion, load_unet, save_unet
from cli import diffusion
from cli.settings import DIFFUSIONCLIP, MINIATURE_DDPM, parse
from diffusion import UNet
from diffusion.unet import config_of

SHORT = (
    "--bank 5 --batch-mapper 4 --steps-mapper 2 --batch 2 --steps 3 --samples 2 --t0 300 "
    "--inversion-steps 4 --synthesis-steps 3 --picture-steps 4 --side 16 --ema 0.5"
)
FILES = {*"config.json curves.png generator.safetensors history.jsonl samples.png".split()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DDPM in its layout, pictures of any size, a CLIP; and what is none."""
    folder = tmp_path_factory.mktemp("diffusion")
    golden = torch.load(GOLDEN / "diffusion_models.pt", weights_only=True)
    torch.save(golden["state_dict"], folder / "ddpm.ckpt")
    torch.save(golden["improved"]["state_dict"], folder / "guided.pt")
    shutil.copy(GOLDEN / "clip_tiny.pt", folder / "clip.pt")
    shutil.copy(GOLDEN / "rosinality_tiny.pt", folder / "photo.pt")
    (folder / "pictures").mkdir()
    for i in range(6):
        pixels = torch.randint(256, (20 + i, 24, 3), generator=rng(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{i}.png")
    (folder / "pictures" / "notes.txt").write_text("no picture")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"\x89PNG, and no more")
    return folder


def run(*words):
    start = f"--generator ddpm.ckpt --images pictures --clip clip.pt {SHORT}"
    return done(*shlex.split(start), *words)


@pytest.fixture(scope="module")
def finished(folder):
    with contextlib.chdir(folder):
        run("--out", "finished")
    return folder / "finished"


def same(a, b):
    assert history_of(a) == history_of(b)
    a, b = (load_file(x / "generator.safetensors") for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_run_and_its_files(finished, folder):
    assert names(finished) == FILES | {"mapper.safetensors"}
    assert [(x["stage"], x["step"]) for x in history_of(finished)] == [
        (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)
    ]  # fmt: skip
    unet, _ = load_unet(finished / "generator.safetensors")
    start, _ = load_unet(folder / "ddpm.ckpt", side=16)
    assert unet.config == start.config
    assert not torch.equal(unet.conv_out.weight, start.conv_out.weight)
    mapper = load_file(finished / "mapper.safetensors")
    assert mapper["weights.0"].shape[1] == 32  # the bottleneck's width, and not that of pictures


def test_metrics_of_a_run(finished, folder):
    """Of the inverted pictures, whose reconstructions are the source's row."""
    words = ["--run", "finished", "--n", "3", "--out", "metrics.json", "--real", "pictures"]
    with contextlib.chdir(folder):
        table = done("metrics", *words)
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        (folder / "metrics.json").unlink()
    assert "N 3, seed 1" in table and [x["name"] for x in rows] == ["source", "finished"]
    assert rows[0]["psnr"] == "inf" and 0 < rows[1]["psnr"] < 60 and rows[1]["frechet-clip"] > 0


def test_defaults_are_those_of_the_generator(folder):
    with contextlib.chdir(folder):
        for name, preset in (("ddpm.ckpt", DIFFUSIONCLIP), ("miniature-ddpm", MINIATURE_DDPM)):
            for words in (["--generator", name], [f"--generator={name}"]):
                (settings,) = parse(words)
                assert settings.lr == preset.lr and settings.bank == preset.bank
        words = ["--generator", "ddpm.ckpt", "--clip", "a", "b"]  # each has the preset's weight
        assert parse(words)[0].clip_weights == 2 * DIFFUSIONCLIP.clip_weights
        assert parse([*words, "--clip-weights", "3"])[0].clip_weights == (3.0,)  # as it was given


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_stopped_and_resumed_to_the_same_bits(folder, finished, tmp_path, step):
    """In the inversion (one step), in stage 1 (two) and in stage 2 (three)."""
    with contextlib.chdir(folder):
        words = [*shlex.split(f"--generator ddpm.ckpt --images pictures --clip clip.pt {SHORT}")]
        words += ["--save-every", "1", "--out", tmp_path / "run"]
        with stopping(step):
            assert answer(*words)[0] == 130
        done(*words, "--resume")
    same(tmp_path / "run", finished)


def test_other_pictures_are_another_run(folder, tmp_path):
    with contextlib.chdir(folder):
        shutil.copytree("pictures", tmp_path / "mine")
        words = shlex.split(f"--generator ddpm.ckpt --clip clip.pt {SHORT} --save-every 1")
        words += ["--images", tmp_path / "mine", "--out", tmp_path / "run"]
        with stopping(2):
            answer(*words)
        shutil.copy("pictures/1.png", tmp_path / "mine" / "0.png")
        code, _, err = answer(*words, "--resume")
    assert code == 2 and "SHA-256" in err


def test_sample_of_other_pictures(folder, finished, tmp_path):
    with contextlib.chdir(folder):
        out = tmp_path / "grid.png"
        done("sample", "--run", finished, "--images", "pictures", "--n", "3", "--out", out)
    with Image.open(out) as image:
        assert image.height > 3 * 128 and image.width > 3 * 128


def test_what_needs_latents_of_a_gan_is_refused(folder, finished, tmp_path):
    with contextlib.chdir(folder):
        for words in ("sample --seeds 0-3", "sample --outdir singly", "video --output new.gif"):
            code, out, err = answer(*words.split(), "--run", finished)
            assert code == 2 and out == "" and err.count("\n") == 1 and "diffusion model" in err
            assert not {"grid.png", "singly", "new.gif"} & names(folder)


def test_inspect_and_convert(folder, finished, tmp_path):
    with contextlib.chdir(folder):
        said = done("inspect", "ddpm.ckpt")
        assert "DDPM's" in said and "epsilon" in said and "linear, beta 0.0001 to 0.02" in said
        done("convert", finished / "generator.safetensors", tmp_path / "folder")
        done("convert", tmp_path / "folder", tmp_path / "again.safetensors")
        assert "diffusers'" in done("inspect", tmp_path / "folder")
    a, b = (
        load_file(x) for x in (finished / "generator.safetensors", tmp_path / "again.safetensors")
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert is_diffusion(tmp_path / "folder") and not is_diffusion(folder / "photo.pt")


def test_pictures_are_cropped_to_their_middle(tmp_path):
    pixels = torch.zeros(10, 30, 3, dtype=torch.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels.numpy()).save(tmp_path / "wide.png")
    picture, note = diffusion.read_picture(tmp_path / "wide.png", 10)
    assert (picture == 1).all() and note == ""


# ----------------------------------------------------------------------------------------------
# Bad input

RUN = f"--generator ddpm.ckpt --images pictures --clip clip.pt {SHORT} --out bad"
ROWS = [  # a command, a word of the answer
    (RUN.replace("--images pictures", ""), "--images"), (f"{RUN} --images nowhere", "nowhere"),
    (f"{RUN} --images empty", "no picture"), (f"{RUN} --images broken", "a.png"),
    (f"{RUN} --t0 1000", "--t0"), (f"{RUN} --synthesis-steps 1", "--synthesis-steps"),
    (f"{RUN} --side 17", "17 pixels"), (f"{RUN} --betas 0.9 1", "--betas"),
    (f"{RUN} --growth 1.3 0", "--growth"), (f"{RUN} --generator empty", "empty folder"),
    (f"{RUN} --generator photo.pt --side 64", "--images"), (f"{RUN} --bank 3", "--bank"),
    ("convert ddpm.ckpt copy.pt", ".safetensors"), ("convert ddpm.ckpt pictures", "new folder"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_one_line(folder, row):
    with contextlib.chdir(folder):
        code, out, err = answer(*shlex.split(row[0]))
    assert code == 2 and out == "" and row[1] in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("ipl.py: error: ") and "Traceback" not in err
    assert not (folder / "bad").exists()


CONFIG = config_of(16, (8, 16), (False, True), layers_per_block=1, norm_num_groups=4)
CHANGES = [  # what is changed in config.json or scheduler_config.json, a word of the answer
    ({"prediction_type": "v_prediction"}, "v_prediction"), ({"beta_schedule": "cosine"}, "linear"),
    ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    ({"in_channels": 4}, "latents"), ({"sample_size": 15}, "sample_size"),
    ({"num_class_embeds": 10}, "class-conditional"), ({"act_fn": "relu"}, "act_fn"),
    ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "SkipDownBlock2D"),
    ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
    ({"block_out_channels": [8, 32]}, "not ("), ({"layers_per_block": 2}, "lacks"),
    ({"norm_eps": "small"}, "norm_eps"), ({"block_out_channels": None}, "block_out_channels"),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda x: x[1])
def test_every_mismatch_is_named(tmp_path, change):
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    save_unet(unet.config, unet.state_dict(), tmp_path / "m")
    for name in ("config.json", "scheduler_config.json"):
        path = tmp_path / "m" / name
        found = json.loads(path.read_text())
        known = {k: x for k, x in change[0].items() if k in found or name == "config.json"}
        path.write_text(json.dumps(found | known))
    with pytest.raises(CheckpointError) as error:
        load_unet(tmp_path / "m")
    message = str(error.value)
    assert change[1] in message and "\n" not in message and len(message) < 500


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    save_unet(CONFIG, {}, tmp_path / "none")
    (tmp_path / "bin").mkdir()
    for name in ("config.json", "scheduler_config.json"):
        shutil.copy(tmp_path / "none" / name, tmp_path / "bin" / name)
    (tmp_path / "bin" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    shutil.copytree(tmp_path / "bin", tmp_path / "cut")
    (tmp_path / "cut" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    shutil.copytree(tmp_path / "none", tmp_path / "latent")
    (tmp_path / "latent" / "vae").mkdir()
    shutil.copytree(tmp_path / "none", tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text("no JSON")
    (tmp_path / "hostile").mkdir()
    half = (folder / "ddpm.ckpt").read_bytes()[:50_000]
    (tmp_path / "half.ckpt").write_bytes(half)
    torch.save({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "sd.ckpt")
    state = torch.load(folder / "ddpm.ckpt", weights_only=True)
    del state["norm_out.weight"]
    torch.save(state, tmp_path / "lacks.ckpt")
    guided = torch.load(folder / "guided.pt", weights_only=True)
    torch.save(guided | {"label_emb.weight": torch.zeros(1)}, tmp_path / "classes.pt")
    for name, word in (
        ("none", "lacks"), ("bin", "diffusion_pytorch_model.bin"), ("cut", "damaged"),
        ("latent", "vae"), ("text", "config.json"), ("hostile", "empty folder"),
        ("half.ckpt", "damaged"), ("sd.ckpt", "Stable Diffusion"), ("lacks.ckpt", "conv_norm_out"),
        ("classes.pt", "class-conditional"), ("nowhere.ckpt", "No such file"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=word) as error:
            load_unet(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
