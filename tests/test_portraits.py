"""The redrawn world: every domain draws everybody, at every size, by the noise it is given."""

import pytest
import torch

from miniature import faces
from miniature.train import pool


@pytest.fixture(scope="module")
def persons():
    return faces.sample_persons(2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("domain", faces.DOMAINS)
def test_domains(persons, domain):
    styles = faces.styles_of(domain, 2)
    x = faces.render(persons, styles, 64)
    assert x.shape == (2, 3, 64, 64) and x.isfinite().all() and x.abs().max() <= 1
    assert x.std() > 0.1 and (x[0] - x[1]).abs().mean() > 0.05
    assert torch.equal(x, faces.render(persons, styles, 64))
    photo = faces.render(persons, faces.styles_of("photo", 2), 64)
    assert ((x - photo).abs().mean() < 1e-6) == (domain == "photo")


def test_chance_is_that_of_the_noise(persons):
    styles = faces.styles_of("photo", 2)
    first, again, other = (
        faces.render(persons, styles, 64, noise=torch.randn(1, 1, 64, 64, generator=rng))
        for rng in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    )
    assert torch.equal(first, again)
    assert 0.001 < (first - other).abs().mean() < 0.1  # grain and strands, not another person


def test_a_fairy_tale_is_decided_by_what_one_sees():
    persons = faces.sample_persons(200, torch.Generator().manual_seed(1))
    forms = [faces.FORMS[int(i)] for i in faces.forms_of(persons)]
    counts = {form: forms.count(form) for form in faces.FORMS}
    assert min(counts.values()) >= 30, counts


def test_a_pool_is_kept_for_what_was_asked(tmp_path):
    made = []

    def make():
        made.append(torch.ones(2))
        return made[-1]

    for n in (1, 1, 2, 2):
        torch.testing.assert_close(pool.kept(tmp_path / "pool.pt", make, n=n), torch.ones(2))
    assert len(made) == 2
