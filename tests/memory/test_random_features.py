import pytest
import torch

from kspec_guidance import RandomFeatureMemory
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import MemoryFileError


def feature_memory(prompts=True):
    phi = RandomFourierFeatures(GaussianKernel(1.0), 16, 64)
    psi = RandomFourierFeatures(GaussianKernel(1.0), 3, 16) if prompts else None
    return RandomFeatureMemory(phi, psi)


@pytest.mark.parametrize("prompts", [True, False])
def test_random_feature_sums_merge_exactly(prompts, g, tmp_path):
    x, t = torch.randn(30, 4, 2, 2, generator=g), torch.randn(30, 3, generator=g)
    whole, parts, rest = feature_memory(prompts), feature_memory(prompts), feature_memory(prompts)
    whole.add(x, t)
    for i in torch.randperm(20, generator=g).split(3):
        parts.add(x[i], t[i])
    rest.add(x[20:], t[20:])
    parts.merge(rest)
    assert torch.equal(parts.total, whole.total)
    assert len(parts) == 30
    assert parts.total.numel() == (64 * 16 if prompts else 64)
    parts.save(tmp_path / "r")
    again = feature_memory(prompts).restore(tmp_path / "r")
    assert torch.equal(again.total, parts.total)
    assert (len(again), again.shape) == (30, (4, 2, 2))
    with pytest.raises(MemoryFileError, match="other random features"):
        RandomFeatureMemory(RandomFourierFeatures(GaussianKernel(2.0), 16, 64)).restore(tmp_path / "r")


def test_coefficients_are_the_kernel_sums(g):
    x, t = torch.randn(9, 16, generator=g), torch.randn(9, 3, generator=g)
    memory = RandomFeatureMemory(
        RandomFourierFeatures(GaussianKernel(1.0), 16, 8192), RandomFourierFeatures(GaussianKernel(1.0), 3, 2048)
    )
    memory.add(x, t)
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (x, t))
    expected = (GaussianKernel(1.0)(u) * GaussianKernel(1.0)(v)).sum(1)
    found = (memory.feature_map(u) * memory.coefficients(v, u)).sum(1)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0)
