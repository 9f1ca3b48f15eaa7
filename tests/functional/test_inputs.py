import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.kernels import CosineKernel
from tests.samples import rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.vendi_score(torch.empty(0, 3)), "no samples"),
        (lambda: F.vendi_score(torch.ones(3)), r"shape \[n, d\]"),
        (lambda: F.vendi_score(torch.tensor([[float("nan")]])), "NaN"),
        (lambda: F.vendi_score(torch.ones(2, 2), order=0), r"\(0, inf\]"),
        (lambda: F.vendi_score(torch.ones(2, 2), order=float("nan")), r"\(0, inf\]"),
        (lambda: F.vendi_score(torch.eye(3), truncation=0), "at least 1"),
        (lambda: F.conditional_vendi_score(torch.ones(3, 2), torch.ones(4, 2)), "one row of prompt features per sample"),
        (lambda: F.mmd(torch.ones(1, 2), torch.ones(4, 2), CosineKernel()), "unbiased=False"),
    ],
)
def test_degenerate_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.ken_score(rows(3, 2), rows(3, 4)), "embed both with the same model"),
        (lambda: F.ken_score(rows(3, 2), rows(3, 2), eta=-1), "at least 0"),
        (lambda: F.ken_score(rows(3, 2), torch.empty(0, 2)), "reference has no samples"),
        (lambda: F.scendi_score(rows(3, 2), rows(4, 2)), "one row of prompt features per sample"),
        (lambda: F.scendi_score(rows(3, 2), rows(3, 2), feature_map=rows(3, 2)), "needs a pair"),
        (lambda: F.fidelity_scores(rows(4, 2), rows(9, 2)), "below 4"),
        (lambda: F.frechet_distance(rows(1, 2), rows(9, 2)), "two samples"),
        (lambda: F.kid(rows(4, 2), rows(9, 2), subsets=0), "subsets"),
        (lambda: F.mmd(rows(4, 2), rows(4, 2), feature_map=rows(4, 2)), "must be a function"),
    ],
)
def test_invalid_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()
