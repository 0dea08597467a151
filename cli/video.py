"""python ipl.py video: a loop through latents, or from source to target, as .gif or .mp4.

A frame is made when the file asks for it, and the file appears whole or not at all.
"""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import ipl
from checkpoints.files import write_atomically
from cli import processes
from cli.edit import of_runs, read_w
from cli.run_folder import make_folder, read_config
from cli.sample import Trunc, as_pixels, latents_of, seeds_of
from cli.settings import check, command_line, expand

MOST = 20_000  # frames
FASTEST = {".gif": 50, ".mp4": 120}  # frames in a second; browsers slow down a faster .gif
LARGEST = {".gif": 65_535, ".mp4": 16_384}  # pixels of a side that the formats know
Paths = tyro.conf.UseAppendAction[tuple[Path, ...]]


def video(
    run: Paths = (), seeds: str | None = None, projected_w: Paths = (), blend: bool = False,
    w_frames: int = 60, grid: str | None = None, fps: int = 30, truncation_psi: Trunc = None,
    output: Path = Path("video.gif"), device: str = "auto",
):  # fmt: skip
    """Film finished runs, as a loop: a walk through latents, source left and targets right of it.

    Args:
        run: Run folder; several, of one source generator, stand side by side.
        seeds: The persons on the way, such as 0-3 or 0,3,5-9, in NVIDIA's draw. None: 0-3, or none
            with --projected-w.
        projected_w: A person of your own, a .npz with w. They come before those of --seeds, and are
            not truncated.
        blend: No walk: the weights go from the source's to those of each run in turn, and back.
        w_frames: Frames from one person to the next, or from one generator to the next.
        grid: Columns x rows of walks, among which the persons are divided; of blends, a cell for
            each person. None: 1x1, and all persons of a blend in a row.
        fps: Frames in a second.
        truncation_psi: Truncation of --seeds. None: that of the run.
        output: File to write, .gif, or .mp4, which needs PyAV (pip install av).
        device: auto, cpu, cuda or cuda:<n>.
    """
    output, folders = Path(expand(output)), [Path(expand(x)) for x in run]
    files = [Path(expand(x)) for x in projected_w]
    write = writer_of(output, fps)
    if not 2 <= w_frames <= MOST:
        raise ValueError(f"--w-frames {w_frames}; wanted: from 2 to {MOST}")
    seeds = "0-3" if seeds is None and not files else seeds
    drawn = [] if seeds is None else seeds_of(seeds)
    columns, rows = cells_of(grid, len(drawn) + len(files), blend)
    if not folders:
        raise ValueError("no --run; wanted: the folder of a finished run")
    source, adapted, _ = of_runs(folders, processes.pick_device(device))
    settings = read_config(folders[0])
    psi = settings.truncation_psi if truncation_psi is None else truncation_psi
    check(replace(settings, truncation_psi=psi))
    keys = torch.cat([*(read_w(path, source)[0] for path in files), w_of(drawn, source, psi)])
    if blend:
        stations = [source, *adapted, source]
        total, frames = (len(stations) - 1) * w_frames, blends(stations, keys, w_frames)
    else:
        keys = keys.unflatten(0, (columns * rows, -1)).transpose(0, 1)  # [K, cells, num_ws, w_dim]
        total, frames = len(keys) * w_frames, walk([source, *adapted], keys, w_frames)
    if total > MOST:
        raise ValueError(f"{total} frames; wanted: at most {MOST}, by a smaller --w-frames")
    side = source.resolution * max(columns * (1 if blend else 1 + len(adapted)), rows)
    if side > (most := LARGEST[output.suffix.lower()]):
        wanted = f"at most {most} for {output.suffix}, by a smaller --grid or fewer --run"
        raise ValueError(f"frames of {side} pixels a side; wanted: {wanted}")
    make_folder(output.parent)
    flags = {"run": folders, "seeds": seeds, "projected_w": files, "blend": blend, "grid": grid}
    flags |= {"w_frames": w_frames, "fps": fps, "truncation_psi": truncation_psi}
    note = command_line("video", **flags)
    shown = (arranged(x, columns, rows) for x in tqdm(frames, "frames", total, disable=None))
    write_atomically(output, lambda aside: write(aside, shown, fps, note))
    print(f"{output}: {total} frames, {total / fps:.1f} s, {output.stat().st_size >> 10} KB")


# ----------------------------------------------------------------------------------------------
# What is filmed


@torch.no_grad()
def w_of(seeds, generator, psi):
    """w [N, num_ws, w_dim] of seeds, truncated."""
    if not seeds:
        return generator.w_avg.new_empty(0, generator.num_ws, generator.w_dim)
    z = latents_of(seeds, generator.z_dim).to(generator.w_avg.device)
    w = ipl.truncate(generator.mapping(z), generator.w_avg, psi)
    if not w.isfinite().all():
        raise ValueError("w that are not finite; wanted: a generator with sound weights")
    return w[:, None].expand(-1, generator.num_ws, -1)


def cells_of(words, persons, blend):
    """Columns and rows of a --grid such as 4x2, None for its default, or ValueError if the persons
    cannot be divided among them."""
    found = re.fullmatch(r"([1-9][0-9]?)x([1-9][0-9]?)", words or f"{persons if blend else 1}x1")
    if not found:
        raise ValueError(f"--grid {words!r}; wanted: columns x rows, such as 4x2, to 99x99")
    columns, rows = map(int, found.groups())
    cells = columns * rows
    if blend and persons != cells:
        wanted = f"--seeds of {cells} persons, one for each cell"
        raise ValueError(f"--grid {columns}x{rows} and {persons} persons; wanted: {wanted}")
    if not blend and (persons % cells or persons < 2 * cells):
        wanted = f"a walk of 2 or more in each cell, so {2 * cells} or {3 * cells} ..., or --blend"
        raise ValueError(f"--grid {columns}x{rows} and {persons} persons; wanted: {wanted}")
    return columns, rows


