import math
import warnings

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import metrics
from kspec_guidance import testing as oracles
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.statistics import (
    bandwidth_curve,
    compare,
    compare_paired,
    convergence_curve,
    effective_number_interval,
    jackknife,
    jackknife_interval,
    kid_interval,
)


def rows(n, d, seed=0, spread=1.0):
    return spread * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_jackknife_of_mean_matches_standard_error():
    x = rows(40, 1)
    result = jackknife(lambda z: z.mean(), x, groups=40)
    assert result.standard_error == pytest.approx((x.var() / 40).sqrt().item(), rel=1e-9)
    assert result.high - result.value == pytest.approx(2.0227 * result.standard_error, rel=1e-4)  # Student, 39 degrees


def coverage(intervals, truth=None):
    """Share of 95% intervals that contain the truth, by default the mean value of the independent draws."""
    truth = sum(r.value for r in intervals) / len(intervals) if truth is None else truth
    return sum(r.low <= truth <= r.high for r in intervals) / len(intervals)


def test_jackknife_interval_of_mean_has_nominal_coverage():
    draws = [jackknife(lambda z: z.mean(), rows(60, 1, seed), groups=12, seed=seed) for seed in range(200)]
    assert 0.9 <= coverage(draws, truth=0.0) <= 0.99


def mixture(n, seed, shift=0.0):
    """Samples of five clusters of unequal weights."""
    g = torch.Generator().manual_seed(seed)
    of = torch.multinomial(torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05]), n, True, generator=g)
    return shift + 1.5 * rows(5, 4, 99)[of] + 0.3 * torch.randn(n, 4, generator=g, dtype=torch.float64)


K = GaussianKernel(1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "score",
    [
        lambda x, t: F.vendi_score(x, K),
        lambda x, t: F.vendi_score(x, K, 0.5),
        lambda x, t: F.vendi_score(x, truncation=3),
        lambda x, t: F.rke_score(x, K),
        lambda x, t: F.conditional_vendi_score(x, t, K, K),
        lambda x, t: F.information_vendi_score(x, t, K, K),
        lambda x, t: F.conditional_rke_score(x, t, K, K),
        lambda x, t: F.scendi_score(x, t),
        lambda x, t: F.prompt_vendi_score(x, t),
    ],
)
@pytest.mark.parametrize(("n", "groups"), [(60, 10), (63, 20)])
def test_jackknife_intervals_of_scores_have_nominal_coverage(score, n, groups):
    draws = []
    for seed in range(120):
        x = mixture(n, seed)
        draws.append(jackknife(score, x, x[:, :3] + 0.5 * rows(n, 3, seed + 999), groups=groups, seed=seed))
    assert 0.89 <= coverage(draws) <= 0.995
    errors = torch.tensor([r.standard_error for r in draws])
    assert 0.75 < errors.square().mean().sqrt() / torch.tensor([r.value for r in draws]).std() < 1.35


@pytest.mark.slow
def test_streaming_intervals_have_nominal_coverage():
    draws = []
    for seed in range(120):
        metric = metrics.VendiScore(groups=10)
        metric.update(mixture(80, seed))
        draws.append(metric.interval())
    assert 0.89 <= coverage(draws) <= 0.995


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "m", "shift", "size", "at_most"),
    [(80, 80, 2.0, 1000, 0.995), (40, 200, 1.0, 1000, 1), (120, 120, 1.0, 20, 1), (40, 40, 0.0, 1000, 1)],
)
def test_kid_intervals_have_nominal_coverage(n, m, shift, size, at_most):
    """Not below: equal distributions (the last) have wider intervals than needed."""
    draws = [kid_interval(mixture(n, s), mixture(m, s + 999, shift), subsets=20, subset_size=size) for s in range(120)]
    assert 0.89 <= coverage(draws) <= at_most


def test_kid_interval_of_whole_sets_has_width_and_covers():
    draws = [kid_interval(rows(40, 3, s), rows(40, 3, s + 99) + 1, subsets=10, subset_size=40) for s in range(40)]
    assert all(r.high > r.value > r.low for r in draws)
    assert coverage(draws) >= 0.85


def test_jackknife_leaves_out_rows_of_all_sets_together():
    x, prompt_features = rows(30, 5), rows(30, 3, 1)
    result = jackknife(F.scendi_score, x, prompt_features, groups=30)
    left_out = [F.scendi_score(*(torch.cat([s[:i], s[i + 1 :]]) for s in (x, prompt_features))) for i in range(30)]
    expected = jackknife_interval(F.scendi_score(x, prompt_features), torch.stack(left_out))
    assert result.standard_error == pytest.approx(expected.standard_error, rel=1e-9)
    assert str(result) == f"{expected.value:.3f} [{expected.low:.3f}, {expected.high:.3f}]"


def test_compare_rejects_only_different_distributions():
    k = GaussianKernel(2.0)
    score = lambda z: F.vendi_score(z, k)  # noqa: E731
    same = compare(rows(40, 4), rows(40, 4, 1), score, permutations=99)
    different = compare(rows(40, 4), rows(40, 4, 1, spread=0.3), score, permutations=99)
    assert same.p_value > 0.05
    assert different.p_value == pytest.approx(0.01)
    assert different.difference < 0
    assert compare(rows(9, 2), rows(9, 2)).p_value == 1  # identical rows


