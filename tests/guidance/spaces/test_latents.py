import pytest
import torch

from kspec_guidance import KernelGuidance
from kspec_guidance.features import RandomProjection
from kspec_guidance.guidance.spaces import Pooled
from kspec_guidance.loop.context import CallContext
from kspec_guidance.objectives import RKE
from tests.emoji import sample_latents


def test_pooled_features_are_block_means(g):
    x = torch.randn(2, 3, 8, 8, generator=g)
    expected = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).flatten(1)
    torch.testing.assert_close(Pooled(2).features(x, CallContext())[0], expected)
    clip = x[:, :, None].expand(-1, -1, 6, -1, -1)
    torch.testing.assert_close(
        Pooled(2).features(clip, CallContext())[0].unflatten(1, (3, 2, 4))[:, :, 0].flatten(1), expected
    )


@pytest.mark.parametrize(("n", "project"), [(1, 7), (3, 4), (2, 1)])
def test_projection_is_that_of_its_seed(n, project, g):
    x = torch.randn(n, 3, 5, 8, generator=g)
    matrix = RandomProjection(120, project, seed=3).matrix
    rows, pullback = Pooled(project=project, seed=3).features(x, CallContext())
    torch.testing.assert_close(rows, x.flatten(1) @ matrix)
    w = torch.randn(rows.shape, generator=g)
    torch.testing.assert_close(pullback(w), (w @ matrix.mT).view(x.shape))


def test_random_features_in_pooled_space_approximate_exact(pipe):
    from kspec_guidance.features import RandomFourierFeatures
    from kspec_guidance.kernels import GaussianKernel

    phi = RandomFourierFeatures(GaussianKernel(1.3), 144, 2048)
    guide = KernelGuidance(RKE(GaussianKernel(1.3), phi), 0.6, space="pooled", stop=0.6)
    moved = sample_latents(pipe, guide=guide)
    exact = sample_latents(pipe, guide=KernelGuidance(RKE(GaussianKernel(1.3)), 0.6, space="pooled", stop=0.6))
    plain = sample_latents(pipe)
    assert (moved - exact).norm() < 0.5 * (exact - plain).norm()
    assert guide.memory.total.numel() == 2048


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 10), (2, 3, 5, 6, 7), (2, 3, 40), (2, 3, 37)], ids=str)
def test_pooled_features_equal_adaptive_pooling(shape, g):
    x = torch.randn(*shape, generator=g)
    pool = getattr(torch.nn.functional, f"adaptive_avg_pool{x.ndim - 2}d")
    expected = pool(x, 9 if x.ndim == 3 else 3).flatten(1)
    torch.testing.assert_close(Pooled(3).features(x, CallContext())[0], expected)
    torch.testing.assert_close(Pooled(3).features(x.half(), CallContext())[0], expected, atol=1e-3, rtol=1e-3)


def test_projection_is_drawn_once(monkeypatch, g):
    from kspec_guidance.guidance.spaces import latents

    drawn = []
    latents._projection.cache_clear()
    monkeypatch.setattr(latents, "RandomProjection", lambda *a: drawn.append(a) or RandomProjection(*a))
    x = torch.randn(3, 4, 8, 8, generator=g)
    for _ in range(2):
        rows, pullback = Pooled(project=7).features(x, CallContext())
        pullback(rows)
        Pooled(project=7).shape(x)
    torch.testing.assert_close(rows, RandomProjection(256, 7)(x.flatten(1)))
    assert drawn == [(256, 7, 0)]
