import math

import pytest
import torch

from kspec_guidance.functional.simplex import minimise_on_simplex


def quadratic(matrix, linear):
    return lambda w: (w @ matrix @ w - linear @ w, 2 * matrix @ w - linear)


def test_interior_minimum_of_a_quadratic_is_the_closed_form(g):
    a = torch.randn(6, 6, generator=g, dtype=torch.float64)
    matrix = a @ a.T + 20 * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, torch.ones(6, dtype=torch.float64))
    found = minimise_on_simplex(quadratic(matrix, torch.zeros(6, dtype=torch.float64)), 6)
    assert found.gap <= 1e-8
    torch.testing.assert_close(found.weights, expected / expected.sum(), atol=1e-7, rtol=0)
    assert found.value == pytest.approx(1 / float(expected.sum()), abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 30])
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_kkt_conditions_hold_for_badly_conditioned_quadratics(k, decades, g):
    a = torch.randn(k, k, generator=g, dtype=torch.float64) * torch.logspace(0, -decades / 2, k, dtype=torch.float64)
    matrix, linear = a.T @ a, torch.randn(k, generator=g, dtype=torch.float64)
    w = minimise_on_simplex(quadratic(matrix, linear), k).weights
    gradient = 2 * matrix @ w - linear
    assert float(w.sum()) == pytest.approx(1, abs=1e-12)
    assert float(w @ gradient - gradient.min()) <= 1e-8


def test_a_linear_function_ends_at_its_best_vertex():
    cost = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    found = minimise_on_simplex(lambda w: (w @ cost, cost), 3)
    torch.testing.assert_close(found.weights, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-7, rtol=0)


def test_weights_stay_at_or_above_the_floor_and_the_gap_counts_it():
    cost = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    found = minimise_on_simplex(lambda w: (w @ cost, cost), 3, floor=0.2)
    torch.testing.assert_close(found.weights, torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.gap <= 1e-8
    assert minimise_on_simplex(lambda w: (w @ cost, cost), 3, floor=1 / 3).weights.tolist() == pytest.approx([1 / 3] * 3)


def test_the_gap_bounds_the_distance_to_the_minimum():
    modes = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="optimal to"):
        found = minimise_on_simplex(lambda w: ((w * w / modes).sum(), 2 * w / modes), 3, max_steps=3)
    assert found.gap > 1e-8
    assert -1e-12 <= found.value - 0.1 <= found.gap


def test_rows_of_weights_are_simplices_of_their_own(g):
    target = torch.rand(5, 4, generator=g, dtype=torch.float64) + 0.1
    target = target / target.sum(-1, keepdim=True)
    found = minimise_on_simplex(lambda w: ((w - target).square().sum(), 2 * (w - target)), torch.ones(5, 4))
    torch.testing.assert_close(found.weights, target, atol=1e-4, rtol=0)


def test_an_entropy_is_maximised_from_a_start_with_zeros():
    def negative_entropy(w):
        return (w * w.log()).sum(), w.log() + 1

    found = minimise_on_simplex(negative_entropy, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(found.weights, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-7, rtol=0)
    assert found.value == pytest.approx(-math.log(4), abs=1e-8)


def test_a_step_out_of_the_domain_is_shortened():
    def barrier(w):  # infinite where the first weight exceeds 0.6
        room = 0.6 - w[0]
        value = -w[0] - 1e-3 * room.log() if room > 0 else torch.tensor(math.inf)
        return value, torch.stack([-1 + 1e-3 / room, torch.zeros_like(room)])

    found = minimise_on_simplex(barrier, 2)
    assert found.weights[0].item() == pytest.approx(0.599, abs=1e-6)


def test_a_wrong_gradient_ends_in_a_warning():
    cost = torch.tensor([0.3, 0.1], dtype=torch.float64)
    with pytest.warns(UserWarning, match="check the gradient"):
        minimise_on_simplex(lambda w: (w @ cost, -cost), 2, max_steps=200)


@pytest.mark.parametrize(
    ("start", "floor", "message"),
    [
        (0, 0.0, "at least one weight"),
        (torch.tensor([-1.0, 2.0]), 0.0, "at least 0"),
        (torch.tensor([0.0, 0.0]), 0.0, "not all 0"),
        (torch.tensor([math.nan, 1.0]), 0.0, "finite"),
        (torch.empty(0), 0.0, "k of at least 1"),
        (3, 0.4, "floor must lie"),
        (3, -0.1, "floor must lie"),
        (3, math.nan, "floor must lie"),
    ],
)
def test_start_and_floor_are_checked(start, floor, message):
    with pytest.raises(ValueError, match=message):
        minimise_on_simplex(lambda w: (w.sum(), torch.ones_like(w)), start, floor)


def test_a_gradient_of_another_shape_or_not_finite_is_refused():
    with pytest.raises(ValueError, match="shape of the weights"):
        minimise_on_simplex(lambda w: (w.sum(), torch.ones(3)), 2)
    with pytest.raises(ValueError, match="not finite at the start"):
        minimise_on_simplex(lambda w: (w.sum(), w * math.nan), 2)
