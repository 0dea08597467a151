"""python ipl.py metrics: how far finished runs have come, and what that cost, in numbers."""

import functools
import hashlib
import json
import math
import warnings
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

import ipl
import miniature
from checkpoints.files import write_atomically
from checkpoints.images import picture_paths
from cli import diffusion, metric_networks, processes
from cli import metric_formulas as formulas
from cli.adapt import has_truth, load_clips, of_miniature
from cli.run_folder import FEW_SHOT, find_generator, made_by, make_folder, read_config
from cli.sample import generators
from cli.settings import check, expand, flag
from diffusion import DiffusionGenerator
from miniature import faces, plain_label
from miniature.judge import load_judge
from miniature.train import pool

SUBSET = 1000  # pictures in each of KID's 100 subsets

METRICS = {  # name: (the better direction, digits, what it needs)
    "frechet-clip": ("↓", 1, "real"),
    "kid-clip": ("↓", 1, "real"),
    "clip-score": ("↑", 2, ""),
    "clip-real": ("↑", 3, "real"),
    "diversity": ("↑", 3, ""),
    "psnr": ("↑", 1, ""),
    "ssim": ("↑", 3, ""),
    "structure": ("↑", 3, ""),
    "domain": ("↑", 3, "truth"),
    "attributes": ("↑", 3, "truth"),
    "identity": ("↑", 3, "truth"),
    "frechet-judge": ("↓", 1, "truth"),
    "kid-judge": ("↓", 1, "truth"),
    "is": ("↑", 2, "inception"),
    "isc": ("↑", 2, "tf"),
    "fid": ("↓", 2, "tf real"),
    "kid": ("↓", 5, "tf real"),
    "sifid": ("↓", 3, "inception reference"),
    "scs": ("↑", 3, "hed"),
    "id": ("↑", 3, "arcface"),
    "intra-lpips": ("↑", 3, "lpips reference"),
}
NEEDS = {  # in the words of a footnote
    "real": "--real DIR, pictures of the target domain (the embedded world draws its own, at "
    "--truncation-psi 1)",
    "truth": "the embedded world at --truncation-psi 1, where the persons are known",
    "inception": "--inception inception_v3_google-0cc3c7bd.pth, which torchvision offers",
    "tf": "pip install torch-fidelity and --inception weights-inception-2015-12-05-6726825d.pth, "
    "of torch-fidelity's release 0.2.0",
    "reference": "--reference FILE ..., pictures of the target domain",
    "hed": "--hed network-bsds500.pytorch, to which sniklaus/pytorch-hed points",
    "arcface": "--arcface model_ir_se50.pth, to which TreB1eN/InsightFace_Pytorch points",
    "lpips": "pip install lpips and --lpips vgg16-397923af.pth, which torchvision offers",
}


