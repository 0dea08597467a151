"""The embedded world: persons, styles, captions, and the three committed networks."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ipl
import miniature
from checkpoints import load_generator
from miniature import captions, evaluate, faces, inspect
from miniature.judge import load_judge
from miniature.train import clip as train_clip
from miniature.train.generator import CROSSOVER


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def generator():
    return load_generator(miniature.GENERATOR)


# ----------------------------------------------------------------------------
# Drawing


@pytest.mark.parametrize("domain", faces.DOMAINS)
def test_pictures_are_finite_in_range_and_the_same_twice(domain):
    persons = faces.sample_persons(4, rng())
    images = faces.render(persons, faces.styles_of(domain, 4))
    assert images.shape == (4, 3, 64, 64)
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, faces.render(persons, faces.styles_of(domain, 4)))


def test_a_photo_does_not_depend_on_its_batch():
    persons = faces.sample_persons(6, rng())
    together = faces.render(persons, faces.styles_of("photo", 6))
    alone = faces.render(persons[2:3], faces.styles_of("photo", 1))
    assert torch.allclose(together[2:3], alone, atol=1e-6)


def test_every_cue_changes_the_picture():
    persons = faces.sample_persons(8, rng())
    photo = faces.styles_of("photo", 8)
    before = faces.render(persons, photo)
    for i in range(len(faces.CUES)):
        styles = photo.clone()
        styles[:, i] = faces.DOMAINS.index("anime")
        assert (faces.render(persons, styles) - before).abs().mean() > 1e-3, faces.CUES[i]


@pytest.mark.parametrize("factor", faces.CATEGORIES)
def test_every_category_changes_the_photo(factor):
    persons = faces.sample_persons(64, rng())
    i = list(faces.CATEGORIES).index(factor)
    categories = persons.categories.clone()
    categories[:, i] = (categories[:, i] + 1) % len(faces.CATEGORIES[factor][0])
    photo = faces.styles_of("photo", 64)
    other = faces.render(faces.Persons(categories, persons.proportions), photo)
    assert (other - faces.render(persons, photo)).abs().mean() > 1e-3


def test_persons_have_the_frequencies_of_the_table():
    persons = faces.sample_persons(20_000, rng())
    for name, (_, probabilities) in faces.CATEGORIES.items():
        counts = persons.category(name).bincount(minlength=len(probabilities)) / len(persons)
        assert torch.allclose(counts, torch.tensor(probabilities), atol=0.015), name
    assert persons.proportions.abs().max() <= 1


def test_the_code_tells_persons_apart():
    persons = faces.sample_persons(500, rng())
    w = faces.persons_to_w(persons)
    assert w.shape == (500, faces.W_DIM)
    assert len(w.unique(dim=0)) == 500


# ----------------------------------------------------------------------------
# Captions


def test_a_caption_fits_its_own_picture_and_says_the_domain():
    persons, words = faces.sample_persons(32, rng()), random.Random(0)
    styles = torch.randint(len(faces.DOMAINS), (32, 1), generator=rng()).repeat(1, 6)
    styles[::2, :2] = 1  # mixtures
    written = [captions.write(c, s, words) for c, s in zip(persons.categories, styles, strict=True)]
    says = torch.tensor([caption.says for caption in written])
    assert captions.fits(persons.categories, styles, says).diagonal().all()
    for caption, s in zip(written, styles, strict=True):
        for domain in {faces.DOMAINS[int(i)] for i in s}:
            assert domain in caption.text


def test_a_caption_does_not_fit_another_domain():
    persons = faces.sample_persons(2, rng())
    same_person = persons.categories[:1].repeat(2, 1)
    styles = torch.stack([faces.styles_of("photo", 1)[0], faces.styles_of("anime", 1)[0]])
    written = [captions.write(same_person[i], styles[i], random.Random(1)) for i in range(2)]
    says = torch.tensor([caption.says for caption in written])
    assert captions.fits(same_person, styles, says).equal(torch.eye(2, dtype=torch.bool))


def test_background_is_a_factor_of_persons_and_a_cue():
    assert len(set(captions.FACTORS)) == len(captions.FACTORS) == 16
    person, style = faces.sample_persons(1, rng()).categories[0], faces.styles_of("photo", 1)[0]
    says = captions.write(person, style, random.Random(0), short=1.0).says
    said = [factor for factor, spoken in zip(captions.FACTORS, says, strict=True) if spoken]
    assert said == list(captions.STYLE)


def test_a_shared_prompt_says_only_what_the_target_shows():
    words, i = random.Random(0), captions.FACTORS.index("hair_color")
    for c in faces.sample_persons(20, rng()).categories:
        phrases, (photo, elderly) = captions.speak_of(c, "elderly", words)
        assert phrases and not elderly[i]
        assert sum(photo) - sum(elderly) == photo[i]


def test_looks_are_what_is_drawn():
    persons = faces.sample_persons(500, rng())
    photo, negative, sketch = (
        captions.looks(persons.categories, faces.styles_of(d, 500))
        for d in ("photo", "negative", "sketch")
    )
    hat_color = captions.FACTORS.index("hat_color")
    for i, factor in enumerate(faces.CATEGORIES):
        if i != hat_color:  # not to be seen without a hat
            assert photo[:, i].equal(persons.categories[:, i]), factor
        drawn = [negative[:, i].equal(photo[:, i]), sketch[:, i].equal(photo[:, i])]
        assert drawn == [factor not in faces.COLOR_FACTORS] * 2, factor
    for i, factor in enumerate(captions.FACTORS):
        assert negative[:, i].max() < captions.LOOKS[factor]
        assert sketch[:, i].max() < captions.LOOKS[factor]


@pytest.mark.parametrize("cue", faces.CUES)
def test_looks_of_the_wall_change_where_it_does(cue):
    """Another wall, one cue of another domain: seen exactly if it is drawn."""
    persons, at = faces.sample_persons(8, rng()), captions.FACTORS.index("background")
    categories = persons.categories.clone()
    categories[:, at] = (categories[:, at] + 1) % 6
    for domain in faces.DOMAINS:
        styles = faces.styles_of("photo", 8)
        styles[:, faces.CUES.index(cue)] = faces.DOMAINS.index(domain)
        pair = [faces.Persons(c, persons.proportions) for c in (persons.categories, categories)]
        a, b = (faces.render(x, styles) for x in pair)
        seen = captions.looks(pair[0].categories, styles), captions.looks(categories, styles)
        drawn = (a - b).abs().mean() > 0.06
        assert (seen[0][:, at] != seen[1][:, at]).all() == drawn, domain


def test_unknown_words_are_named_and_labels_are_known():
    assert captions.unknown_words("a purple cyberpunk photo") == ["cyberpunk"]
    for label in miniature.LABELS:
        assert captions.unknown_words(label) == []


# ----------------------------------------------------------------------------
# The committed networks


def test_the_generator_draws_the_person_of_its_latent(generator):
    z = torch.randn(128, generator.z_dim, generator=rng(1))
    persons = faces.persons_from_z(z)
    truth = faces.render(persons, faces.styles_of("photo", 128))

    with torch.no_grad():
        assert psnr(generator.synthesis(faces.persons_to_w(persons)), truth) > 33
        assert psnr(generator.synthesis(generator.mapping(z)), truth) > 30
    assert sum(p.numel() for p in generator.parameters()) < 2_000_000


def psnr(images, truth):
    error = (images.clamp(-1, 1) - truth).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).median()


@torch.no_grad()
def test_style_mixing_coarse_is_shape_and_fine_is_colour(generator):
    a, b = faces.sample_persons(64, rng(7)), faces.sample_persons(64, rng(8))
    ws = faces.persons_to_w(a)[:, None].repeat(1, generator.num_ws, 1)
    ws[:, CROSSOVER:] = faces.persons_to_w(b)[:, None]
    categories = a.categories.clone()
    colors = [list(faces.CATEGORIES).index(k) for k in faces.COLOR_FACTORS]
    categories[:, colors] = b.categories[:, colors]
    mixed, photo = generator.synthesis(ws), faces.styles_of("photo", 64)
    truth = faces.render(faces.Persons(categories, a.proportions), photo)
    assert psnr(mixed, truth) > 30
    assert psnr(mixed, faces.render(a, photo)) < 20 and psnr(mixed, faces.render(b, photo)) < 20


@torch.no_grad()
def test_truncation_makes_proportions_milder(generator):
    persons, photo = faces.sample_persons(64, rng(9)), faces.styles_of("photo", 64)
    w = ipl.truncate(faces.persons_to_w(persons), generator.w_avg, 0.6)
    milder = faces.Persons(persons.categories, persons.proportions * 0.6)
    images = generator.synthesis(w)
    assert psnr(images, faces.render(milder, photo)) > 28
    assert psnr(images, faces.render(milder, photo)) > psnr(images, faces.render(persons, photo))


def label_features(clip_model):
    """Unit features [10, e] of a sentence about each domain."""
    texts = [f"a {domain} of a person" for domain in faces.DOMAINS]
    return torch.nn.functional.normalize(ipl.encode_texts(clip_model, texts), dim=-1)


def test_clip_tells_the_domains_apart():
    clip_model, transform = ipl.load_clip(miniature.CLIP)
    labels = label_features(clip_model)
    persons, right = faces.sample_persons(32, rng(2)), []
    for i, domain in enumerate(faces.DOMAINS):
        images = faces.render(persons, faces.styles_of(domain, 32))
        with torch.no_grad():
            found = (clip_model.encode_image(transform(images)) @ labels.T).argmax(1)
        right.append((found == i).float().mean())
        assert right[-1] > 0.9, domain
    assert torch.stack(right).mean() > 0.99


def test_clip_resists_an_attack():
    """Ten steps of projected gradient against the domain, at most 4 away on [-1, 1] pixels."""
    clip_model, transform = ipl.load_clip(miniature.CLIP)
    labels = label_features(clip_model)
    domains = torch.arange(len(labels)).repeat_interleave(8)
    images = faces.render(faces.sample_persons(len(domains), rng(2)), domains[:, None].repeat(1, 6))

    def logits(x):
        features = torch.nn.functional.normalize(clip_model.encode_image(transform(x)), dim=-1)
        return 20 * features @ labels.T

    def loss(x):
        return torch.nn.functional.cross_entropy(logits(x), domains)

    attacked = train_clip.attack(images, 4.0, loss, steps=10, rng=rng(3))
    distance = (attacked - images).flatten(1).norm(dim=1)
    assert distance.max() < 4.001 and loss(attacked) > loss(images) + 0.05
    assert (logits(attacked).argmax(1) == domains).float().mean() > 0.9


@pytest.mark.parametrize("domain", faces.DOMAINS)
def test_the_judge_reads_true_pictures(judge, domain):
    persons = faces.sample_persons(64, rng(3))
    photos = faces.render(persons, faces.styles_of("photo", 64))
    images = faces.render(persons, faces.styles_of(domain, 64))
    out = judge(images)
    assert (out["domain"].argmax(1) == faces.DOMAINS.index(domain)).float().mean() > 0.95
    read = [(out[k].argmax(1) == persons.category(k)).float() for k in faces.CATEGORIES]
    assert torch.stack(read).mean() > 0.75
    nearest = (judge.identity(images) @ judge.identity(photos).T).argmax(1)
    assert (nearest == torch.arange(64)).float().mean() > 0.75


def test_the_judge_is_not_fooled_by_blur_noise_and_tint(judge):
    photos = faces.render(faces.sample_persons(64, rng(4)), faces.styles_of("photo", 64))
    padded = torch.nn.functional.pad(photos, (1, 1, 1, 1), mode="replicate")
    disturbed = {
        "blur": torch.nn.functional.avg_pool2d(padded, 3, 1),
        "noise": (photos + 0.05 * torch.randn(photos.shape, generator=rng(5))).clamp(-1, 1),
        "bright": (photos + 0.12).clamp(-1, 1),
        "tint": (photos + torch.tensor([0.06, 0.0, -0.06])[:, None, None]).clamp(-1, 1),
    }
    for name, images in disturbed.items():
        assert (judge.domain_of(images) == 0).float().mean() > 0.9, name


def test_the_judges_shares_follow_the_cues(judge):
    persons = faces.sample_persons(64, rng(6))
    shares = []
    for cues in range(7):  # of anime, one after the other
        styles = faces.styles_of("photo", 64)
        styles[:, :cues] = faces.DOMAINS.index("anime")
        out = judge(faces.render(persons, styles))["domain"].softmax(1)
        shares.append(out[:, faces.DOMAINS.index("anime")].mean().item())
    assert shares == sorted(shares)
    assert max(abs(share - cues / 6) for cues, share in enumerate(shares)) < 0.2


# ----------------------------------------------------------------------------
# Evaluation


def test_true_pairs_are_the_persons_of_their_latents():
    z, photos, anime = miniature.true_pairs("photo", "anime", n=3)
    persons = faces.persons_from_z(z)
    assert photos.equal(faces.render(persons, faces.styles_of("photo", 3)))
    assert anime.equal(faces.render(persons, faces.styles_of("anime", 3)))
    assert miniature.true_pairs("photo", "photo with anime eyes") is None


def test_frechet_distance_of_normal_distributions():
    """|m|^2 + sum (s - t)^2 for axis-aligned normal distributions."""
    x = torch.randn(200_000, 3, generator=rng(), dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 0.5]) * torch.randn(200_000, 3, generator=rng(1)) + 2
    assert evaluate.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(x, y) == pytest.approx(3 * 4 + 1 + 0.25, rel=0.01)


def test_inception_counts_the_classes():
    sure = 50 * torch.eye(5)
    assert evaluate.inception(sure) == pytest.approx(5, rel=1e-4)
    assert evaluate.inception(sure[:1].repeat(4, 1)) == pytest.approx(1, rel=1e-4)


def test_interval_is_students():
    mean, half = evaluate.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.963, abs=0.01)


def test_truth_is_the_ceiling_and_the_source_the_floor(judge, generator):
    with torch.no_grad():
        truth = evaluate.Truth(48, 1, judge, generator)
        true = truth.figures(truth.draw("anime"), "anime")
        source = truth.figures(truth.generated, "anime")
    assert true["target"] > 0.95 and true["cues"] > 0.9 and true["diversity"] == 1
    assert source["target"] < 0.05 and source["structure"] == 1 and source["identity"] > 0.9
    assert true["frechet"] < source["frechet"] / 2  # of 48 pictures, too many for less


def test_evaluate_goes_on_where_it_was(tmp_path, monkeypatch, generator):
    short = dict(steps=1, batch=2, steps_mapper=1, batch_mapper=4)
    preset = evaluate.replace(ipl.MINIATURE, **short)
    monkeypatch.setattr(evaluate, "PUBLISHED", {"residual": "published"})
    one = dict(targets=("anime",), out=tmp_path, n=16, processes=1, preset=preset)
    cfg = evaluate.Config(**one, seeds=(1, 2))
    evaluate.main(cfg)
    table = (tmp_path / "table.md").read_text()
    for words in (*evaluate.METHODS, "ipl − nada", "truth", "±"):
        assert words in table
    monkeypatch.setattr(evaluate, "train", None)  # whatever is finished is not done again
    evaluate.main(cfg)
    assert (tmp_path / "table.md").read_text() == table
    (tmp_path / "anime-nada-2.json").unlink()
    with pytest.raises(TypeError):
        evaluate.main(cfg)
    with pytest.raises(ValueError, match="rows of another n; wanted: a new --out"):
        evaluate.main(evaluate.replace(cfg, n=17))


def test_evaluate_shares_the_machine(tmp_path):
    short = dict(steps=1, batch=2, steps_mapper=1, batch_mapper=4)
    preset = evaluate.replace(ipl.MINIATURE, **short)
    both = dict(targets=("anime",), methods=("nada", "ipl"), seeds=(1,), n=16, preset=preset)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        evaluate.main(evaluate.Config(**both, out=out, processes=processes))
    one, two = (json.loads((tmp_path / n / "anime-ipl-1.json").read_text()) for n in "12")
    assert one["cosine"] == pytest.approx(two["cosine"], abs=1e-3)
    first, second = (torch.load(tmp_path / n / "anime-ipl-1.pt", weights_only=True) for n in "12")
    torch.testing.assert_close(first, second, rtol=0, atol=0.02)


def test_evaluate_keeps_no_rows_of_other_settings(tmp_path):
    short = evaluate.replace(ipl.MINIATURE, steps=1)
    cfg = evaluate.Config(out=tmp_path, n=16, preset=short)
    evaluate.check_settings(cfg)
    evaluate.check_settings(cfg)
    other = evaluate.replace(cfg, n=17, preset=evaluate.replace(short, lr=0.5))
    with pytest.raises(ValueError, match="rows of another n, lr; wanted"):
        evaluate.check_settings(other)
    (tmp_path / "settings.json").unlink()
    evaluate.check_settings(cfg)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "anime-nada-1.json").write_text("{}")
    with pytest.raises(ValueError, match="rows of another n"):  # nobody knows of what they are
        evaluate.check_settings(cfg)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--targets", "cyberpunk"], "--targets cyberpunk; wanted: anime, sketch"),
        (["--methods", "nada", "nada"], "--methods is empty, or names one twice"),
        (["--seeds"], "--seeds is empty"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--preset.steps", "0"], "--steps must be at least 1"),
        (["--preset.source", "anime"], "--preset.source is fixed"),
        (["--run", "nowhere"], "nowhere is no finished run"),
    ],
)
def test_evaluate_answers_in_one_line(tmp_path, words, answer):
    command = [sys.executable, "-m", "miniature.evaluate", "--out", str(tmp_path / "out"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    errors = [line for line in done.stderr.splitlines() if line.startswith("evaluate: error: ")]
    assert done.returncode == 2 and len(errors) == 1 and answer in errors[0], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("domain", faces.DOMAINS[1:])
def test_inspect_knows_the_truth(domain):
    clip_model, transform = ipl.load_clip(miniature.CLIP)
    persons = faces.sample_persons(128, rng(inspect.Config.seed))
    row = inspect.row(clip_model, transform, persons, domain)
    assert 0 < row["floor"] < 0.5 and row["caption"] > row["NADA"] > 0.5
    assert max(row[cue] for cue in faces.CUES) <= 0.75  # none carries the way alone
    if domain in ("monster", "negative"):  # change by who it is, and the language can say so
        assert row["room"] >= 0.3 and row["caption"] >= row["NADA"] + 0.15
