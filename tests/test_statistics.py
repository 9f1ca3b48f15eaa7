import math
import warnings

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.statistics import (
    ScoreRecord,
    bandwidth_curve,
    compare,
    compare_paired,
    convergence_curve,
    jackknife,
    jackknife_interval,
)


def rows(n, d, seed=0, spread=1.0):
    return spread * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = rows(40, 1)
    found = jackknife(lambda z: z.mean(), x, groups=40)
    assert found.standard_error == pytest.approx((x.var() / 40).sqrt().item(), rel=1e-9)
    assert found.high - found.value == pytest.approx(2.0227 * found.standard_error, rel=1e-4)  # Student, 39 degrees


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 0.0
    hits = 0
    for seed in range(100):
        found = jackknife(lambda z: z.mean(), rows(60, 1, seed), groups=12, seed=seed)
        hits += found.low <= truth <= found.high
    assert 88 <= hits <= 100


def test_intervals_of_scores_with_prompts():
    found = jackknife(F.scendi_score, rows(60, 5), rows(60, 3, 1), groups=10)
    assert found.low < found.value < found.high
    assert "[" in str(found)


def test_equal_sets_are_not_told_apart_and_different_ones_are():
    k = GaussianKernel(2.0)
    score = lambda z: F.vendi_score(z, k)  # noqa: E731
    same = compare(rows(40, 4), rows(40, 4, 1), score, permutations=99)
    other = compare(rows(40, 4), rows(40, 4, 1, spread=0.3), score, permutations=99)
    assert same.p_value > 0.05
    assert other.p_value == pytest.approx(0.01)
    assert other.difference < 0
    assert compare(rows(9, 2), rows(9, 2)).p_value == 1  # the very same rows


def test_false_alarms_are_as_rare_as_promised():
    alarms = sum(compare(rows(15, 2, s), rows(15, 2, s + 500), permutations=39, seed=s).p_value <= 0.05 for s in range(60))
    assert alarms <= 8  # 3 expected


def test_sets_of_different_sizes_warn_until_matched():
    a, b = rows(30, 3), rows(90, 3, 1)
    with pytest.warns(UserWarning, match="pass matched=True"):
        compare(a, b, permutations=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare(a, b, matched=True, permutations=9).n == (30, 30)


def test_paired_scores():
    a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    better = compare_paired(a, [v + 0.5 for v in a])
    assert better.p_value == pytest.approx(2 / 64)
    assert better.test == "all sign patterns"
    assert compare_paired(a, a).p_value == 1
    many = compare_paired([0.0] * 30, [1.0] * 30, permutations=999)
    assert many.p_value == pytest.approx(0.001)


def test_convergence_vendi_grows_while_the_others_settle():
    x = rows(512, 6)
    curve = convergence_curve(x, GaussianKernel(1.5), truncation=16)
    assert curve.axis == "samples"
    assert curve.x[-1] == 512
    growth = {name: v[-1] / v[-2] for name, v in curve.mean.items()}
    assert growth["Vendi"] > growth["truncated Vendi, t = 16"] > 0.9
    assert growth["Vendi"] > 1.1
    assert curve.mean["Vendi"][-1] == pytest.approx(F.vendi_score(x, GaussianKernel(1.5)).item())


def test_bandwidth_curve_goes_from_every_sample_to_one():
    curve = bandwidth_curve(rows(40, 6), (0.01, 1.0, 100.0))
    assert curve.mean["Vendi"][0] == pytest.approx(40, rel=1e-3)
    assert curve.mean["Vendi"][-1] == pytest.approx(1, abs=0.01)


def test_a_record_is_plain():
    record = ScoreRecord("Vendi", 3.2, 10, "CosineKernel()", 1.0, interval=(3.0, 3.4))
    assert record.as_dict()["interval"] == (3.0, 3.4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jackknife(F.vendi_score, rows(3, 2)), "at least 4 rows"),
        (lambda: jackknife(F.scendi_score, rows(9, 2), rows(8, 2)), "same number of rows"),
        (lambda: jackknife_interval(torch.tensor(1.0), torch.ones(5), level=95), "between 0 and 1"),
        (lambda: compare(rows(3, 2), rows(3, 4)), "same model"),
        (lambda: compare(rows(3, 2), rows(3, 2), permutations=0), "permutations"),
        (lambda: compare_paired([1.0], [1.0, 2.0]), "one length"),
        (lambda: convergence_curve(rows(9, 2), sizes=[4, 10]), r"lie in 1\.\.9"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_truncated_scores_need_samples_in_proportion_to_t():
    """Ospanov, Farnia 2024: n = O(t) samples suffice; with 16 t the score of 1,024 samples is reached within 5%."""
    x, k = rows(1024, 8), GaussianKernel(2.0)
    for t in (4, 16):
        full = F.vendi_score(x, k, truncation=t).item()
        few = convergence_curve(x, k, sizes=[16 * t], truncation=t).mean[f"truncated Vendi, t = {t}"][0]
        assert abs(few / full - 1) < 0.05
    assert math.isclose(F.vendi_score(oracles.clusters(4, 8), truncation=4).item(), 4, rel_tol=1e-6)
