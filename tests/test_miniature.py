"""The embedded world: persons, styles, captions, the three committed networks, the truth."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import rng

import ipl
import miniature
from checkpoints import load_generator
from cli.adapt import has_truth
from cli.settings import MINIATURE
from miniature import captions, faces, truth
from miniature.judge import load_judge


@pytest.fixture(scope="module")
def world():
    """Generator, and the truth of 48 persons, which knows the judge."""
    generator = load_generator(miniature.GENERATOR).requires_grad_(False)
    return generator, truth.Truth(48, 1, load_judge(), generator)


def draw(persons, domain="photo"):
    return faces.render(persons, faces.styles_of(domain, len(persons)))


def draw_with(persons, cues, domain):
    """Photos, but for some cues, which are of another domain -> pictures, styles."""
    styles = faces.styles_of("photo", len(persons))
    styles[:, [faces.CUES.index(cue) for cue in cues]] = faces.DOMAINS.index(domain)
    return faces.render(persons, styles), styles


def changed(persons, factor):
    """The same persons, with another value of one factor."""
    categories, i = persons.categories.clone(), list(faces.CATEGORIES).index(factor)
    categories[:, i] = (categories[:, i] + 1) % len(faces.CATEGORIES[factor][0])
    return faces.Persons(categories, persons.proportions)


def test_pictures_show_every_cue_and_every_category():
    persons = faces.sample_persons(32, rng())
    photos = draw(persons)  # which do not depend on the others of their batch
    torch.testing.assert_close(photos[2:3], draw(persons[2:3]), rtol=0, atol=1e-5)
    for domain in faces.DOMAINS:
        images = draw(persons[:4], domain)
        assert images.shape == (4, 3, 128, 128) and images.abs().max() <= 1, domain
    others = {cue: draw_with(persons, [cue], "anime")[0] for cue in faces.CUES}
    others |= {factor: draw(changed(persons, factor)) for factor in faces.CATEGORIES}
    for name, images in others.items():
        assert (images - photos).abs().mean() > 1e-3, name


def test_persons_have_the_frequencies_of_the_table():
    persons = faces.sample_persons(20_000, rng())
    for name, (_, probabilities) in faces.CATEGORIES.items():
        shares = persons.category(name).bincount(minlength=len(probabilities)) / len(persons)
        torch.testing.assert_close(shares, torch.tensor(probabilities), rtol=0, atol=0.015)


def test_a_caption_fits_its_own_picture_and_says_the_domain():
    persons, words = faces.sample_persons(32, rng()), random.Random(0)
    styles = torch.randint(len(faces.DOMAINS), (32, 1), generator=rng()).repeat(1, 6)
    styles[::2, :2] = 1  # mixtures
    written = [captions.write(c, s, words) for c, s in zip(persons.categories, styles, strict=True)]
    says = torch.tensor([caption.says for caption in written])
    assert captions.fits(persons.categories, styles, says).diagonal().all()
    for caption, s in zip(written, styles, strict=True):
        assert all(faces.DOMAINS[int(i)] in caption.text for i in s)
    # one person in two domains: no caption fits the other picture
    person = persons.categories[:1].repeat(2, 1)
    styles = torch.cat([faces.styles_of("photo", 1), faces.styles_of("anime", 1)])
    says = [captions.write(person[i], styles[i], random.Random(1)).says for i in range(2)]
    assert captions.fits(person, styles, torch.tensor(says)).tolist() == [[1, 0], [0, 1]]


def test_a_shared_prompt_says_only_what_the_target_shows():
    words, i = random.Random(0), captions.FACTORS.index("hair_color")
    for c in faces.sample_persons(20, rng()).categories:
        phrases, (photo, elderly) = captions.speak_of(c, "elderly", words)
        assert phrases and not elderly[i] and sum(photo) - sum(elderly) == photo[i]
    assert captions.unknown_words("a purple cyberpunk photo") == ["cyberpunk"]
    assert not any(captions.unknown_words(label) for label in miniature.LABELS)


def test_looks_are_what_is_drawn():
    categories = faces.sample_persons(500, rng()).categories
    domains = "photo", "negative", "sketch"
    photo, *others = (captions.looks(categories, faces.styles_of(d, 500)) for d in domains)
    for i, factor in enumerate(faces.CATEGORIES):
        if factor != "hat_color":  # not to be seen without a hat
            assert photo[:, i].equal(categories[:, i]), factor
        for looks in others:
            assert looks[:, i].equal(photo[:, i]) == (factor not in faces.COLOR_FACTORS), factor


def psnr(images, wanted):
    error = (images.clamp(-1, 1) - wanted).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).median()


def test_the_generator_draws_the_person_of_its_latent(world):
    generator, known = world
    assert psnr(generator.synthesis(faces.persons_to_w(known.persons)), known.photos) > 30


def test_clip_tells_the_domains_apart():
    clip_model, transform = ipl.load_clip(miniature.CLIP)
    texts = [f"a {domain} of a person" for domain in faces.DOMAINS]
    labels = F.normalize(ipl.encode_texts(clip_model, texts), dim=-1)
    persons = faces.sample_persons(32, rng(2))
    for i, domain in enumerate(faces.DOMAINS):
        logits = clip_model.encode_image(transform(draw(persons, domain))) @ labels.T
        assert (logits.argmax(1) == i).float().mean() > 0.96, domain


@pytest.mark.parametrize("domain", faces.DOMAINS)
def test_the_judge_reads_true_pictures(world, domain):
    _, known = world
    true = known.figures(known.draw(domain), domain)
    assert true["target"] > 0.95 and true["cues"] > 0.9
    assert true["attributes"] > (0.6 if domain == "sketch" else 0.75)  # a pencil has no colours
    assert true["identity"] > 0.75
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
        "tint": photos + torch.tensor([0.06, 0.0, -0.06])[:, None, None],
    }
    for name, images in disturbed.items():
        assert (judge.domain_of(images.clamp(-1, 1)) == 0).float().mean() > 0.9, name


def test_the_judges_shares_follow_the_cues(world):
    persons, shares = faces.sample_persons(64, rng(6)), []
    for n in range(7):  # cues of anime, one after the other
        images, _ = draw_with(persons, faces.CUES[:n], "anime")
        mean = world[-1].judge(images)["domain"].softmax(1).mean(0)
        shares.append(mean[faces.DOMAINS.index("anime")].item())
        assert abs(shares[-1] - n / 6) < 0.25
    assert shares == sorted(shares)


def test_true_pairs_are_the_persons_of_their_latents():
    z, *pair = miniature.true_pairs("photo", "anime", n=3)
    for images, domain in zip(pair, ("photo", "anime"), strict=True):
        torch.testing.assert_close(images, draw(faces.persons_from_z(z), domain))
    assert miniature.true_pairs("photo", "photo with anime eyes") is None


def test_labels_in_capitals_have_the_same_truth():
    settings = replace(MINIATURE, source="Photo ", target="Pixel  Art")
    assert has_truth(settings) and not has_truth(replace(settings, target="Pixels"))
    torch.testing.assert_close(
        miniature.true_pairs("Photo ", "Pixel  Art", n=1)[2],
        miniature.true_pairs("photo", "pixel art", n=1)[2],
        rtol=0, atol=0,
    )  # fmt: skip


def test_figures_have_their_known_values():
    """Frechet: |m|^2 + sum (s - t)^2 of normal distributions. Inception: the number of classes."""
    x = torch.randn(200_000, 3, generator=rng(), dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 0.5]) * torch.randn(200_000, 3, generator=rng(1)) + 2
    assert truth.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert truth.frechet(x, y) == pytest.approx(3 * 4 + 1 + 0.25, rel=0.01)
    assert truth.inception(50 * torch.eye(5)) == pytest.approx(5, rel=1e-4)
