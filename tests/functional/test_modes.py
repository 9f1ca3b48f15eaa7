import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.kernels import CosineKernel


@pytest.mark.parametrize("use_feature_map", [True, False])
def test_top_modes_are_clusters_sorted_by_size(use_feature_map):
    x = torch.cat([oracles.clusters(3, 1)[i : i + 1].repeat(c, 1) for i, c in enumerate((2, 7, 4))])
    feature_map = CosineKernel.features if use_feature_map else None
    modes = F.top_modes(x, modes=3, feature_map=feature_map)
    assert [m.share for m in modes] == pytest.approx([7 / 13, 4 / 13, 2 / 13])
    assert [set(m.samples) for m in modes] == [set(range(2, 9)), set(range(9, 13)), {0, 1}]


def test_novel_modes_are_absent_from_reference():
    x = oracles.clusters(4, 3)
    novel = F.novel_modes(x, x[:6], modes=10)
    assert len(novel) == 2
    assert set().union(*(m.samples for m in novel)) == set(range(6, 12))
    assert novel[0].share == pytest.approx(0.25)
    assert F.novel_modes(x[:6], x, eta=3.0) == []
