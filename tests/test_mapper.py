"""Section 3: the latent mapper against the published one's numbers."""

import torch

import ipl


def test_golden(golden, mapper):
    g = golden["stage1"]
    ctx = mapper(g["w"])
    torch.testing.assert_close(ctx, g["prompts"], rtol=1e-4, atol=1e-5 * float(g["prompts"].max()))
    torch.testing.assert_close(ctx.flatten(1), g["mapper_out"], rtol=1e-4, atol=1e-4)


def test_batch_permutation_permutes_the_prompts(golden, mapper):
    w = golden["stage1"]["w"]
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(mapper(w[order]), mapper(w)[order])


def test_scale_of_w_does_not_matter(golden, mapper):
    w = golden["stage1"]["w"]
    torch.testing.assert_close(mapper(7 * w), mapper(w), rtol=1e-4, atol=1e-5)


def test_any_widths():
    assert ipl.LatentMapper(w_dim=5, n_ctx=3, ctx_dim=7)(torch.randn(2, 5)).shape == (2, 3, 7)


def test_initialisation():
    first, again, other = (
        ipl.LatentMapper(64, 4, 32, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    for a, b, c in zip(first.weights, again.weights, other.weights, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert abs(float(a.detach().std()) * first.lr_mul - 1) < 0.1
    assert all(not bias.any() for bias in first.biases)


def test_initialisation_leaves_the_global_seed_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ipl.LatentMapper(8, 4, 8, torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), expected)
