"""python ipl.py metrics: cli/metric_formulas.py, cli/metric_networks.py and cli/metrics.py.

Formulas are held to golden/metrics.json, see metrics_golden.py, or to numbers worked out by hand.
"""

import contextlib
import json
import math
import shutil
import warnings
from dataclasses import asdict, replace
from unittest import mock

import metrics_golden
import pytest
import torch
from command import NADA, WORLD, answer, done
from conftest import close, normal
from PIL import Image
from scipy.stats import entropy

import miniature
from cli import metric_formulas as formulas
from cli import metric_networks as networks
from cli import metrics
from cli.settings import MINIATURE
from miniature import faces
from miniature.train import pool
from miniature.truth import as_pixels, frechet

GOLDEN = json.loads(metrics_golden.FILE.read_text())


def flat(*levels, side=12):
    """A picture of one grey level each, uint8 [n, 3, side, side]."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side)


# ----------------------------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize("side", [32, 400])
def test_psnr_and_ssim_are_those_of_piq(side):
    x, y = metrics_golden.pictures(4, side, side)
    close(formulas.psnr(x, y), GOLDEN[f"psnr {side}"])
    close(formulas.ssim(x, y), GOLDEN[f"ssim {side}"])
    assert formulas.psnr(x, x).isinf().all()
    assert formulas.ssim(x, x).tolist() == pytest.approx([1] * 4)


def test_sets_of_features_are_compared_as_by_torch_fidelity():
    a, b = metrics_golden.features()
    distance = formulas.frechet(*map(formulas.normal, (a, b)))
    assert distance.item() == pytest.approx(GOLDEN["frechet"])
    assert formulas.kid(a, b) == pytest.approx(GOLDEN["kid"])
    assert formulas.inception_score(3 * a, 10) == pytest.approx(GOLDEN["is"])


def test_frechet_of_a_batch_and_of_fewer_features_than_dimensions():
    a, few = normal(50, 8), normal(3, 5, 8, seed=1)
    found = formulas.frechet(formulas.normal(a), formulas.normal(few))
    expected = torch.tensor([frechet(a, x) for x in few], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    one_sided = formulas.frechet(formulas.normal(few[0]), formulas.normal(few[0]))
    assert abs(one_sided.item()) < 1e-6


def test_inception_score_is_rssas():
    logits = 2 * normal(20, 6)
    p = logits.softmax(1).double().numpy()
    parts = [p[:10], p[10:]]
    by_hand = [sum(entropy(x, part.mean(0)) for x in part) / 10 for part in parts]
    expected = torch.tensor(by_hand).exp().mean().item()
    assert formulas.inception_score(logits, splits=2) == pytest.approx(expected, rel=1e-5)


def test_edges_and_their_agreement_by_hand():
    """Of four pictures: a step of 51 in 255, twice; one of 153, which is cut off; and none."""
    x = flat(0, 0, 0, 80).clone()
    for i, level in enumerate((51, 51, 153)):
        x[i, :, :, 6:] = level
    edges = formulas.sobel(x)
    assert edges.shape == (4, 1, 10, 10)
    assert edges.amax((1, 2, 3)).tolist() == pytest.approx([0.8, 0.8, 1, 0], abs=1e-6)
    assert (edges > 0.01).sum((1, 2, 3)).tolist() == [20, 20, 20, 0]  # two columns of ten
    agreement = formulas.dice(edges, edges[[1, 2, 3, 3]])
    assert agreement.tolist() == pytest.approx([1, 2 * 0.8 / (0.64 + 1), 0, 1], abs=1e-5)


def test_scores_of_cosines_by_hand():
    x = torch.tensor([[3.0, 0], [0, 2], [-1, 0], [0, 0.5]])
    below_0_counts_as_0 = formulas.clip_score(x, torch.tensor([5.0, 0]))
    assert below_0_counts_as_0 == pytest.approx(25)
    assert formulas.similarity(x, torch.tensor([[1.0, 0], [0, 1]])) == pytest.approx(1 / 4)
    assert formulas.diversity(x) == pytest.approx(1 - (0 - 1 + 0 + 0 + 1 + 0) / 6)
    assert formulas.diversity(x[:1].expand(4, 2)) == pytest.approx(0)


def test_pictures_in_clusters_by_hand():
    """Four at 0, 1 and 10, 14 of a line, and one alone at 50."""
    x, centers = torch.tensor([[0.0], [1], [10], [14], [50]]), torch.tensor([[0.0], [12], [50]])
    between = lambda members: formulas.distances(x[members], x[members])  # noqa: E731
    found = formulas.in_clusters(formulas.distances(x, centers), between)
    assert found == pytest.approx((1 + 16) / 2)
    alone = formulas.in_clusters(torch.eye(2), between)
    assert math.isnan(alone)


# ----------------------------------------------------------------------------------------------
# Networks


def made(network, path):
    """A file of made-up weights for a network."""
    torch.save(metrics_golden.weights_like(network.state_dict()), path)
    return path


@torch.no_grad()
def test_hed_is_the_published_network(tmp_path):
    network = networks.load_hed(made(networks.Hed(), tmp_path / "hed.pt"))
    edges = network(metrics_golden.pictures(2, 64, 64)[0])
    close(edges.mean((1, 2, 3)), GOLDEN["hed"], rtol=0.01)
    close(edges[0, 0, ::16].mean(1), GOLDEN["hed rows"], rtol=0.02)
    assert len(network.sha256) == 12 and edges.equal(edges.round())


@torch.no_grad()
@pytest.mark.slow
def test_arcface_is_the_published_network(tmp_path, run):
    with torch.device("meta"):
        network = networks.ArcFace()
    network.load_state_dict(metrics_golden.weights_like(network.state_dict()), assign=True)
    found = network.eval()(metrics_golden.pictures(2, 256, 7)[0])
    close(found[:, :8], GOLDEN["arcface"], rtol=1e-3, scale=1e-3)
    torch.save(network.state_dict(), tmp_path / "arcface.pt")
    rows, _, _ = measured(run, "--n", "2", "--arcface", tmp_path / "arcface.pt", "--metrics", "id")
    assert rows["source"]["id"] == pytest.approx(1, abs=1e-4) and rows["run"]["id"] < 1


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    return made(networks.torchvision_inception(), folder / "inception.pt")


@torch.no_grad()
def test_positions_are_those_before_the_poolings(inception_file):
    network = networks.load_inceptions([inception_file])["inception"]
    x, _ = metrics_golden.pictures(2, 128, 5)
    maps, kept = {}, (network.Conv2d_2b_3x3, network.Conv2d_4a_3x3)
    for layer in kept:
        layer.register_forward_hook(lambda _, __, out: maps.update({out.shape[1]: out}))
    logits = networks.class_logits(network, x, sides=())
    assert logits.shape == (2, 1000)
    for channels, side in ((64, 61), (192, 28)):
        found = networks.positions(network, x, channels)
        assert found.shape == (2, side * side, channels)
        assert found[0, side + 1].equal(maps[channels][0, :, 1, 1])


@torch.no_grad()
@pytest.mark.slow
def test_torch_fidelitys_network_gets_the_weights(tmp_path, run):
    """Those of the file, which its constructor would run as a pickle."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = made(networks.tf_inception(), tmp_path / "tf.pt")
    names = ["2048", "logits_unbiased"]
    theirs = module.FeatureExtractorInceptionV3("inception", names, str(path))
    x, _ = metrics_golden.pictures(2, 64, 5)
    for a, b in zip(networks.load_inceptions([path])["tf"](x), theirs(x), strict=True):
        close(a, b)
    words = ["--real", run.parent / "real", "--inception", path, "--metrics", "fid", "isc"]
    rows, _, said = measured(run, "--n", "10", *words)
    assert rows["source"]["fid"] > 0 and rows["source"]["isc"] >= 1 and "fid of 2048" in said