# ----------------------------------------------------------------------------------------------
# Frames


@torch.no_grad()
def draw(generator, w):
    """w [N, num_ws, w_dim] -> uint8 [N, R, R, 3], as many at a time as a CPU has room for."""
    at_once = max(1, min(32, (1 << 22) // generator.resolution**2))
    return torch.cat([as_pixels(generator.synthesis(part)) for part in w.split(at_once)])


def walk(generators, keys, w_frames):
    """Closed walks through w, keys [K, cells, num_ws, w_dim] -> uint8 [cells, G, R, R, 3], K *
    w_frames times: what each of G generators draws.

    A cubic spline through the keys and back to the first (NVIDIA's gen_video.py), which is not
    repeated at the end. w is where it may be mixed linearly: z would leave its sphere.
    """
    from scipy.interpolate import CubicSpline

    closed = torch.cat([keys, keys[:1]]).double().cpu().numpy()
    spline = CubicSpline(np.arange(len(closed)), closed, bc_type="periodic")
    for times in torch.arange(len(keys) * w_frames).split(max(1, 32 // keys.shape[1])):
        w = torch.from_numpy(spline(times.numpy() / w_frames)).to(keys)
        drawn = [draw(x, w.flatten(0, 1)).unflatten(0, w.shape[:2]) for x in generators]
        yield from torch.stack(drawn, dim=2)


def blends(stations, w, w_frames):
    """w [cells, num_ws, w_dim] -> uint8 [cells, 1, R, R, 3], w_frames times from each generator to
    the next: theta = (1 - a) theta_1 + a theta_2, parameters and no buffers.

    a = (1 - cos(pi t)) / 2 is 0 in the first frame of a leg, so that each station is shown, and
    below 1 in its last: the next leg, or the loop, goes on with what a = 1 would be.
    """
    mixed = copy.deepcopy(stations[0])
    for first, second in zip(stations, stations[1:], strict=False):
        for frame in range(w_frames):
            a = (1 - math.cos(math.pi * frame / w_frames)) / 2
            for p, x, y in zip(*(g.parameters() for g in (mixed, first, second)), strict=True):
                p.copy_(x.lerp(y, a))
            yield draw(mixed, w)[:, None]


def arranged(cells, columns, rows):
    """One frame: uint8 [cells, G, R, R, 3] -> [rows R, columns G R, 3], row after row of cells."""
    grid = cells.flatten(0, 1).unflatten(0, (rows, -1))  # [rows, columns G, R, R, 3]
    return grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)


# ----------------------------------------------------------------------------------------------
# Files


def writer_of(output, fps):
    """The function that writes a file of that name, or ValueError, before there is a frame."""
    suffix = output.suffix.lower()
    if suffix not in FASTEST:
        raise ValueError(f"--output {output} is no name of a film; wanted: a .gif or .mp4 file")
    if output.exists():
        raise ValueError(f"--output {output} is there already; wanted: another name")
    if not 1 <= fps <= FASTEST[suffix]:
        raise ValueError(f"--fps {fps}; wanted, for {suffix}: from 1 to {FASTEST[suffix]}")
    if suffix == ".gif":
        return write_gif
    try:
        import av

        av.Codec("libx264", "w")
    except (ImportError, ValueError) as error:  # ValueError: a PyAV that was built without it
        found = f"--output {output}: there is no PyAV with x264 ({error})"
        wanted = "pip install av (requirements-extra.txt), or a name in .gif"
        raise ValueError(f"{found}; wanted: {wanted}") from error
    return write_mp4


def write_gif(path, frames, fps, note):
    """Frames uint8 [H, W, 3] as a .gif that loops for ever.

    Its times are hundredths of a second: at 30 in a second frames last 3, 4 and 3 of them. A
    picture has 256 colours. Frames that do not differ become one that lasts longer.
    """
    from PIL import Image

    def images():
        for i, frame in enumerate(frames):
            image = Image.fromarray(frame.numpy())
            image = image.quantize(256, dither=Image.Dither.NONE)
            image.info["duration"] = 10 * (round(100 * (i + 1) / fps) - round(100 * i / fps))
            yield image

    rest = images()
    first = next(rest)
    first.save(path, save_all=True, append_images=rest, loop=0, comment=note.encode())


def write_mp4(path, frames, fps, note):
    """Frames uint8 [H, W, 3] as H.264 in 8 bits, 4:2:0, which every browser plays.

    Sides that are no multiples of 16, the block of the codec, get white borders on the right and
    below. Colours are those of BT.709, and the file says so; players guess where it does not.
    """
    import av

    # in full, as libav takes what is before a colon for a protocol
    with av.open(path.absolute(), "w", options={"movflags": "faststart"}) as file:
        file.metadata["comment"] = note
        stream = file.add_stream("libx264", rate=fps, options={"crf": "18"})
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 1  # BT.709
        codec.color_range = 1  # 16 to 235
        for frame in frames:
            height, width, _ = frame.shape
            frame = F.pad(frame, (0, 0, 0, -width % 16, 0, -height % 16), value=255)
            if not codec.is_open:
                codec.height, codec.width, codec.pix_fmt = *frame.shape[:2], "yuv420p"
            picture = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            file.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        file.mux(stream.encode())
