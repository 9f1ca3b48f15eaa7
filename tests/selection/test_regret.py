"""Means of the experiments with known truth, in small versions: what the documents say of the methods must hold."""

import pytest
import torch

from benchmarks.selection import experiments as e


def mean(run, seeds, **kwargs):
    """Mean of each figure over the seeds."""
    rows = [run(seed=seed, **kwargs) for seed in range(seeds)]
    return {k: sum(r[k] for r in rows) / seeds for k in rows[0]}


def test_a_mixture_of_disjoint_arms_has_the_shares_of_their_modes():
    s = e.MixtureGreedy(3, seed=0)
    e.pull(s, e.DISJOINT.draw, 600, e.generator(0))
    assert torch.allclose(s.weights(), torch.tensor([0.2, 0.3, 0.5]).double(), atol=0.05)
    assert 1 / s.value(s.weights()) == pytest.approx(10, rel=0.05)


def test_excess_of_the_weights_falls_faster_than_the_root():
    found = mean(e.learning_curve, 4, rounds=(60, 600))
    assert found["excess at 600"] < found["excess at 60"] / 10**0.5


@pytest.mark.slow
def test_greedy_is_ten_times_nearer_the_best_mixture_than_uniform():
    found = mean(lambda seed: e.mixture(e.DISJOINT, seed, 400), 3)
    assert found["greedy"] < found["uniform"] / 10
    assert found["greedy"] < found["UCB"] < found["one arm"]


@pytest.mark.slow
def test_a_redundant_arm_gets_little():
    found = mean(e.redundant_weight, 3, rounds=300)
    assert found["greedy"] < 0.06
    assert found["greedy"] < found["UCB"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kid", "fid"])
def test_a_target_mixture_is_recovered(objective):
    assert mean(lambda seed: e.target(objective, seed, 300), 3)["greedy"] < 0.05


def test_where_the_reward_alone_counts_greedy_stays_with_a_bad_arm_and_the_default_does_not():
    found = mean(e.linear, 6, rounds=200)
    assert found["greedy, floor t^-1/3"] < found["greedy without a floor"]


@pytest.mark.slow
def test_contextual_methods_find_the_arm_of_each_context():
    found = mean(e.circle, 2, names=["PAK-UCB", "RFF-UCB", "PAK-UCB, as published", "best single"])
    assert found["PAK-UCB"] < 20
    assert found["RFF-UCB"] < 20
    assert found["PAK-UCB, as published"] > 30
    assert found["best single"] > 100


@pytest.mark.slow
def test_a_bad_first_reward_is_overcome_by_exploration():
    found = mean(e.bad_start, 3)
    assert found["PAK-UCB"] < found["greedy"] / 2


@pytest.mark.slow
def test_random_features_make_the_same_choices():
    assert e.same_choices(0, rounds=150) > 0.95


def test_the_diverse_arm_is_preferred_at_equal_reward():
    found = e.diverse(0, rounds=100)
    assert found["DAK-UCB"] > 0.7
    assert found["PAK-UCB"] < 0.6


def test_an_arm_off_the_prompt_is_not_preferred_for_its_diversity():
    assert e.experts(0, rounds=80)["off the prompt"] < 0.1


def test_two_collapsed_arms_together_are_more_diverse_than_one():
    assert e.complementary(0, rounds=80)["mixture"] > 3


@pytest.mark.slow
def test_the_recursion_beats_the_index_and_the_oracle_is_reached():
    found = e.prompt_wise(0)
    assert found["recursion"]["regret"] < 12
    assert found["index of the paper"]["regret"] > 2 * found["recursion"]["regret"]
    assert found["uniform"]["regret"] > 60
    assert abs(found["recursion"]["success"] - found["oracle"]["success"]) < 0.03
    assert found["recursion"]["cost"] < found["always the dearest"]["cost"]


@pytest.mark.parametrize("crash", [1, 7, 12])
def test_a_crash_at_any_event_changes_no_choice(crash):
    assert e.resumed(0, rounds=16, crash=crash)


def test_four_processes_find_the_weights_of_one():
    found = mean(e.processes, 2, rounds=200)
    assert found["four processes"] < 2 * found["one process"] + 2e-3


@pytest.mark.slow
def test_fading_events_forget_an_arm_that_changed():
    found = mean(e.change, 3)
    assert found["discounted"] < found["all events alike"] / 2


def test_an_added_arm_is_tried_and_then_gets_its_merit():
    found = e.new_arm(0, rounds=150)
    assert found["first pulls"] == 3
    assert found["later share"] == pytest.approx(0.5, abs=0.1)
