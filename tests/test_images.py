"""Pictures of every kind a stranger has, and files that are none."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.images import as_square, read_image

SIZE = 40, 48  # height, width
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
GREY = Image.fromarray(RGB[..., 0])


def half_transparent():
    """The left half can be seen, behind the right one is white."""
    return np.concatenate([RGB, np.full((*SIZE, 1), 255, np.uint8)], 2) * (
        np.arange(SIZE[1]) < 24
    ).astype(np.uint8)[:, None]


def over_white():
    return np.where((np.arange(SIZE[1]) < 24)[:, None], RGB, 255)


def palette(transparent):
    image = Image.new("P", SIZE[::-1], 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((3, 5), 1)
    if transparent:
        image.info["transparency"] = 0
    expected = np.full((*SIZE, 3), 255) if transparent else np.tile([10, 20, 30], (*SIZE, 1))
    expected[5, 3] = 200, 100, 50
    return image, expected


KINDS = {  # name: (picture, what it shows, a word of the note)
    "rgb.png": (Image.fromarray(RGB), RGB, ""),
    "rgba.png": (Image.fromarray(half_transparent(), "RGBA"), over_white(), "over white"),
    "rgba.webp": (Image.fromarray(half_transparent(), "RGBA"), over_white(), "over white"),
    "opaque.png": (Image.fromarray(RGB).convert("RGBA"), RGB, ""),
    "la.png": (GREY.convert("LA"), RGB[..., :1], ""),
    "grey.png": (GREY, RGB[..., :1], "grey"),
    "bits.png": (GREY.convert("1", dither=0), RGB[..., :1] // 128 * 255, "black and white"),
    "palette.png": (*palette(False), "palette"),
    "palette-transparent.png": (*palette(True), "over white"),
    "deep.png": (Image.fromarray(RGB[..., 0] * np.uint16(256) + 255), RGB[..., :1], "16 bits"),
    "deep.tif": (Image.fromarray(RGB[..., 0] * np.uint16(256) + 255), RGB[..., :1], "16 bits"),
    "cmyk.tif": (Image.fromarray(RGB).convert("CMYK"), RGB, "CMYK"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture(tmp_path, name):
    image, expected, word = KINDS[name]
    image.save(tmp_path / name, lossless=True, **{k: image.info[k] for k in image.info})
    pixels, note = read_image(tmp_path / name)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, *SIZE) and pixels.is_contiguous()
    assert (pixels.permute(1, 2, 0).numpy() == expected).all()
    assert word in note and bool(word) == bool(note)


def test_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    pixels, _ = read_image(tmp_path / "x.png")
    assert (pixels.permute(1, 2, 0).numpy() == np.rot90(RGB, -1)).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_the_first_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", SIZE[::-1], color) for color in ("red", "blue")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    pixels, note = read_image(path)
    assert pixels[:, 20, 20].tolist() == [255, 0, 0] and "first of its pictures" in note


def test_files_that_are_no_pictures(tmp_path):
    noise = Image.fromarray(RGB)
    for suffix in ("png", "jpg", "webp", "bmp", "tif", "gif"):
        noise.save(tmp_path / f"cut.{suffix}")
        whole = (tmp_path / f"cut.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    noise.save(tmp_path / "program.eps")  # Pillow would start Ghostscript
    noise.resize((31, 400)).save(tmp_path / "small.png")
    Image.fromarray(RGB[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # which never ends
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "nowhere.png"]:
        with pytest.raises(ValueError) as error:
            read_image(path)
        message = str(error.value)
        assert message.startswith(f"cannot read {path}: ") and "\n" not in message, message
        assert "; wanted: " in message and len(message) < 250 + len(str(path))
    with pytest.raises(ValueError, match="31x400 pixels; wanted: at least 32"):
        read_image(tmp_path / "small.png")


def test_the_middle_as_a_square():
    pixels = torch.zeros(3, 10, 30, dtype=torch.uint8)
    pixels[:, :, 10:20] = 255
    assert (as_square(pixels, 10) == 1).all() and as_square(pixels, 7).shape == (3, 7, 7)
