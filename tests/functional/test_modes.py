import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.kernels import CosineKernel


@pytest.mark.parametrize("by_features", [True, False])
def test_modes_are_the_clusters_by_size(by_features):
    x = torch.cat([oracles.clusters(3, 1)[i : i + 1].repeat(c, 1) for i, c in enumerate((2, 7, 4))])
    unit = CosineKernel.features if by_features else None
    modes = F.top_modes(x, modes=3, feature_map=unit)
    assert [m.share for m in modes] == pytest.approx([7 / 13, 4 / 13, 2 / 13])
    assert [set(m.samples) for m in modes] == [set(range(2, 9)), set(range(9, 13)), {0, 1}]


def test_novel_modes_are_those_the_reference_lacks():
    x = oracles.clusters(4, 3)
    found = F.novel_modes(x, x[:6], modes=10)
    assert len(found) == 2
    assert set().union(*(m.samples for m in found)) == set(range(6, 12))
    assert found[0].share == pytest.approx(0.25)
    assert F.novel_modes(x[:6], x, eta=3.0) == []