OF_REAL = {  # which look at the real pictures
    "frechet-clip", "kid-clip", "clip-real", "frechet-judge", "kid-judge", "fid", "kid",
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How a paper or its code has measured; where that is not told, the note says what we do."""

    metrics: tuple[str, ...] = ()  # None: what needs no file, and what a file is given for
    n: int = 1000
    counts: dict = field(default_factory=dict)  # of the metrics that take only the first so many
    psi: float | None = None  # None: that of the runs
    sides: tuple[int, ...] = (299,)  # to which pictures are resized for IS, in turn
    splits: int = 10  # of IS
    channels: int = 192  # of SIFID
    note: str = ""


PROTOCOLS = {
    "ipl": Protocol(
        ("is", "scs", "id", "sifid"), 5000, {"scs": 500}, 0.7,
        note="N is told for SIFID alone, and is here that of IS and ID too; SCS's is RSSA's",
    ),
    "diffusionclip": Protocol(("id",), note="N is ours"),
    "rssa": Protocol(("is", "scs"), counts={"scs": 500}, psi=1.0, sides=()),
    "air": Protocol(
        ("fid", "clip-real", "is", "scs", "sifid", "intra-lpips"), 5000,
        {"is": 1000, "scs": 500, "sifid": 1000, "intra-lpips": 1000}, 0.7, (256, 299), channels=64,
        note="SCS's N is RSSA's; intra-LPIPS has the references for centers, not medoids",
    ),
}  # fmt: skip


def metrics(
    run: tyro.conf.UseAppendAction[tuple[Path, ...]], out: Path = Path("metrics.json"),
    n: int | None = None, seed: int = 1, metrics: tuple[str, ...] = (),
    protocol: str | None = None, truncation_psi: float | None = None, real: Path | None = None,
    reference: tuple[Path, ...] = (), clip: str | None = None, inception: tuple[Path, ...] = (),
    hed: Path | None = None, arcface: Path | None = None, lpips: Path | None = None,
    images: str | None = None, device: str = "auto",
):  # fmt: skip
    """Measure finished runs of one source and one target: a table, and a .json file.

    The source generator and every run draw the same n latents, with fixed noise; of the embedded
    world the true pictures are a row too. What is measured by default needs no file, and nothing
    is downloaded: what lacks a file is a "-", and a note tells which. See docs/metrics.md.

    Args:
        run: Run folder; several give a row each.
        out: File to write, a .json file.
        n: Number of latents. None: that of the protocol, or 1000.
        seed: Seed of the latents; they are those of `sample`.
        metrics: Names; none: what needs no file, and what a file is given for.
        protocol: ipl, diffusionclip, rssa or air: metrics, n and sizes of that paper.
        truncation_psi: Truncation. None: that of the protocol, or of the runs.
        real: Folder of pictures of the target domain, cropped to their middle and resized.
        reference: Pictures of the target domain, for sifid and intra-lpips.
        clip: The CLIP of what has clip in its name. None: the first that trained the runs.
        inception: Weights of Inception v3: torchvision's, torch-fidelity's, or both.
        hed: Weights of HED, for scs.
        arcface: Weights of ArcFace's IR-SE50, for id.
        lpips: Weights of torchvision's VGG16, for intra-lpips.
        images: Of diffusion models, folder of pictures to adapt. None: that of the runs.
        device: auto, cpu, cuda or cuda:<n>.
    """
    out, rules = read_words(Path(expand(out)), metrics, protocol)
    n = rules.n if n is None else n
    psi = rules.psi if truncation_psi is None else truncation_psi
    runs, settings = read_runs([Path(expand(x)) for x in run], clip, psi, images)
    settings = replace(settings, seed=seed, samples=n)
    check(settings, samples="--n")
    if n < 2:
        raise ValueError(f"--n {n}: one picture is no distribution; wanted: 2 or more")
    files, device = pictures_in(real, n) if real else [], processes.pick_device(device)
    source, adapted, w = load_generators(settings, runs, device)
    n, side = len(w), source.resolution
    world = has_truth(settings) and settings.generator is None and settings.truncation_psi == 1
    eyes = load_known(settings, world, device) | load_files(inception, hed, arcface, lpips, device)
    if reference:
        eyes["reference"] = read_pictures([expand(x) for x in reference], side).to(device)
    if files or world:
        eyes["real"] = f"{len(files)} pictures of {real}" if files else f"{n} true pictures"
    shown, lacking = choose(metrics or rules.metrics, eyes)
    asked = {name: rules.counts.get(name, n) for name in shown if name not in lacking}
    check_numbers(asked, n, len(files) or n, rules, eyes)
    if "is" in asked and side < 75 and not rules.sides:
        raise ValueError(f"pictures of {side} px; wanted, for this protocol's IS: 75 or more")
    make_folder(out.parent)

    truth = Truth(settings, n) if world else None

    def drawn(i):
        """The pictures of each row, and those that they were made of."""
        before = synthesis(settings, source, w[i])
        pairs = {"source": (before, before)}
        for name, generator in zip(runs, adapted, strict=True):
            pairs[name] = synthesis(settings, generator, w[i]), before
        return pairs | ({"truth": (truth.true[i], truth.photos[i])} if world else {})

    def of_real(i):
        return {"": (read_pictures(files[i], side) if files else truth.others[i],)}

    known, seen = {}, functools.partial(see, eyes, rules, device, side)
    if of_them := {name: n for name in asked if name in OF_REAL}:
        known["real"] = seen(of_them, len(files) or n, "real pictures", of_real)[""]
    if "identity" in asked:
        of_photos = seen({"identity": n}, n, "true photos", lambda i: {"": (truth.photos[i],)})
        known["identities"] = of_photos[""]["identity"]
    found = seen(asked, n, "pictures", drawn)
    rows = {name: score(eyes, rules, asked, x, known, truth) for name, x in found.items()}

    head = (
        f"{settings.source.strip()} -> {settings.target.strip()}, N {n}, seed {seed}, "
        f"psi {settings.truncation_psi:g}, fixed noise"
    )
    notes = notes_of(eyes, rules, protocol, asked, lacking, n)
    table = "\n\n".join([head, *tables(rows, shown, asked, n), *notes])
    content = {
        "source": settings.source.strip(), "target": settings.target.strip(), "n": n,
        "seed": seed, "truncation_psi": settings.truncation_psi, "protocol": protocol,
        "counts": asked, "real": eyes.get("real"), "sha256": digests(eyes),
        "rows": [{"name": k, "run": str(runs.get(k, "")), **row} for k, row in rows.items()],
        "notes": notes,
    }  # fmt: skip
    data = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(out, lambda aside: aside.write_text(data, encoding="utf-8"))
    print(f"{table}\n\n{out}: the same, with all digits")


# ----------------------------------------------------------------------------------------------
# What is asked for


def read_words(out, metrics, protocol):
    """(--out, the rules of the protocol), or ValueError for a word that is none."""
    if out.suffix != ".json" or out.is_dir():
        raise ValueError(f"--out {out} is no name of a table; wanted: a .json file")
    if protocol not in (None, *PROTOCOLS):
        raise ValueError(f"no --protocol {protocol!r}; wanted: one of {', '.join(PROTOCOLS)}")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"no metric {unknown[0]!r}; wanted: some of {', '.join(METRICS)}")
    return out, PROTOCOLS[protocol] if protocol else Protocol()


def read_runs(folders, clip, psi, images):
    """({name: folder}, the Settings that the runs share, with what is given instead).

    Raises ValueError if a run is not finished, or if they differ in what has to be one.
    """
    if not folders:
        raise ValueError("there is no --run; wanted: the folder of a finished run, or several")
    configs = []
    for folder in folders:
        if find_generator(folder) is None:
            wanted = "a folder with a generator.pt"
            raise ValueError(f"{folder} is no finished run; wanted: {wanted}")
        configs.append(read_config(folder))
        if made_by(folder) == FEW_SHOT and configs[-1].generator and not clip:
            raise ValueError(f"{folder} is a few-shot run, which has no CLIP; wanted: --clip FILE")
    if len({x.resolve() for x in folders}) < len(folders):
        raise ValueError("--run names a folder twice; wanted: each once")
    changes = {
        "clip": (expand(clip),) if clip else configs[0].clip[:1],
        "truncation_psi": psi if psi is not None else configs[0].truncation_psi,
        "images": expand(images) if images else configs[0].images,
    }
    given = {"clip": clip, "truncation_psi": psi, "images": images}
    alike = ["generator", "class_index", "source", "target", *given]
    if diffusion.asked_for(configs[0]):
        alike += ["t0", "side", "inversion_steps", "synthesis_steps", "picture_steps"]
    for name in alike:
        for folder, config in zip(folders, configs, strict=True):
            first, value = getattr(configs[0], name), getattr(config, name)
            if first != value and given.get(name) is None:
                wanted = f", or {flag(name)}" if name in given else ""
                raise ValueError(
                    f"{folders[0]} has {flag(name)} {first!r}, {folder} has {value!r}; wanted: "
                    f"runs that agree in it{wanted}"
                )
    names = [x.resolve().name for x in folders]
    taken = [*names, "source", "truth"]
    names = [
        str(x) if taken.count(name) > 1 else name for x, name in zip(folders, names, strict=True)
    ]
    return dict(zip(names, folders, strict=True)), replace(configs[0], clip_weights=(), **changes)


def pictures_in(folder, n):
    """Paths of the first n pictures in a folder, by their names. Raises ValueError below two."""
    folder = Path(expand(folder))
    if not folder.is_dir():
        raise ValueError(f"--real {folder}: no such folder; wanted: one with pictures")
    paths = picture_paths(folder)[:n]
    if len(paths) < 2:
        raise ValueError(f"--real {folder}: pictures found: {len(paths)}; wanted: 2 or more")
    if any(x.suffix.lower() in (".jpg", ".jpeg", ".webp") for x in paths):
        warnings.warn(
            f"--real {folder}: lossy files (.jpg, .webp) shift Fréchet distances; wanted: .png",
            stacklevel=2,
        )
    return paths


def choose(wanted, eyes):
    """(the metrics to show, {one that cannot be: what it lacks, a key of NEEDS}).

    wanted: none for what needs no file, and what a file is given for.
    """
    lacks = {name: [x for x in METRICS[name][2].split() if x not in eyes] for name in METRICS}
    shown = list(dict.fromkeys(wanted)) or [
        name for name, missing in lacks.items() if missing in ([], ["real"]) and name != "clip-real"
    ]
    return shown, {name: lacks[name] for name in shown if lacks[name]}


def check_numbers(asked, n, real, rules, eyes):
    """ValueError for fewer pictures than a metric takes; a warning for fewer than dimensions."""
    for name, least in (("kid", SUBSET), ("is", rules.splits), ("isc", rules.splits)):
        there = min(n, real) if name == "kid" else n
        if name in asked and there < least:
            more = f" and {least} real ones" * (name == "kid")
            found = f"{name} is of {least} pictures or more, and there are {there}"
            raise ValueError(f"{found}; wanted: --n {least}{more}")
    sizes = {"fid": 2048, "frechet-judge": 256}
    if "clip" in eyes:
        sizes["frechet-clip"] = len(eyes["text"])
    low = {name: d for name, d in sizes.items() if name in asked and min(n, real) <= d}
    if low:
        names = ", ".join(f"{name} of {d} dimensions" for name, d in low.items())
        warnings.warn(
            f"{min(n, real)} pictures are not more than dimensions: {names} has singular "
            "covariances and comes out too large; compare it at the same N alone",
            stacklevel=2,
        )


# ----------------------------------------------------------------------------------------------
# What is looked at, and by what


def load_generators(settings, runs, device):
    """The source generator, the adapted ones, and the latents w [n, ...], as `sample` has them;
    of a diffusion model, those of the inverted pictures."""
    paths = [find_generator(folder) for folder in runs.values()]
    if diffusion.asked_for(settings):
        settings = replace(settings, bank=settings.samples)
        found = [diffusion.of_run(settings, path, device) for path in paths]
        return found[0][0], [x[1] for x in found], found[0][0].bank
    found = [generators(settings, path, device) for path in paths]
    source = found[0][0]
    z = ipl.sample_latents(settings.samples, source.z_dim, settings.seed).to(device)
    with torch.no_grad():
        w = torch.cat([source.mapping(part) for part in z.split(256)])
    return source, [x[1] for x in found], ipl.truncate(w, source.w_avg, settings.truncation_psi)


def synthesis(settings, generator, w):
    more = {"steps": settings.picture_steps} if isinstance(generator, DiffusionGenerator) else {}
    return formulas.pixels(generator.synthesis(w, **more))


def read_pictures(paths, side):
    """Pictures, uint8 [n, 3, side, side], of files."""
    return formulas.pixels(torch.stack([diffusion.read_picture(path, side)[0] for path in paths]))


def load_known(settings, world, device):
    """{name: network} of what is here: the CLIP, its feature of the target's label, the judge."""
    [(clip_model, transform)] = load_clips(settings, device)
    usual = str(miniature.CLIP) if of_miniature(settings) else "ViT-B/32"
    eyes = {
        "clip": ipl.image_encoder(clip_model, transform),
        "clip file": settings.clip[0] if settings.clip else usual,
        "text": ipl.label_features(clip_model, settings.target.strip()),
    }
    return eyes | ({"truth": load_judge(device=device)} if world else {})


def load_files(inception, hed, arcface, lpips, device):
    """{a key of NEEDS: network} of the files given."""
    eyes = metric_networks.load_inceptions([expand(x) for x in inception])
    if hed:
        eyes["hed"] = metric_networks.load_hed(expand(hed))
    if arcface:
        eyes["arcface"] = metric_networks.load_arcface(expand(arcface))
    if lpips and find_spec("lpips"):
        eyes["lpips"] = metric_networks.load_lpips(expand(lpips))
    return {name: network.to(device) for name, network in eyes.items()}


class Truth:
    """n persons of the embedded world, those of the latents, and true pictures of them.

    persons; goal, the index of the target domain; photos and true, uint8 [n, 3, SIZE, SIZE], in the
    source and the target domain; others: of other persons in the target domain.
    """

    def __init__(self, settings, n):
        z = ipl.sample_latents(n, faces.W_DIM, settings.seed)
        rng = torch.Generator().manual_seed(settings.seed)
        self.persons, others = faces.persons_from_z(z), faces.sample_persons(n, rng)
        source, target = map(plain_label, (settings.source, settings.target))
        self.goal = faces.DOMAINS.index(target)
        styles = [faces.styles_of(domain, n) for domain in (source, target)]
        both = pool.draw(self.persons, torch.stack(styles, 1), settings.seed, desc="the truth")
        self.photos, self.true = both.unbind(1)
        self.others = pool.draw(others, styles[1], settings.seed + 1, desc="other persons")


def see(eyes, rules, device, side, asked, n, desc, drawn):
    """{row: {name: tensor [n, ...]}}, what `look` sees in pictures of all rows.

    drawn: a function of a slice of range(n) -> {row: (pictures[, those they were made of])}.
    """
    at_once = max(4, min(32, 32 * 256**2 // side**2))
    parts = torch.arange(n).tensor_split(math.ceil(n / at_once))  # none of one picture
    found = {}
    with torch.no_grad(), tqdm(total=n, desc=desc, disable=None) as bar:
        for part in parts:
            i = slice(int(part[0]), int(part[-1]) + 1)
            now = {name for name, count in asked.items() if i.start < count}
            for row, pictures in drawn(i).items():
                found.setdefault(row, {})
                seen = look(eyes, rules, now, *(x.to(device) for x in pictures))
                for name, value in seen.items():
                    found[row].setdefault(name, []).append(value.cpu())
            bar.update(len(part))
    return {row: {name: torch.cat(x) for name, x in seen.items()} for row, seen in found.items()}


def look(eyes, rules, asked, x, y=None):
    """{name: tensor [B, ...]} of what metrics are made of.

    x: pictures, uint8 [B, 3, R, R]. y: those that they were made of; None: x is only to be compared
    with, and has no structure, classes or references of interest.
    """
    found, images = {}, 2 * formulas.unit(x) - 1
    if asked & {"frechet-clip", "kid-clip", "clip-score", "clip-real", "diversity"}:
        found["clip"] = eyes["clip"](images)
    if asked & {"frechet-judge", "kid-judge", "domain", "attributes"}:
        out = eyes["truth"](images)
        found["judge"], found["domain"] = out["features"], out["domain"].argmax(1)
        found["attributes"] = torch.stack([out[k].argmax(1) for k in faces.CATEGORIES], dim=1)
    if "identity" in asked:
        found["identity"] = eyes["truth"].identity(images)
    if asked & {"fid", "kid", "isc"}:
        found["pool3"], found["isc"] = eyes["tf"](x)
    if y is None:
        return found
    if "psnr" in asked:
        found["psnr"] = formulas.psnr(x, y)
    if "ssim" in asked:
        found["ssim"] = formulas.ssim(x, y)
    for name, edges in (("structure", formulas.sobel), ("scs", eyes.get("hed"))):
        if name in asked:
            of_x, of_y = edges(x), edges(y)
            found[name] = formulas.dice(of_x, of_y)
            found[f"{name} floor"] = formulas.dice(of_x, of_y.roll(1, 0))  # of another person
    if "id" in asked:
        found["id"] = (eyes["arcface"](x) * eyes["arcface"](y)).sum(1)
    if "is" in asked:
        found["is"] = metric_networks.class_logits(eyes["inception"], x, rules.sides)
    if "sifid" in asked:
        of_x, of_references = (
            formulas.normal(metric_networks.positions(eyes["inception"], z, rules.channels))
            for z in (x, eyes["reference"])
        )
        each = zip(*of_references, strict=True)
        found["sifid"] = torch.stack([formulas.frechet(one, of_x) for one in each], dim=1)
    if "intra-lpips" in asked:
        centers = eyes["lpips"](eyes["reference"])
        found["to centers"] = formulas.distances(eyes["lpips"](x), centers)
        found["pictures"] = x
    return found


# ----------------------------------------------------------------------------------------------
# Numbers and words


def score(eyes, rules, asked, found, known, truth):
    """{metric: number, "inf" or "nan"} of what `see` has found in one row's pictures.

    known: "real", what it has found in the real ones; "identities" of the persons' true photos.
    """
    real = known.get("real", {})

    def of(name, metric):
        return found[name][: asked[metric]]

    def mean(name, metric=None):
        return of(name, metric or name).float().mean().item()

    def distance(name):
        return formulas.frechet(formulas.normal(found[name]), formulas.normal(real[name])).item()

    def subsets():
        from torch_fidelity.metric_kid import kid_features_to_metric

        sizes = {"kid_subsets": 100, "kid_subset_size": SUBSET, "verbose": False}
        found_ = kid_features_to_metric(found["pool3"], real["pool3"], **sizes)
        return float(found_["kernel_inception_distance_mean"])

    def isc():
        from torch_fidelity.metric_isc import isc_features_to_metric

        return isc_features_to_metric(of("isc", "isc"), rules.splits)["inception_score_mean"]

    def same_person():
        nearest = (found["identity"] @ known["identities"].T).argmax(1)
        return (nearest == torch.arange(len(nearest))).float().mean().item()

    def clusters():
        pictures, device = of("pictures", "intra-lpips"), eyes["reference"].device

        def between(members):
            parts = pictures[members].to(device).split(8)
            x = torch.cat([eyes["lpips"](part) for part in parts])
            return formulas.distances(x, x).cpu()

        return formulas.in_clusters(of("to centers", "intra-lpips"), between)

    ways = {
        "frechet-clip": lambda: distance("clip"),
        "kid-clip": lambda: formulas.kid(found["clip"], real["clip"]),
        "clip-score": lambda: formulas.clip_score(found["clip"], eyes["text"].cpu()),
        "clip-real": lambda: formulas.similarity(found["clip"], real["clip"]),
        "diversity": lambda: formulas.diversity(found["clip"]),
        "psnr": lambda: mean("psnr"),
        "ssim": lambda: mean("ssim"),
        "structure": lambda: mean("structure"),
        "domain": lambda: (found["domain"] == truth.goal).float().mean().item(),
        "attributes": lambda: (
            (found["attributes"] == truth.persons.categories).float().mean().item()
        ),
        "identity": same_person,
        "frechet-judge": lambda: distance("judge"),
        "kid-judge": lambda: formulas.kid(found["judge"], real["judge"]),
        "is": lambda: formulas.inception_score(of("is", "is"), rules.splits),
        "isc": isc,
        "fid": lambda: distance("pool3"),
        "kid": subsets,
        "sifid": lambda: mean("sifid"),
        "scs": lambda: mean("scs"),
        "id": lambda: mean("id"),
        "intra-lpips": clusters,
    }
    row = {name: ways[name]() for name in asked}
    row |= {f"{x} floor": mean(f"{x} floor", x) for x in ("structure", "scs") if x in asked}
    return {name: x if math.isfinite(x) else str(x) for name, x in row.items()}


def tables(rows, shown, asked, n, columns=7):
    """Tables in Markdown of so many columns each, with a row for each of the rows."""
    titles = {}
    for name in shown:
        floor = " (floor)" * (f"{name} floor" in rows["source"])
        count = f" of {asked.get(name)}" * (asked.get(name, n) < n)
        titles[name] = f"{name}{count}{floor} {METRICS[name][0]}"

    def cell(row, name):
        def digits(x):
            return x if isinstance(x, str) else f"{x:.{METRICS[name][1]}f}"

        floor = f" ({digits(row[f'{name} floor'])})" if f"{name} floor" in row else ""
        return digits(row[name]) + floor if name in row else "-"

    for start in range(0, len(shown), columns):
        names = shown[start : start + columns]
        lines = [["", *(titles[name] for name in names)]]
        lines += [[row, *(cell(x, name) for name in names)] for row, x in rows.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines.insert(1, rule)
        yield "\n".join(
            "| " + " | ".join(
                x.ljust(width) if k == 0 else x.rjust(width)
                for k, (x, width) in enumerate(zip(line, widths, strict=True))
            ) + " |"
            for line in lines
        )  # fmt: skip


def digests(eyes):
    """{what: first 12 digits of the SHA-256} of the weights used."""
    files = {"CLIP": Path(eyes["clip file"]), "judge": miniature.JUDGE if "truth" in eyes else None}
    found = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for name, path in files.items()
        if path and path.is_file()
    }
    return found | {k: x.sha256 for k, x in eyes.items() if hasattr(x, "sha256")}


def notes_of(eyes, rules, protocol, asked, lacking, n):
    """Sentences below the tables: the protocol, what is compared, the weights, what is lacking."""
    notes = []
    if protocol:
        other = f", here {n}" * (n != rules.n)
        more = f"; {rules.note}" * bool(rules.note)
        notes.append(f"Protocol {protocol}: N {rules.n}{other}{more}")
    if "real" in eyes:
        notes.append(f"Compared with {eyes['real']}")
    if any("clip" in name for name in asked) or "diversity" in asked:
        name = Path(eyes["clip file"]).name
        notes.append(f"The CLIP is {name}; if it has trained a run, it is partial to that run")
    weights = ", ".join(f"{name} {x}" for name, x in digests(eyes).items())
    notes.append(f"Weights, SHA-256: {weights}")
    needs = dict.fromkeys(x for missing in lacking.values() for x in missing)
    for need in needs:
        names = ", ".join(name for name, missing in lacking.items() if need in missing)
        notes.append(f"- {names}: wanted: {NEEDS[need]}")
    return notes