def test_kid_is_of_subsets():
    """Of a thousand pictures each is all of them."""
    pytest.importorskip("torch_fidelity")
    a, b = normal(1000, 8).double(), normal(1000, 8, seed=1).double() + 0.1
    known, rules = {"real": {"pool3": b}}, metrics.Protocol()
    found = metrics.score({}, rules, {"kid": 1000}, {"pool3": a}, known, None)
    assert found["kid"] == pytest.approx(formulas.kid(a, b))


@torch.no_grad()
@pytest.mark.slow
def test_lpips_is_a_distance_of_embeddings(tmp_path, run):
    pytest.importorskip("lpips")
    from torchvision.models import vgg16

    with torch.device("meta"):
        layers = {f"features.{k}": x for k, x in vgg16().features.state_dict().items()}
    torch.save(metrics_golden.weights_like(layers), path := tmp_path / "vgg.pt")
    network = networks.load_lpips(path)
    x, y = metrics_golden.pictures(2, 256, 5)
    theirs = network.model(2 * formulas.unit(x) - 1, 2 * formulas.unit(y) - 1).flatten()
    close(formulas.distances(network(x), network(y)).diagonal(), theirs, rtol=0.01)
    picture = run.parent / "real" / "0.png"  # one center, which all are nearest to
    words = ["--lpips", path, "--reference", picture, "--metrics", "intra-lpips"]
    assert measured(run, "--n", "3", *words)[0]["source"]["intra-lpips"] > 0


