"""A stranger's pictures -> uint8 tensors. Nothing of a file is executed: no EPS, no Ghostscript."""

import contextlib
import io
import warnings
from pathlib import Path

import torch

FORMATS = "PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
UNREAD = {".heic", ".heif", ".avif"}  # as phones write them


def picture_paths(folder):
    """The paths of the pictures in a folder, by their names; hidden files are none, as the ._1.png
    that macOS puts beside 1.png. A warning tells of kinds that are not read."""
    there = sorted(x for x in folder.iterdir() if not x.name.startswith("."))
    if unread := [x.name for x in there if x.suffix.lower() in UNREAD]:
        found = f"{folder}: passed over {len(unread)} pictures such as {unread[0]}"
        warnings.warn(f"{found}; wanted: {', '.join(FORMATS)}", stacklevel=3)
    return [x for x in there if x.suffix.lower() in SUFFIXES]


def read_image(path, least=32):
    """A picture file -> (uint8 [3, H, W] in RGB, a note in words, or "").

    Turned as its camera was held, in sRGB, what is transparent laid over white, of 16 bits the
    upper 8, of an animation the first picture; the note says which of it was done. least: pixels of
    the shorter side. Raises ValueError, of one line, if there is no such picture, or a smaller one.
    """
    path, wanted = Path(path), f"wanted: a whole picture, {', '.join(FORMATS)}"
    try:
        if not path.is_file():
            why = "not a file" if path.exists() else "no such file"
        elif path.stat().st_size == 0:
            why = "it is empty"
        else:
            with warnings.catch_warnings(action="ignore"):  # of what Pillow finds odd in it
                image, note = _read(path)
            if min(image.size) >= least:
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous(), note
            why = f"it has {image.width}x{image.height} pixels"
            wanted = f"wanted: at least {least} on each side"
    except MemoryError:
        raise
    except Exception as error:  # whatever a stranger's bytes can raise
        kind, words = type(error).__name__, " ".join(str(error).split())
        words = f": {words:.100}" * (kind != "UnidentifiedImageError")  # which says no more
        why = getattr(error, "strerror", None) or f"no picture, or damaged ({kind}{words})"
    raise ValueError(f"cannot read {path}: {why}; {wanted}")


def _read(path):
    """A picture in RGB, and the note."""
    import numpy as np
    from PIL import Image, ImageOps, PngImagePlugin

    notes = []
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one text may be all there is
    with Image.open(path, formats=FORMATS) as image:
        if getattr(image, "is_animated", False):
            notes.append("the first of its pictures")
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # whatever a damaged EXIF can raise, of a picture that is whole
            notes.append("not turned, as its EXIF is damaged")
            image = image.copy()
    image = _in_srgb(image, notes)
    if image.mode == "F":
        raise TypeError("no range is known of its numbers")
    if image.mode.startswith("I"):  # 0 to 65535
        notes.append("the upper 8 of its 16 bits")
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.mode == "RGBA" or image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            notes.append("what is transparent laid over white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode != "RGB":
        kinds = {"L": "grey", "1": "black and white", "P": "palette"}
        notes.append(f"{kinds.get(image.mode, image.mode)} turned to RGB")
    return image.convert("RGB"), ", ".join(notes)


def _in_srgb(image, notes):
    """The picture in sRGB, if it has the colors of another profile, as a phone's Display P3. One
    that cannot be read is passed over, as most programs do; grey stays grey."""
    from PIL import ImageCms

    data = image.info.get("icc_profile")
    if data and (image.mode == "P" or image.mode == "RGB" and image.has_transparency_data):
        image = image.convert("RGBA")
    if not data or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    with contextlib.suppress(Exception):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        name, mode = ImageCms.getProfileDescription(profile).strip(), image.mode
        if "sRGB" not in name:
            mode, sRGB = mode.replace("CMYK", "RGB"), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, profile, sRGB, outputMode=mode)
            notes.append(f"the colors of {name:.40} turned to sRGB")
    return image


def as_square(pixels, side):
    """uint8 [3, H, W] -> the middle of it, resized: [3, side, side] in [-1, 1]."""
    from PIL import Image, ImageOps

    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    square = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return square.view(side, side, 3).permute(2, 0, 1).float() / 127.5 - 1
