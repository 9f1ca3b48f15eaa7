import torch

from kspec_guidance import KernelGuidance
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