@pytest.mark.slow
def test_golden_values_are_those_of_the_libraries():
    for name in ("torch_fidelity", "piq"):
        pytest.importorskip(name)
    for name, value in metrics_golden.values().items():
        assert GOLDEN[name] == pytest.approx(value, rel=1e-4)


# ----------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of tiny networks; beside it a folder of three pictures, and one of a jpeg."""
    folder = tmp_path_factory.mktemp("metrics")
    done(*WORLD, *NADA, "--out", folder / "run")
    x, _ = metrics_golden.pictures(3, 40, 3)
    for name, suffix, n in (("real", "png", 3), ("one", "jpg", 1), ("empty", "", 0)):
        (folder / name).mkdir()
        for i in range(n):
            picture = Image.fromarray(x[i].permute(1, 2, 0).numpy())
            picture.save(folder / name / f"{i}.{suffix}")
    torch.save({"head.weight": torch.ones(3, 3)}, folder / "head.pt")
    return folder / "run"


def measured(run, *words):
    """({row: {metric: number}}, what is printed, what is warned of)."""
    out = run.parent / "metrics.json"
    code, printed, said = answer("metrics", "--run", run, "--out", out, *words)
    assert code == 0, said
    content = json.loads(out.read_text())
    return {row["name"]: row for row in content["rows"]}, printed, said


def test_a_table_of_a_run(run):
    rows, printed, said = measured(run, "--n", "5")
    assert list(rows) == ["source", "run"]
    source, adapted = rows.values()
    assert source["psnr"] == "inf" and source["structure"] == 1 == pytest.approx(source["ssim"])
    assert adapted["psnr"] > 0 and adapted["structure floor"] < 1
    assert "frechet-clip" not in source and "--real DIR" in printed and " inf |" in printed
    assert "N 5, seed 1, psi 0.7" in printed and "CLIP " in printed


def test_real_pictures_and_few_of_them(run):
    names = "frechet-clip kid-clip clip-real".split()
    real = run.parent / "real"
    rows, printed, said = measured(run, "--n", "4", "--real", real, "--metrics", *names)
    assert "3 pictures of" in printed and "singular" in said
    assert all(isinstance(rows[row][name], float) for row in rows for name in names)
    shutil.copy(run.parent / "one" / "0.jpg", real / "3.jpg")
    assert "lossy" in measured(run, "--n", "4", "--real", real, "--metrics", "clip-real")[2]


def test_a_protocol_without_its_files_says_what_it_lacks(run):
    rows, printed, _ = measured(run, "--protocol", "air", "--n", "3")
    assert "N 5000, here 3" in printed and "psi 0.7" in printed
    for words in ("fid", "torch-fidelity", "network-bsds500.pytorch", "--reference", "vgg16"):
        assert words in printed
    assert not {"fid", "is", "scs", "sifid"} & rows["run"].keys()


