"""What users of other programs of this field have reported. Each address is of such a report."""

import errno
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from command import GOLDEN, NADA, WORLD, answer, done, names
from conftest import refusal
from PIL import Image, ImageCms, PngImagePlugin

import cli
from checkpoints import load_generator
from checkpoints.clip import read_clip
from checkpoints.files import write_atomically
from checkpoints.images import picture_paths, read_image
from cli import (
    adapt,
    air,
    diffusion,
    few_shot,
    messages,
    metrics,
    processes,
    report,
    resume,
    video,
)
from cli.edit import names_of, read_w
from cli.run_folder import read_config
from cli.settings import Settings

ONE = *WORLD, *NADA
RGB = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported") / "run"
    done(*ONE, "--out", folder)
    return folder


def one_line(*words):
    """What is refused, in a line."""
    code, out, err = answer(*words)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("ipl.py: error: "), err
    return err


# ----------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def pictures(tmp_path):
    """A folder that a Mac and a phone have been at: OpenNeuroOrg/openneuro#2520,
    Abe404/root_painter#173, bghira/SimpleTuner#94, regosen/gallery_get#76."""
    folder = tmp_path / "pictures"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("0.png", "1.JPG", "2.jfif", ".ipynb_checkpoints/0-checkpoint.png"):
        RGB.save(folder / name, "png")
    (folder / "._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    return folder


def test_hidden_files_are_no_pictures(pictures):
    assert [x.name for x in picture_paths(pictures)] == ["0.png", "1.JPG", "2.jfif"]
    assert len(diffusion.read_pictures("--images", pictures, 8)) == 3
    with pytest.warns(UserWarning, match="lossy"):
        assert len(metrics.pictures_in(pictures, 9)) == 3
    with pytest.raises(ValueError, match="3 pictures, not 4"):
        few_shot.choose(few_shot.Settings(images=str(pictures), shots=4))


def test_hidden_files_make_no_other_run(pictures):
    before = resume.sha256(pictures)
    (pictures / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (pictures / ".ipynb_checkpoints" / "1-checkpoint.png").touch()
    assert resume.sha256(pictures) == before
    (pictures / "3.png").touch()
    assert resume.sha256(pictures) != before


def test_pictures_that_are_passed_over_are_told(pictures):
    (pictures / "IMG_1.HEIC").touch()
    with pytest.warns(UserWarning, match="passed over 1 pictures such as IMG_1.HEIC; wanted: PNG"):
        assert len(picture_paths(pictures)) == 3


def test_a_picture_whose_notes_are_odd_is_whole(tmp_path):
    """python-pillow/Pillow#8348, #8605 and #8363: EXIF that is damaged, a long text."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    RGB.save(tmp_path / "text.png", pnginfo=text)
    RGB.save(tmp_path / "exif.png", exif=b"garbage!")
    RGB.save(tmp_path / "exif.webp", exif=b"Exif\0\0garb", lossless=True)
    for name, word in (("text.png", ""), ("exif.png", "EXIF"), ("exif.webp", "EXIF")):
        pixels, note = read_image(tmp_path / name)
        assert (pixels.permute(1, 2, 0).numpy() == np.asarray(RGB)).all() and word in note
    (tmp_path / "cut.png").write_bytes((tmp_path / "exif.png").read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged"):
        read_image(tmp_path / "cut.png")


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif"])
@pytest.mark.parametrize("more", ["", "A"])
def test_colors_of_another_profile_become_srgb(tmp_path, name, more):
    """cgwire/zou#1188, OpenDisplay/Home_Assistant_Integration#73. Here red and blue are swapped."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = data.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    other = other.replace("sRGB".encode("utf-16-be"), "Test".encode("utf-16-be"))
    image = Image.new(f"RGB{more}", (40, 40), (255, 0, 0, 128)[: 3 + len(more)])
    white = 127 * len(more)  # what shines through
    for profile, pixel in ((data, (255, white, white)), (other, (white, white, 255))):
        image.save(tmp_path / name, icc_profile=profile, lossless=True)
        pixels, note = read_image(tmp_path / name)
        assert pixels[:, 9, 9].tolist() == pytest.approx(pixel, abs=3)
        assert ("the colors of Test built-in turned to sRGB" in note) == (profile == other)


def test_a_color_that_stands_for_nothing_stays_so_in_another_profile(tmp_path):
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace("sRGB".encode("utf-16-be"), "Test".encode("utf-16-be"))
    image = Image.new("RGB", (40, 40), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 40))
    for name, more in (("key.png", {"transparency": (0, 0, 255)}), ("palette.png", {})):
        kept = image if more else image.quantize(4)
        kept.save(tmp_path / name, icc_profile=data, **more)
        pixels, note = read_image(tmp_path / name)
        right = [255, 255, 255] if more else [0, 0, 255]
        assert pixels[:, 9, 9].tolist() == pytest.approx([255, 0, 0], abs=3)
        assert pixels[:, 9, 30].tolist() == pytest.approx(right, abs=3)
        assert "turned to sRGB" in note


def test_a_picture_that_is_too_large_is_told(tmp_path, monkeypatch):
    """scalableminds/webknossos-libs#892."""
    RGB.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="1600 pixels.* exceeds limit of 200 pixels"):
        read_image(tmp_path / "large.png")


