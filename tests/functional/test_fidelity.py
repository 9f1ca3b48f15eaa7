import pytest
import torch

from kspec_guidance import functional as F
from tests.samples import rows


def test_frechet_distance_of_gaussians_matches_closed_form():
    x = rows(4000, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance exactly 1
    shift = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    assert F.frechet_distance(x, x + shift) == pytest.approx(9, rel=1e-6)
    assert F.frechet_distance(x, 3 * x) == pytest.approx(3 * 4, rel=1e-6)  # sum of (3 - 1)^2


def test_fidelity_scores_of_identical_distant_and_collapsed_sets():
    x = rows(60, 4)
    same, distant = F.fidelity_scores(x, x), F.fidelity_scores(x + 100, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (distant.precision, distant.recall, distant.density, distant.coverage) == (0, 0, 0, 0)
    collapsed = F.fidelity_scores(x[:1] + 1e-3 * rows(60, 4, 1), x)
    assert collapsed.precision == 1
    assert collapsed.recall < 0.1
    assert collapsed.coverage < 0.2
