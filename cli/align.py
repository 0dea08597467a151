"""A picture file -> the square that a generator's pictures are like, [3, side, side].

A portrait is aligned as FFHQ's were (NVlabs/ffhq-dataset, download_ffhq.py): from two eyes and the
corners of the mouth follows a turned square around the face.
"""

import math
import warnings
from typing import Literal

import torch

from checkpoints.images import as_square, read_image

Align = Literal["none", "crop", "face"]


def read_square(path, side, align="none"):
    """A picture [3, side, side] in [-1, 1], turned as its camera was held, over white; of an
    animation the first one.

    align: none, a square as it is; crop, its middle; face, the largest face, as FFHQ's. Warnings
    say what was changed. Raises ValueError, of one line, for what is no picture, or too small, or
    has no face.
    """
    from PIL import Image

    pixels, note = read_image(path)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    notes = [note] * bool(note)
    if align == "face":
        points, faces = find_face(image, path)
        notes += [f"the largest of {faces} faces"] * (faces > 1)
        image = cut(image, face_quad(points), side)
    elif align == "none" and image.width != image.height:
        notes.append(f"the middle of {image.width}x{image.height} pixels (--align face finds one)")
    if notes:
        warnings.warn(f"{path}: taken is {', '.join(notes)}", stacklevel=2)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return as_square(pixels.view(image.height, image.width, 3).permute(2, 0, 1), side)


# ----------------------------------------------------------------------------------------------
# Faces


def find_face(image, path):
    """Five points [5, 2] of the largest face of an image of PIL's: both eyes, nose, both corners of
    the mouth, left before right as seen; and the number of faces.

    Raises ImportError, of one line, without facenet-pytorch, whose MTCNN finds them.
    """
    try:
        from facenet_pytorch.models.mtcnn import MTCNN
    except ImportError as error:
        raise ImportError(
            f"--align face needs facenet-pytorch ({error}); wanted: pip install --no-deps "
            "facenet-pytorch (it pins an old torch), or --align crop"
        ) from error
    boxes, _, points = MTCNN(keep_all=True, device="cpu").detect(image, landmarks=True)
    if boxes is None:
        raise ValueError(f"{path}: no face is found; wanted: a face seen from the front, or try "
                         "--align crop")  # fmt: skip
    boxes, points = torch.tensor(boxes.tolist()), torch.tensor(points.tolist())
    return points[(boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()], len(boxes)


def face_quad(points):
    """Five points [5, 2], x and y, of `find_face` -> the corners [4, 2] of FFHQ's square: upper
    left, lower left, lower right, upper right. recreate_aligned_images of download_ffhq.py.
    """
    eye_left, eye_right, _, mouth_left, mouth_right = points.double()
    eyes, mouth = (eye_left + eye_right) / 2, (mouth_left + mouth_right) / 2
    between, down = eye_right - eye_left, mouth - eyes
    turn = torch.tensor([-1.0, 1.0]).double()
    x = between - down.flip(0) * turn
    x = x / x.norm() * max(2 * between.norm(), 1.8 * down.norm())
    y, center = x.flip(0) * turn, eyes + 0.1 * down
    return torch.stack([center - x - y, center - x + y, center + x + y, center + x - y])


def cut(image, quad, side):
    """The square with these corners [4, 2] of an image of PIL's, at four times `side`.

    What lies outside is the picture's mirror image, blurred, and fades to its median color.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    size = float((quad[3] - quad[0]).norm())
    if (shrink := math.floor(size / side / 2)) > 1:
        scale = (round(image.width / shrink), round(image.height / shrink))
        image, quad, size = image.resize(scale, Image.Resampling.BOX), quad / shrink, size / shrink
    # What is far away costs nothing: crop, or pad where the square leaves the picture.
    border, low, high = max(round(0.1 * size), 3), quad.amin(0).floor(), quad.amax(0).ceil()
    left, top = (low - border).clamp(min=0).int().tolist()
    right, bottom = (int(x) + border for x in high)
    image = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
    quad = quad - torch.tensor([left, top])
    outside = [*(-quad.amin(0)).tolist(), *(quad.amax(0) - torch.tensor(image.size)).tolist()]
    pad = [max(math.ceil(x) + border, 0) for x in outside]
    if max(pad) > border - 4:
        pad = [max(x, round(0.3 * size)) for x in pad]
        pixels = np.asarray(image, np.float32)
        pixels = np.pad(pixels, ((pad[1], pad[3]), (pad[0], pad[2]), (0, 0)), "reflect")
        height, width = pixels.shape[:2]
        y, x = np.ogrid[:height, :width]
        from_x = np.minimum(x / pad[0], (width - 1 - x) / pad[2])
        from_y = np.minimum(y / pad[1], (height - 1 - y) / pad[3])
        far = (1 - np.minimum(from_x, from_y))[..., None]  # 0 at the picture's edge, 1 at the end
        blurred = Image.fromarray(pixels.round().astype(np.uint8))
        blurred = np.asarray(blurred.filter(ImageFilter.GaussianBlur(0.02 * size)), np.float32)
        pixels += (blurred - pixels) * (3 * far + 1).clip(0, 1)
        pixels += (np.median(pixels, axis=(0, 1)) - pixels) * far.clip(0, 1)
        image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        quad = quad + torch.tensor(pad[:2])
    corners = (quad + 0.5).flatten().tolist()
    fine = (max(side, min(4 * side, 4096)),) * 2
    return image.transform(fine, Image.Transform.QUAD, corners, Image.Resampling.BILINEAR)