def test_pointers_and_pages_instead_of_files(tmp_path):
    """vllm-project/vllm#1382, git-lfs/git-lfs#4366."""
    path, generator = tmp_path / "x.pt", load_generator(WORLD[1])
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for load in (load_generator, read_clip, lambda path: read_w(path, generator)):
        assert refusal(load, path) == "a pointer of Git LFS, not the file; wanted: git lfs pull"
    path.write_text("\n<!DOCTYPE html><title>Google Drive - Virus scan warning</title>")
    assert "damaged, or a web page" in refusal(load_generator, path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_that_was_saved_under_windows(run, tmp_path, encoding):
    """volcengine/OpenViking#500, microsoft/playwright#39420: a byte order mark."""
    copy = shutil.copytree(run, tmp_path / "copy")
    words = (copy / "config.json").read_text().replace("\n", "\r\n")
    (copy / "config.json").write_bytes(words.encode(encoding))
    assert read_config(copy) == read_config(run)
    (copy / "config.json").write_bytes(words[:-9].encode(encoding))
    assert "config.json" in one_line("sample", "--run", copy)
    history = (copy / "history.jsonl").read_text()
    (copy / "history.jsonl").write_text(history, encoding="utf-8-sig")
    assert report.training_of(copy) == report.training_of(run)


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    """basujindal/stable-diffusion#2, assafelovic/gpt-researcher#1418."""
    path = tmp_path / f"{'𝄞' * 62}.png"  # of 252 bytes
    write_atomically(path, lambda aside: aside.write_bytes(b"x"))
    assert names(tmp_path) == {path.name}


def test_names_of_runs_that_are_given_by_dots(tmp_path, monkeypatch):
    (tmp_path / "A" / "B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "A" / "B")
    assert names_of([Path(".."), Path("."), Path("../B/..")]) == ["A", "B", "A-1"]


def test_few_shot_draws_one_class_of_a_conditional_generator(run, tmp_path, pictures):
    """NVlabs/stylegan2-ada-pytorch#148: a command that asks for a class and has no flag for it."""
    words = f"--images {pictures} --shots 2 --steps 1 --batch 4 --samples 1 --freeze-until 4"
    words = *words.split(), "--generator", GOLDEN / "nvidia_variant_cond.pkl"
    words = "few-shot", *words, "--discriminator", "none", "--out", tmp_path / "run"
    assert "(--class-index) from 0 to 4" in one_line(*words)
    done(*words, "--class-index", 1)
    assert read_config(tmp_path / "run").class_index == 1
    done("sample", "--run", tmp_path / "run", "--n", 1, "--out", tmp_path / "x.png")


# ----------------------------------------------------------------------------------------------
# Hosts


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_flush(tmp_path, monkeypatch, number):
    """bup/bup#37, borgbackup/borg#1287, pytorch/pytorch#144752. A disk that fails is told."""

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    try:
        write_atomically(tmp_path / "x", lambda aside: aside.write_bytes(b"x"))
    except OSError as error:
        assert number == errno.EIO == error.errno and not names(tmp_path)
    else:
        assert number != errno.EIO and names(tmp_path) == {"x"}


def test_a_gpu_that_is_seen_and_runs_nothing(monkeypatch):
    """NVlabs/stylegan2-ada-pytorch#6, rosinality/stylegan2-pytorch#332."""

    def zeros(n, device):  # memory is there, kernels are not
        if n:
            raise RuntimeError("CUDA error: no kernel image is available\nFor debugging ...")
        return torch.empty(0)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"sees 1 GPUs \(CUDA error: no kernel.*\); wanted: "):
        processes.pick_device("cuda")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Pillow's file
def test_a_film_that_is_ended_leaves_no_file(run, tmp_path, monkeypatch):
    """objectionary/hone-maven-plugin#1038, Z2PackDev/Z2Pack#25."""

    def ended(*_):
        yield torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # or this process would end
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(video, "walk", ended)
    code, _, err = answer("video", "--run", run, "--output", tmp_path / "x.gif")
    assert code == 128 + signal.SIGTERM and "ipl.py: stopped" in err and not names(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("quota, threads", [
    ({"cpu.max": "250000 100000\n"}, [2]), ({"cpu.max": "max 100000\n"}, []), ({}, []),
    ({"cpu.max": "9900000 100000\n"}, []), ({"cpu.max": "50000 100000\n"}, [1]),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, [4]),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
])  # fmt: skip
def test_a_container_that_may_use_few_of_many_cores(tmp_path, monkeypatch, quota, threads):
    """Unity-Technologies/ml-agents#4471, ollama/ollama#17916."""
    (tmp_path / "cpu").mkdir()
    for name, words in quota.items():
        (tmp_path / name).write_text(words)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processes.fit_threads(tmp_path)
    assert chosen == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    processes.fit_threads(tmp_path)
    assert chosen == threads


def test_help_in_a_terminal_of_one_column(monkeypatch):
    """clap-rs/clap#453: it went on for ever, and took all memory."""
    monkeypatch.setenv("COLUMNS", "1")
    with messages.lenient_streams():
        assert shutil.get_terminal_size().columns == 40
    assert os.environ["COLUMNS"] == "1"
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((1, 1)))
    with messages.lenient_streams():
        assert os.environ["COLUMNS"] == "40"
    assert "COLUMNS" not in os.environ