def test_files_given_are_used(run, tmp_path, inception_file):
    """With the source generator as the run: SCS is 1, and SIFID of a picture with itself 0."""
    hed = made(networks.Hed(), tmp_path / "hed.pt")
    picture, words = run.parent / "real" / "0.png", ["--hed", hed, "--inception", inception_file]
    rows, printed, _ = measured(
        run, "--n", "2", *words, "--reference", picture, "--metrics", "scs", "sifid"
    )
    assert rows["source"]["scs"] == 1 > rows["source"]["scs floor"]
    assert rows["run"]["sifid"] > 0 and printed.count("hed ") == 1
    assert networks.load_hed(hed).sha256 in printed


def one_painter(persons, styles, seed, *, desc):
    """pool.draw in this process: a new one takes longer to start than to draw so few."""
    several = styles if styles.ndim == 3 else styles[:, None]
    drawn = [as_pixels(faces.render(persons, x)) for x in several.unbind(1)]
    return torch.stack(drawn, 1) if styles.ndim == 3 else drawn[0]


def test_the_embedded_world_has_the_truth(tmp_path):
    """A run that has changed nothing is the source, whose attributes and persons are kept."""
    (tmp_path / "run").mkdir()
    shutil.copy(miniature.GENERATOR, tmp_path / "run" / "generator.pt")
    config = asdict(replace(MINIATURE, target="anime"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with mock.patch.object(pool, "draw", one_painter):
        rows, printed, said = measured(tmp_path / "run", "--n", "6")
    assert list(rows) == ["source", "run", "truth"]
    source, adapted, truth = rows.values()
    assert {**source, "name": "", "run": ""} == {**adapted, "name": "", "run": ""}
    assert source["domain"] == 0 and truth["domain"] == 1 == truth["identity"]
    assert min(x["attributes"] for x in rows.values()) > 0.7
    assert truth["frechet-judge"] < source["frechet-judge"]
    assert truth["clip-score"] > source["clip-score"] and "singular" in said
    assert "judge " in printed and "6 true pictures" in printed


ROWS = [  # (words behind --run run, a word of the answer)
    ("--n 1", "--n 1"), ("--n 0", "--n"), ("--metrics fdi", "'fdi'"), ("--protocol nada", "air"),
    ("--out metrics.csv", ".json"), ("--real nowhere", "nowhere"), ("--real empty", "found: 0"),
    ("--real one", "found: 1"), ("--hed nowhere.pt", "nowhere.pt"), ("--run run", "twice"),
    ("--hed head.pt", "moduleVggOne"), ("--inception head.pt", "fc.bias"),
    ("--arcface head.pt", "input_layer"), ("--arcface run/generator.pt", "g_ema"),
    ("--run nowhere", "nowhere"), ("--run other", "'sketch'"),
    ("--reference run/config.json", "config.json"),
    ("--clip nowhere.pt", "nowhere.pt"), ("--device warp", "warp"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "word"), ROWS)
def test_one_line_and_no_file(run, words, word):
    with contextlib.chdir(run.parent):
        if not (other := run.parent / "other").exists():
            shutil.copytree(run, other)
            config = json.loads((other / "config.json").read_text())
            (other / "config.json").write_text(json.dumps(config | {"target": "sketch"}))
        before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}
        code, out, err = answer("metrics", "--run", "run", *words.split())
        assert {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")} == before
    *warned, error = err.splitlines()
    assert code == 2 and error.startswith("ipl.py: error: ") and word in error and not out
    assert not any("rror" in line for line in warned)


def test_no_run():
    code, _, err = answer("metrics", "--metrics", "psnr")
    assert code == 2 and "--run" in err


def test_too_few_pictures():
    rules = metrics.Protocol()
    for names, words in ((["kid"], "kid is of 1000 .* 999"), (["is"], "is is of 10 .* 9;")):
        with pytest.raises(ValueError, match=words):
            metrics.check_numbers(names, int(words.split()[-1].strip(";")), 2000, rules, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.check_numbers(["frechet-judge", "is"], 300, 300, rules, {})
