import json
import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.statistics import compare_paired
from kspec_guidance.synthesis import RunFailedError, SynthesisError
from kspec_guidance.tuning import HELPS, NO_HELP, TOO_FEW, Difference, TuningPoint, _quantiles, decide, tune

CALL = {"num_inference_steps": 4, "guidance_scale": 5.0}


def test_precision_is_one_for_same_set_and_zero_for_distant_set(g):
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    assert F.precision_score(x, x, 3) == F.fidelity_scores(x, x, 3).precision == 1
    assert F.precision_score(x + 100, x, 3) == 0


def point(scale, gains, losses=(0.0, 0.0)):
    """A point whose batches differ so from plain ones, which have a diversity of 2 and a fidelity of 0.9."""
    gain, loss = Difference.of([0.0] * len(gains), gains), Difference.of([0.0] * len(losses), losses)
    diversity, fidelity = 2 + gain.mean, 0.9 - loss.mean
    return TuningPoint(scale, diversity, fidelity, compare_paired([2.0] * len(gains), [2 + v for v in gains]), gain, loss)


def judge(*points, max_fidelity_loss=0.05):
    return decide(points, 2.0, 0.9, max_fidelity_loss, 0.1, prompts=2, batch_size=4)


NOISE = [-1.0, -0.5, 0.5, 1.0]


def test_the_most_diverse_scale_that_keeps_fidelity_and_surely_gains_is_chosen():
    sure = [0.5, 0.6, 0.5, 0.6]
    points = [point(0.3, [0.2, 0.3, 0.2, 0.3]), point(0.6, sure), point(1.2, [2.0, 2.1, 2.0, 2.1], (0.5, 0.4))]
    found = judge(*points)
    assert (found.scale, found.verdict) == (0.6, HELPS)
    assert judge(point(0.3, NOISE), point(0.6, sure)).scale == 0.6
    assert judge(point(0.3, [v + 0.3 for v in NOISE])).scale is None  # the interval contains 0


def test_wide_intervals_are_too_few_images_and_never_no_help():
    found = judge(point(0.3, [v + 0.1 for v in NOISE]))
    assert found.verdict == TOO_FEW
    assert found.scale is None
    assert "does not help" not in found.reason
    assert f"a gain of {found.detectable_gain:.0%} or more would have been found" in found.reason
    assert f"--batches {found.batches_needed}" in found.reason
    assert f"about {found.batches_needed * 2 * 4} images" in found.reason


def test_the_best_of_several_scales_without_effect_is_seldom_said_to_help(g):
    """Two pairs of batches and five scales, as in the smallest runs: at most one run in twenty finds an effect."""
    found = 0
    for _ in range(400):
        plain = [0.0, 0.0]
        gains = torch.randn(5, 2, generator=g).tolist()
        found += any(Difference.of(plain, d, 5).low > 0 for d in gains)
    assert found <= 0.05 * 400  # each alone at 95% would find one in 12%


def test_narrow_intervals_below_the_smallest_gain_are_no_help():
    found = judge(point(0.3, [0.01, -0.01, 0.02, -0.02]), point(0.6, [0.02, -0.02, 0.01, -0.01]))
    assert (found.scale, found.verdict) == (None, NO_HELP)
    assert "no scale that keeps fidelity gains 10%" in found.reason
    assert judge(point(0.3, [0.01, -0.01, 0.02, -0.02]), point(0.6, NOISE)).verdict == TOO_FEW


def test_a_loss_of_fidelity_rules_a_scale_out_only_if_its_interval_lies_above_the_limit():
    gains = [0.5, 0.6, 0.5, 0.6]
    found = judge(point(0.3, gains, (0.4, 0.5, 0.4, 0.5)))
    assert found.verdict == NO_HELP
    assert "loses more than 0.05 of fidelity" in found.reason
    found = judge(point(0.3, gains, (0.0, 0.5, 0.0, 0.5)))
    assert found.verdict == TOO_FEW
    assert "changes fidelity by -0.25" in found.reason
    assert judge(point(0.3, gains, (0.0, 0.5, 0.0, 0.5)), max_fidelity_loss=0).batches_needed > 2


def test_one_batch_is_too_few_images():
    found = judge(point(0.3, [5.0], [0.0]))
    assert found.verdict == TOO_FEW
    assert "one batch" in found.reason
    assert found.batches_needed is None


def test_detectable_difference_is_found_with_power_of_80_percent(g):
    n, draws = 8, 4000
    half, detectable = (q / math.sqrt(n) for q in _quantiles(n))
    d = torch.randn(draws, n, generator=g, dtype=torch.float64) + detectable
    found = (d.mean(1) - half * d.std(1) > 0).double().mean()
    assert abs(float(found) - 0.8) < 0.04  # the usual approximation of the noncentral t distribution
    known = Difference.of([0.0] * n, [1.0, -1.0] * (n // 2))
    more = int(known.batches_for(known.detectable / 2))
    assert Difference.of([0.0] * more, [1.0, -1.0] * (more // 2)).detectable <= known.detectable / 2
    assert n < more < 5 * n
    assert known.batches_for(0.0) == math.inf


@pytest.mark.slow
def test_tune_increases_diversity_of_embedded_pipeline(pipe):
    prompts = ["heart, twemoji style", "runner, woman, noto style", "cat face, noto style"]
    calls = []
    result = tune(pipe, prompts, scales=(0.6, 1.0), batch_size=4, batches=2, call=CALL,
                 max_fidelity_loss=0.4, progress_callback=lambda done, total: calls.append((done, total)))  # fmt: skip
    assert [p.scale for p in result.points] == [0.6, 1.0]
    assert all(p.diversity > 1.05 * result.plain_diversity for p in result.points)
    assert (result.scale, result.verdict) == (1.0, HELPS)
    assert 0 <= result.plain_fidelity <= 1
    assert calls[-1] == (24, 24)
    assert set(result.images[0]) == set(prompts)
    json.dumps(result.as_dict())


def test_tune_invalid_settings_raise(pipe):
    with pytest.raises(ValueError, match="needs prompts"):
        tune(pipe, [])
    with pytest.raises(ValueError, match="scales above 0"):
        tune(pipe, ["heart"], scales=(0.0,))
    with pytest.raises(ValueError, match="batch_size >= 2"):
        tune(pipe, ["heart"], batch_size=1)
    with pytest.raises(ValueError, match="min_gain above 0"):
        tune(pipe, ["heart"], min_gain=0)
    with pytest.raises(SynthesisError, match="does not take step; did you mean timesteps"):
        tune(pipe, ["heart"], call={"step": 1})
    with pytest.raises(RunFailedError, match="failed for 'heart' with seeds 500000 to 500001: TypeError"):
        tune(pipe, ["heart"], batch_size=2, call={"guidance_scale": "much"})