def test_a_checkpoint_that_somebody_deletes_spoils_no_finished_run(tmp_path, monkeypatch):
    """OpenNMT/OpenNMT-py#1709, allenai/allennlp#2531."""
    save_run = adapt.save_run

    def save_and_lose(folder, *rest):
        save_run(folder, *rest)
        (folder / "checkpoint.pt").unlink()

    monkeypatch.setattr(adapt, "save_run", save_and_lose)
    done(*ONE, "--out", tmp_path / "run")


# ----------------------------------------------------------------------------------------------
# Usage


def test_the_folder_of_a_run_in_place_of_its_generator(run, tmp_path):
    main = ["--generator", run, "--out", tmp_path / "new"]
    for words in (["inspect", run], ["convert", run, tmp_path / "x.pt"], main):
        assert "Is a directory; wanted: a StyleGAN2 checkpoint (.pt, " in one_line(*words)


@pytest.mark.parametrize("words", [
    ("invert", "--image", "x.png", "--generator", ""), ("few-shot", "--images="), ("--out", ""),
    ("sample", "--run", ""), ("list", "--folder", ""), ("inspect", ""), ("--target=",),
    ("invert", "--image", "x.png", ""),
])  # fmt: skip
def test_a_variable_of_a_shell_that_is_not_set(words):
    """rclone/rclone#4239, elixir-ai-tools/just_bash#79: it was the current folder, or a default."""
    flag = next((x.rstrip("=") for x in words[::-1] if x.startswith("-")), "a value")
    flag = "a value" if words[-2:] == ("x.png", "") else flag
    assert f"{flag} is empty; wanted: none at all, or more\n" in one_line(*words)


def test_words_that_may_be_empty_or_end_in_an_equals_sign(capsys):
    cli.check_words(["--freeze", "", "--freeze=", "--ctx-init", "", "--target=a=", "--resume"])
    with pytest.raises(SystemExit) as stop:
        air.main(["--generator", ""])
    assert stop.value.code == 2 and "--generator is empty" in capsys.readouterr().err


def test_braces_in_the_words_of_a_prompt():
    """langchain-ai/langchain#700, fireform-core/FireForm#581."""
    settings = Settings(clip=(WORLD[3],), generator=WORLD[1], ctx_init="a {x} {", target="{0} {}")
    assert len(adapt.load_clips(settings, "cpu")) == 1


def test_a_film_that_is_larger_than_its_format(run, tmp_path, monkeypatch):
    """k4yt3x/video2x#1325: told before the first frame."""
    monkeypatch.setitem(video.LARGEST, ".gif", 63)
    film = "video", "--run", run, "--output", tmp_path / "x.gif"
    assert "frames of 64 pixels a side; wanted: at most 63" in one_line(*film)
    assert not names(tmp_path)


def test_a_film_with_a_colon_in_its_name(tmp_path, monkeypatch):
    """ytdl-org/youtube-dl#6874, wang-bin/QtAV#344."""
    pytest.importorskip("av", reason="for .mp4")
    monkeypatch.chdir(tmp_path)
    frames = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    video.write_mp4(Path("12:30.mp4"), iter(frames), 10, "")
    assert names(tmp_path) == {"12:30.mp4"}
