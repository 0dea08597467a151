"""The experiments on the embedded world: miniature/evaluate.py and miniature/inspect.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import rng
from PIL import Image

import ipl
import miniature
from cli.settings import MINIATURE, MINIATURE_DDPM
from miniature import evaluate, evaluate_diffusion, faces, inspect
from miniature.judge import Judge
from miniature.train import pool
from miniature.truth import Truth, as_pixels
from stylegan2_ops import Generator

SHORT = replace(MINIATURE, steps=1, batch=2, steps_mapper=1, batch_mapper=4, bank=4)
CFG = evaluate.Config(("anime",), seeds=(1,), n=16, bank=4, processes=1, preset=SHORT)
HASTY = pytest.mark.filterwarnings("ignore:after 1 steps", "ignore:stage 1 learned little")


@pytest.fixture
def one_painter(monkeypatch):
    """Pictures are drawn in this process: a new one takes longer to start than to draw so few."""

    def draw(persons, styles, seed, desc):
        return as_pixels(faces.render(persons, styles, noise=pool.chance(len(persons), seed)))

    monkeypatch.setattr(pool, "draw", draw)


def test_interval_is_students():
    assert evaluate.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3, pytest.approx(1.963, abs=0.001))


def known_bank(source, n=4):
    """An oracle of n + 2 latents, of which n are its bank; their true pictures are all grey."""
    z, steps = torch.randn(n + 2, source.z_dim, generator=rng()), torch.eye(n + 2)
    pixels = torch.full((n, 3, source.resolution, source.resolution), 128, dtype=torch.uint8)
    return evaluate.Oracle(None, "anime", z, steps, n, pixels)


def test_the_oracle_knows_persons_by_their_latents(source):
    oracle = known_bank(source)
    found = torch.tensor([5, 0, 3])
    assert oracle.own(None, oracle.z[found]).equal(oracle.steps[found])
    drawn = oracle.rows(oracle.latents(rng(1))(100))
    assert drawn.unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(oracle.mean(None, oracle.z[:2])[0], oracle.steps[:4].mean(0))


def test_pixels_are_learned_and_the_source_stays(source):
    cfg, oracle = replace(MINIATURE, lr=0.02, steps=20), known_bank(source)
    before = {name: x.clone() for name, x in source.state_dict().items()}
    adapted = evaluate.adapt_to_pixels(cfg, source, oracle, rng())
    first, last = (g.synthesis(g.mapping(oracle.z)).abs().mean() for g in (source, adapted))
    assert last < 0.7 * first
    assert all(torch.equal(x, before[name]) for name, x in source.state_dict().items())
    kept = [name for name, x in adapted.named_parameters() if "noise" in name]
    assert kept and all(torch.equal(adapted.state_dict()[name], before[name]) for name in kept)


def test_reached_is_the_cosine_with_the_true_steps():
    pair = ipl.load_clip(miniature.CLIP)
    persons = faces.sample_persons(3, rng(0))
    photo, anime, sketch = (
        evaluate.encoded(*pair, faces.render(persons, faces.styles_of(domain, 3)))
        for domain in ("photo", "anime", "sketch")
    )
    steps = ipl.feature_delta(photo, anime)
    assert abs(evaluate.reached(photo, anime, steps) - 1) < 1e-5
    assert abs(evaluate.reached(anime, photo, steps) + 1) < 1e-5
    assert abs(evaluate.reached(photo, sketch, steps)) < 0.9


def test_figures_of_change_and_of_forms():
    """They ask for no trained network: a Truth with new ones has persons and pictures too."""
    torch.manual_seed(0)
    channels = dict.fromkeys((4, 8, 16, 32, 64, 128), 4)
    networks = Judge().eval(), Generator(128, channels, faces.W_DIM).eval()
    known = Truth(16, 0, *networks)
    figures = known.figures(known.generated, "fairy tale")
    assert figures["constant"] == 0 and figures["structure"] == pytest.approx(1)
    own = [figures[f"form {form}"] for form in faces.FORMS if f"form {form}" in figures]
    assert own and figures["forms"] == pytest.approx(sum(own) / len(own))
    signs = torch.ones(16, 1, 1, 1)
    stamped = known.figures(known.generated + 0.1 * signs, "anime")
    signs[::2] = -1
    assert stamped["constant"] == pytest.approx(1) and "forms" not in stamped
    assert known.figures(known.generated + 0.1 * signs, "anime")["constant"] < 1e-6
    true = known.summary("anime")
    assert true["rows"]["truth"]["diversity"] == pytest.approx(1)
    assert true["truth"].equal(as_pixels(known.draw("anime")[:5]))


def test_pictures_fit_the_docs(tmp_path):
    images = torch.rand(5, 3, 64, 64, generator=rng())
    images = (F.interpolate(images, scale_factor=2, mode="bilinear") * 255).to(torch.uint8)
    rows = dict.fromkeys(("photo", "NADA", "IPL", "truth"), images)
    evaluate.picture(rows, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (64 + 5 * 128, 4 * 128)
        assert image.mode == "P"  # a palette, so that it is small
    assert (tmp_path / "x.png").stat().st_size <= 200 << 10
    evaluate.picture(rows, tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "JPEG" and image.size == (64 + 5 * 128, 4 * 128)


def test_a_longer_stage_2_is_said_and_kept(tmp_path):
    cfg = replace(CFG, targets=("anime", "monster"), methods=("nada",), out=tmp_path)
    own = [evaluate.of_target(cfg, target) for target in cfg.targets]
    assert own == [{}, evaluate.LONG]
    kinds = ("nada", 1), ("source", None), ("truth", None)
    rows = {(t, *kind): dict.fromkeys(evaluate.SHOWN, 0.5) for t in cfg.targets for kind in kinds}
    head = "stage 2 of monster with steps 300"
    assert head in evaluate.table(rows, cfg)
    assert head not in evaluate.table(rows, replace(cfg, long=False))
    evaluate.hold_to(cfg, evaluate.settings_of(cfg))
    with pytest.raises(ValueError, match="rows of another long; wanted: a new --out"):
        evaluate.hold_to(cfg, evaluate.settings_of(replace(cfg, long=False)))


@HASTY
@pytest.mark.slow
def test_evaluate_goes_on_where_it_was(tmp_path, monkeypatch, one_painter):
    monkeypatch.setattr(evaluate, "PUBLISHED", {"residual": "published"})
    methods = "nada", "ipl", "published", "own", "pixels", "air"
    cfg = replace(CFG, methods=methods, seeds=(1, 2), out=tmp_path)
    evaluate.main(cfg)
    table = (tmp_path / "table.md").read_text()
    words = "ipl − nada", "truth", "constant", "±", "Anchors of air, mean cosine"
    assert all(x in table for x in (*methods, *words))
    for name in ("train", "Truth"):  # whatever is finished is not done again
        monkeypatch.setattr(evaluate, name, None)
    evaluate.main(cfg)
    assert (tmp_path / "table.md").read_text() == table
    (tmp_path / "anime-nada-2.json").unlink()
    with pytest.raises(TypeError):
        evaluate.main(cfg)
    other = replace(cfg, n=17, preset=replace(SHORT, lr=0.5))
    with pytest.raises(ValueError, match="rows of another n, lr; wanted: a new --out"):
        evaluate.main(other)


@HASTY
@pytest.mark.slow
def test_evaluate_shares_the_machine(tmp_path, one_painter):
    cfg = replace(CFG, methods=("mean", "caption"))
    for processes in (1, 2):
        evaluate.main(replace(cfg, out=tmp_path / str(processes), processes=processes))
    first, second = (evaluate.read(tmp_path / n / "anime-caption-1.pt") for n in "12")
    torch.testing.assert_close(first.float(), second.float(), rtol=0, atol=3)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"targets": ("cyberpunk",)}, "--targets cyberpunk; wanted: anime, sketch"),
        ({"methods": ("nada", "nada")}, "--methods is empty, or names one twice"),
        ({"preset": replace(MINIATURE, source="anime")}, "--preset.source is fixed"),
        (
            {"preset": replace(MINIATURE, seed=3)},
            "--preset.seed is each run's own; wanted: --seeds",
        ),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"run": Path("nowhere")}, "nowhere is no finished run"),
    ],
)
def test_evaluate_refuses(tmp_path, asked, answer):
    with pytest.raises(ValueError, match=answer):
        evaluate.main(evaluate.Config(out=tmp_path / "out", **asked))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"targets": ("cyberpunk",)}, "--targets cyberpunk; wanted: anime, sketch"),
        ({"methods": ("own",)}, "--methods own; wanted: nada, ipl"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"n": 3}, "--n must be at least 16, not 3"),
        ({"preset": replace(MINIATURE_DDPM, method="nada")}, "wanted: --methods"),
        ({"preset": MINIATURE}, "--preset.generator is fixed"),
    ],
)
def test_the_evaluation_of_diffusion_refuses(tmp_path, asked, answer):
    with pytest.raises(ValueError, match=answer):
        evaluate_diffusion.main(evaluate_diffusion.Config(out=tmp_path / "out", **asked))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("domain", ["monster", "anime"])
def test_inspect_knows_the_truth(domain):
    persons = faces.sample_persons(64, rng(inspect.Config.seed))
    row = inspect.row(*ipl.load_clip(miniature.CLIP), persons, domain)
    assert 0 < row["floor"] < 0.5 and row["caption"] > row["NADA"] > 0.5
    assert max(row[cue] for cue in faces.CUES) <= 0.75  # none carries the way alone
    if domain == "monster":  # changes by who it is, and the language can say so
        assert row["room"] >= 0.15 and row["caption"] >= row["NADA"] + 0.1