def test_compare_bounds_false_positive_rate():
    false_positives = sum(
        compare(rows(15, 2, s), rows(15, 2, s + 500), permutations=39, seed=s).p_value <= 0.05 for s in range(60)
    )
    assert false_positives <= 8  # 3 expected


def test_compare_unequal_sizes_warns_unless_matched():
    a, b = rows(30, 3), rows(90, 3, 1)
    with pytest.warns(UserWarning, match="pass matched=True"):
        compare(a, b, permutations=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(a, b, matched=True, permutations=9).n == (30, 30)


def test_compare_paired_p_values():
    a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    better = compare_paired(a, [v + 0.5 for v in a])
    assert better.p_value == pytest.approx(2 / 64)
    assert better.test == "all sign patterns"
    assert compare_paired(a, a).p_value == 1
    many = compare_paired([0.0] * 30, [1.0] * 30, permutations=999)
    assert many.p_value == pytest.approx(0.001)


def test_convergence_curve_of_truncated_vendi_flattens():
    x = rows(512, 6)
    curve = convergence_curve(x, GaussianKernel(1.5), truncation=16)
    assert curve.axis == "samples"
    assert curve.x[-1] == 512
    growth = {name: v[-1] / v[-2] for name, v in curve.mean.items()}
    assert growth["Vendi"] > growth["truncated Vendi, t = 16"] > 0.9
    assert growth["Vendi"] > 1.1
    assert curve.mean["Vendi"][-1] == pytest.approx(F.vendi_score(x, GaussianKernel(1.5)).item())


def test_bandwidth_curve_ranges_from_n_to_one():
    curve = bandwidth_curve(rows(40, 6), (0.01, 1.0, 100.0))
    assert curve.mean["Vendi"][0] == pytest.approx(40, rel=1e-3)
    assert curve.mean["Vendi"][-1] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jackknife(F.vendi_score, rows(3, 2)), "at least 4 rows"),
        (lambda: jackknife(F.scendi_score, rows(9, 2), rows(8, 2)), "same number of rows"),
        (lambda: jackknife_interval(torch.tensor(1.0), torch.ones(5), level=95), "between 0 and 1"),
        (lambda: jackknife_interval(torch.tensor(1.0), torch.ones(1)), "at least 2 groups"),
        (lambda: jackknife(lambda z: z.sum() * math.nan, rows(9, 2)), "NaN or infinite"),
        (lambda: compare(rows(9, 2), rows(9, 2), lambda z: z.sum() * math.nan), "finite scores"),
        (lambda: compare_paired([1.0, math.nan], [2.0, 3.0]), "must be finite"),
        (lambda: kid_interval(rows(9, 2), rows(9, 2), subsets=1), "at least 2 subsets"),
        (lambda: kid_interval(rows(3, 2), rows(9, 2)), "at least 4 samples"),
        (lambda: kid_interval(rows(9, 2), rows(9, 2), level=0.0), "between 0 and 1"),
        (lambda: compare(rows(3, 2), rows(3, 4)), "same model"),
        (lambda: compare(rows(3, 2), rows(3, 2), permutations=0), "permutations"),
        (lambda: compare_paired([1.0], [1.0, 2.0]), "of the same length"),
        (lambda: convergence_curve(rows(9, 2), sizes=[4, 10]), r"lie in 1\.\.9"),
    ],
)
def test_invalid_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_truncated_vendi_converges_with_samples_proportional_to_t():
    """Ospanov and Farnia (2024): n = O(t) samples suffice. With 16 t samples the score is within 5% of that of 1,024."""
    x, k = rows(1024, 8), GaussianKernel(2.0)
    for t in (4, 16):
        full = F.vendi_score(x, k, truncation=t).item()
        partial = convergence_curve(x, k, sizes=[16 * t], truncation=t).mean[f"truncated Vendi, t = {t}"][0]
        assert abs(partial / full - 1) < 0.05
    assert math.isclose(F.vendi_score(oracles.clusters(4, 8), truncation=4).item(), 4, rel_tol=1e-6)


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize(
    "shares",
    [[1.0], [0.5, 0.5], [0.2] * 5, [1 / 200] * 200, [0.97, 0.03], [1 / k for k in range(1, 60)], [0.5, *[0.0025] * 200]],
    ids=["one", "two", "five", "two hundred", "a rare one", "Zipf", "half in one"],
)
def test_effective_number_interval_covers_that_of_other_sets(n, shares):
    p, g = torch.tensor(shares, dtype=torch.float64), torch.Generator().manual_seed(0)
    draws = [torch.multinomial(p, n, replacement=True, generator=g).bincount() for _ in range(400)]
    found = [effective_number_interval(d) for d in draws]
    expected = sum(i.value for i in found) / len(found)
    covered = sum(i.low - 1e-9 <= expected <= i.high + 1e-9 for i in found) / len(found)
    assert covered >= 0.91
    assert all(1 <= i.low < i.high <= n and i.low <= i.value <= i.high for i in found)
