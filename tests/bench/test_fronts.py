"""Fronts against known values."""

import numpy as np
import pytest

from kspec_guidance.bench.fronts import against, at_gain, holm, hypervolume, matched, standings, weights, weights_of_seeds


def test_volume_gain_and_correction_of_known_fronts():
    gain, kept = np.array([[0.5, 1.0, 1.2]]), np.array([[0.0, -0.02, -0.2]])
    assert hypervolume(gain, kept)[0] == pytest.approx(0.2 * 0.5 + 0.8 * 1.0)
    assert matched(gain, kept)[0] == pytest.approx(1.0)
    assert holm([0.001, 0.2]) == [0.002, 0.2]


def test_volume_and_gain_do_not_depend_on_the_unit_of_quality():
    gain, kept = np.array([[0.5, 1.0, 1.2]]), np.array([[0.01, -0.05, -0.2]])
    assert hypervolume(gain, 50 * kept, depth=5)[0] == pytest.approx(hypervolume(gain, kept, depth=0.1)[0])
    assert matched(gain, 50 * kept, loss=1)[0] == pytest.approx(matched(gain, kept, loss=0.02)[0])


def test_bootstrap_weights_cover_prompts_and_seeds():
    prompts = ["a", "b", "c"] * 4
    w = weights(prompts, 4000)
    assert np.allclose(w.sum(1), 1)
    assert np.allclose(w[0], 1 / 12)
    assert np.allclose(w.mean(0), 1 / 12, atol=0.01)


def test_weights_of_seeds_have_the_variance_of_seeds_alone():
    prompts, seeds, number = ["a", "b", "c"] * 4, 4, 3
    x = np.arange(12.0).reshape(seeds, number) ** 1.5  # seed by seed, and prompts that differ
    means = weights_of_seeds(prompts, 40000) @ x.ravel()
    assert means[0] == pytest.approx(x.mean())
    assert means.mean() == pytest.approx(x.mean(), rel=0.01)
    assert means.var() == pytest.approx((x.var(0, ddof=1) / seeds).sum() / number**2, rel=0.03)
    assert weights_of_seeds(prompts, 9) @ np.tile([1.0, 5.0, 9.0], seeds) == pytest.approx(np.full(9, 5.0))


def test_another_figure_is_read_where_the_gain_is_reached():
    gain, kept = np.array([1.0, 2.0]), np.array([0.0, -0.04])
    best = matched(gain[None], kept[None])[0]
    assert at_gain(gain, kept, np.concatenate([[0.0], gain]), best) == pytest.approx(best)
    assert at_gain(gain, kept, np.concatenate([[0.0], kept]), best) == pytest.approx(-0.02)


def test_standings_compare_all_methods_with_one():
    rng = np.random.default_rng(0)
    draws = {m: at + 0.01 * rng.standard_normal(2000) for m, at in (("ours", 1.0), ("equal", 1.0), ("less", 0.5))}
    found = standings(draws, draws, "ours")
    assert found["ours"].p is None
    assert found["less"].p == pytest.approx(2 * 2 / 2000)  # the smallest possible p-value of two comparisons
    assert found["less"].ahead == pytest.approx(0.5, abs=0.05)
    assert found["equal"].p > 0.05
    assert against(draws, "absent") == {}
