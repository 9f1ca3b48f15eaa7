import pytest
import torch

from kspec_guidance.kernels.spectrum import renyi_entropy


def test_renyi_entropy_ignores_rounding_noise():
    l = torch.tensor([1e-18, 0.0, 1.0], dtype=torch.float64)
    assert renyi_entropy(l, 0.01).exp().item() == pytest.approx(1)
