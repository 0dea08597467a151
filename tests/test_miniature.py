"""The embedded world: persons, styles, captions, the three committed networks, the truth."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import rng

import ipl
import miniature
from checkpoints import load_generator
from miniature import captions, faces, truth
from miniature.judge import load_judge
from miniature.train import clip as train_clip
from miniature.train.generator import CROSSOVER


@pytest.fixture(scope="module")
def world():
    """Generator, and the truth of 48 persons, which knows the judge."""
    generator = load_generator(miniature.GENERATOR).requires_grad_(False)
    return generator, truth.Truth(48, 1, load_judge(), generator)


def draw(persons, domain="photo"):
    return faces.render(persons, faces.styles_of(domain, len(persons)))


def changed(persons, factor):
    """The same persons, with another value of one factor."""
    categories, i = persons.categories.clone(), list(faces.CATEGORIES).index(factor)
    categories[:, i] = (categories[:, i] + 1) % len(faces.CATEGORIES[factor][0])
    return faces.Persons(categories, persons.proportions)


# ----------------------------------------------------------------------------
# Drawing


@pytest.mark.parametrize("domain", faces.DOMAINS)
def test_pictures_are_finite_in_range_and_the_same_twice(domain):
    persons = faces.sample_persons(4, rng())
    images = draw(persons, domain)
    assert images.shape == (4, 3, 64, 64)
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, draw(persons, domain))


def test_a_photo_does_not_depend_on_its_batch():
    persons = faces.sample_persons(6, rng())
    torch.testing.assert_close(draw(persons)[2:3], draw(persons[2:3]), rtol=0, atol=1e-5)


def test_every_cue_and_every_category_changes_the_picture():
    persons = faces.sample_persons(32, rng())
    photos = draw(persons)
    for i, cue in enumerate(faces.CUES):
        styles = faces.styles_of("photo", 32)
        styles[:, i] = faces.DOMAINS.index("anime")
        assert (faces.render(persons, styles) - photos).abs().mean() > 1e-3, cue
    for factor in faces.CATEGORIES:
        assert (draw(changed(persons, factor)) - photos).abs().mean() > 1e-3, factor


def test_persons_have_the_frequencies_of_the_table_and_codes_of_their_own():
    persons = faces.sample_persons(20_000, rng())
    for name, (_, probabilities) in faces.CATEGORIES.items():
        shares = persons.category(name).bincount(minlength=len(probabilities)) / len(persons)
        torch.testing.assert_close(shares, torch.tensor(probabilities), rtol=0, atol=0.015)
    assert persons.proportions.abs().max() <= 1
    codes = faces.persons_to_w(persons[:500])
    assert codes.shape == (500, faces.W_DIM) and len(codes.unique(dim=0)) == 500


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
        assert all(faces.DOMAINS[int(i)] in caption.text for i in s)


def test_a_caption_does_not_fit_another_domain():
    person = faces.sample_persons(1, rng()).categories.repeat(2, 1)
    styles = torch.cat([faces.styles_of("photo", 1), faces.styles_of("anime", 1)])
    says = [captions.write(person[i], styles[i], random.Random(1)).says for i in range(2)]
    assert captions.fits(person, styles, torch.tensor(says)).tolist() == [[1, 0], [0, 1]]
    assert len(set(captions.FACTORS)) == len(captions.FACTORS) == 16
    short = captions.write(person[0], styles[0], random.Random(0), short=1.0).says
    said = [factor for factor, spoken in zip(captions.FACTORS, short, strict=True) if spoken]
    assert said == list(captions.STYLE)  # no factor of the person, such as the background


def test_a_shared_prompt_says_only_what_the_target_shows():
    words, i = random.Random(0), captions.FACTORS.index("hair_color")
    for c in faces.sample_persons(20, rng()).categories:
        phrases, (photo, elderly) = captions.speak_of(c, "elderly", words)
        assert phrases and not elderly[i]
        assert sum(photo) - sum(elderly) == photo[i]


def test_looks_are_what_is_drawn():
    categories = faces.sample_persons(500, rng()).categories
    domains = "photo", "negative", "sketch"
    photo, *others = (captions.looks(categories, faces.styles_of(d, 500)) for d in domains)
    for i, factor in enumerate(faces.CATEGORIES):
        if factor != "hat_color":  # not to be seen without a hat
            assert photo[:, i].equal(categories[:, i]), factor
        for looks in others:
            assert looks[:, i].equal(photo[:, i]) == (factor not in faces.COLOR_FACTORS), factor
    for looks in others:
        assert (looks.max(0).values < torch.tensor(list(captions.LOOKS.values()))).all()


@pytest.mark.parametrize("cue", faces.CUES)
def test_looks_of_the_wall_change_where_it_does(cue):
    """Another wall, one cue of another domain: seen exactly if it is drawn."""
    persons, at = faces.sample_persons(8, rng()), captions.FACTORS.index("background")
    pair = persons, changed(persons, "background")
    for domain in faces.DOMAINS:
        styles = faces.styles_of("photo", 8)
        styles[:, faces.CUES.index(cue)] = faces.DOMAINS.index(domain)
        a, b = (faces.render(x, styles) for x in pair)
        seen = [captions.looks(x.categories, styles)[:, at] for x in pair]
        assert (seen[0] != seen[1]).all() == ((a - b).abs().mean() > 0.06), domain


def test_unknown_words_are_named_and_labels_are_known():
    assert captions.unknown_words("a purple cyberpunk photo") == ["cyberpunk"]
    assert not any(captions.unknown_words(label) for label in miniature.LABELS)


# ----------------------------------------------------------------------------
# The committed networks


def psnr(images, wanted):
    error = (images.clamp(-1, 1) - wanted).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).median()


def test_the_generator_draws_the_person_of_its_latent(world):
    generator, known = world
    assert psnr(generator.synthesis(faces.persons_to_w(known.persons)), known.photos) > 33
    assert psnr(known.generated, known.photos) > 30
    assert sum(p.numel() for p in generator.parameters()) < 2_000_000


def test_style_mixing_coarse_is_shape_and_fine_is_colour(world):
    generator, _ = world
    a, b = faces.sample_persons(64, rng(7)), faces.sample_persons(64, rng(8))
    ws = faces.persons_to_w(a)[:, None].repeat(1, generator.num_ws, 1)
    ws[:, CROSSOVER:] = faces.persons_to_w(b)[:, None]
    categories = a.categories.clone()
    colors = [list(faces.CATEGORIES).index(k) for k in faces.COLOR_FACTORS]
    categories[:, colors] = b.categories[:, colors]
    mixed = generator.synthesis(ws)
    assert psnr(mixed, draw(faces.Persons(categories, a.proportions))) > 30
    assert psnr(mixed, draw(a)) < 20 and psnr(mixed, draw(b)) < 20


def test_truncation_makes_proportions_milder(world):
    generator, persons = world[0], faces.sample_persons(64, rng(9))
    w = ipl.truncate(faces.persons_to_w(persons), generator.w_avg, psi=0.6)
    images = generator.synthesis(w)
    milder = draw(faces.Persons(persons.categories, persons.proportions * 0.6))
    assert psnr(images, milder) > max(28, psnr(images, draw(persons)))


def test_clip_tells_the_domains_apart():
    logits, persons = domain_logits(), faces.sample_persons(32, rng(2))
    for i, domain in enumerate(faces.DOMAINS):
        assert (logits(draw(persons, domain)).argmax(1) == i).float().mean() > 0.96, domain


@pytest.mark.slow
def test_clip_resists_an_attack():
    """Ten steps of projected gradient against the domain, at most 4 away on [-1, 1] pixels."""
    logits, domains = domain_logits(), torch.arange(10).repeat_interleave(8)
    images = faces.render(faces.sample_persons(len(domains), rng(2)), domains[:, None].repeat(1, 6))

    def loss(x):
        return F.cross_entropy(logits(x), domains)

    attacked = train_clip.attack(images, 4.0, loss, steps=10, rng=rng(3))
    distance = (attacked - images).flatten(1).norm(dim=1)
    assert distance.max() < 4.001 and loss(attacked) > loss(images) + 0.05
    assert (logits(attacked).argmax(1) == domains).float().mean() > 0.9


def domain_logits():
    """How near the CLIP sees images to each domain: a function of them -> [B, 10]."""
    clip_model, transform = ipl.load_clip(miniature.CLIP)
    texts = [f"a {domain} of a person" for domain in faces.DOMAINS]
    labels = F.normalize(ipl.encode_texts(clip_model, texts), dim=-1)
    return lambda x: 20 * F.normalize(clip_model.encode_image(transform(x)), dim=-1) @ labels.T


@pytest.mark.parametrize("domain", faces.DOMAINS)
def test_the_judge_reads_true_pictures(world, domain):
    _, known = world
    true = known.figures(known.draw(domain), domain)
    assert true["target"] > 0.95 and true["cues"] > 0.9
    assert true["attributes"] > 0.75 and true["identity"] > 0.75
    assert true["diversity"] == pytest.approx(1)
    if domain != "photo":  # the truth is the ceiling, the source the floor
        source = known.figures(known.generated, domain)
        assert source["target"] < 0.05 and source["identity"] > 0.9
        assert source["structure"] == pytest.approx(1)
        assert true["frechet"] < source["frechet"] / 1.5  # of 48 pictures, too many for less


def test_the_judge_is_not_fooled_by_blur_noise_and_tint(world):
    judge, photos = world[-1].judge, draw(faces.sample_persons(64, rng(4)))
    disturbed = {
        "blur": F.avg_pool2d(F.pad(photos, (1, 1, 1, 1), mode="replicate"), 3, 1),
        "noise": photos + 0.05 * torch.randn(photos.shape, generator=rng(5)),
        "bright": photos + 0.12,
        "tint": photos + torch.tensor([0.06, 0.0, -0.06])[:, None, None],
    }
    for name, images in disturbed.items():
        assert (judge.domain_of(images.clamp(-1, 1)) == 0).float().mean() > 0.9, name


def test_the_judges_shares_follow_the_cues(world):
    persons, anime, shares = faces.sample_persons(64, rng(6)), faces.DOMAINS.index("anime"), []
    for cues in range(7):  # of anime, one after the other
        styles = faces.styles_of("photo", 64)
        styles[:, :cues] = anime
        out = world[-1].judge(faces.render(persons, styles))["domain"].softmax(1)
        shares.append(out[:, anime].mean().item())
    assert shares == sorted(shares)
    assert max(abs(share - cues / 6) for cues, share in enumerate(shares)) < 0.2


def test_true_pairs_are_the_persons_of_their_latents():
    z, *pair = miniature.true_pairs("photo", "anime", n=3)
    for images, domain in zip(pair, ("photo", "anime"), strict=True):
        torch.testing.assert_close(images, draw(faces.persons_from_z(z), domain))
    assert miniature.true_pairs("photo", "photo with anime eyes") is None


def test_figures_have_their_known_values():
    """Frechet: |m|^2 + sum (s - t)^2 of normal distributions. Inception: the number of classes."""
    x = torch.randn(200_000, 3, generator=rng(), dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 0.5]) * torch.randn(200_000, 3, generator=rng(1)) + 2
    assert truth.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert truth.frechet(x, y) == pytest.approx(3 * 4 + 1 + 0.25, rel=0.01)
    sure = 50 * torch.eye(5)
    assert truth.inception(sure) == pytest.approx(5, rel=1e-4)
    assert truth.inception(sure[:1].repeat(4, 1)) == pytest.approx(1, rel=1e-4)
