import math

import pytest
import torch

from kspec_guidance.comparison import diversity_gap
from kspec_guidance.kernels import GaussianKernel
from tests.samples import rows


def modes(count, n, g):
    return torch.eye(20, dtype=torch.float64)[torch.randint(count, (n,), generator=g)]


def test_a_collapsed_generator_has_a_sure_gap_at_equal_numbers(g):
    found = diversity_gap(modes(4, 500, g), modes(12, 120, g))
    assert found.n == 120
    for scores in found.scores.values():
        assert scores.generated == pytest.approx(4, rel=0.1)
        assert scores.held_out == pytest.approx(12, rel=0.15)
        assert scores.is_sure
        assert scores.gap.low > 0
    assert found.generated_curve.x == found.held_out_curve.x
    assert max(found.generated_curve.x) == 120


def test_the_interval_of_equal_distributions_contains_zero_in_most_cases(g):
    sure = sum(diversity_gap(modes(8, 60, g), modes(8, 60, g)).scores["vendi"].is_sure for _ in range(30))
    assert sure <= 4


def test_more_samples_of_one_distribution_are_no_gap(g):
    x = torch.randn(900, 6, generator=g, dtype=torch.float64)
    found = diversity_gap(x[:100], x[100:], GaussianKernel(1.0))
    assert found.scores["vendi"].gap.low < 0 < found.scores["vendi"].gap.high  # at unequal sizes 70 against 250
    assert found.scores["rke"].held_out == pytest.approx(125, rel=0.5)  # in the limit (1 + 4)^3


def test_an_infinite_score_is_left_out():
    x = torch.eye(12, dtype=torch.float64)
    assert list(diversity_gap(x, x).scores) == ["vendi"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diversity_gap(rows(4, 2), rows(9, 2)), "at least 8"),
        (lambda: diversity_gap(rows(9, 2), rows(9, 3)), "same model"),
        (lambda: diversity_gap(rows(9, 2) * math.nan, rows(9, 2)), "generated contains NaN"),
        (lambda: diversity_gap(rows(9, 2), rows(9, 2), sizes=[10]), "sizes must lie"),
        (lambda: diversity_gap(rows(9, 2), rows(9, 2), level=2.0), "level"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
