import math

import pytest
import torch

from kspec_guidance.guidance.transforms import TransformState, bound, fade, off_score, rescale, tangent
from tests.samples import rows

MOVE, TARGET, SCORE = (rows(4, 16, seed) for seed in (0, 1, 2))
SIZE = TARGET.norm(dim=1)


def state(**settings):
    return TransformState(TARGET, SCORE, **({"fraction": 0.0, "window": (0.0, 1.0), "scale": 0.2} | settings))


@pytest.mark.parametrize(("transform", "direction"), [(tangent, TARGET), (off_score, SCORE)])
def test_projections_leave_nothing_along_their_direction_and_all_else(transform, direction):
    found = transform(MOVE, state())
    assert (found * direction).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(transform(found, state()), found)  # a projection
    rest = MOVE - found
    torch.testing.assert_close(torch.cosine_similarity(rest, direction).abs(), torch.ones(4, dtype=torch.float64))


def test_rescaled_moves_have_the_same_relative_size_and_zeros_stay():
    torch.testing.assert_close(rescale(MOVE, state()).norm(dim=1), 0.2 * SIZE)
    torch.testing.assert_close(torch.cosine_similarity(rescale(MOVE, state()), MOVE), torch.ones(4, dtype=torch.float64))
    assert rescale(torch.zeros_like(MOVE), state()).abs().max() == 0


def test_bound_gives_the_largest_gradient_the_full_move_and_the_others_their_part():
    relative = bound(MOVE, state()).norm(dim=1) / SIZE
    torch.testing.assert_close(relative, 0.2 * MOVE.norm(dim=1) / MOVE.norm(dim=1).max())
    assert bound(torch.zeros_like(MOVE), state()).abs().max() == 0


@pytest.mark.parametrize(
    ("count", "factor"), [([0.0, 0.01, 0.0, 0.0], 0.01), ([0.3, 0.2, 0.0, 0.1], 0.3), ([5.0] * 4, 1.0)]
)
def test_bound_is_smaller_by_the_weight_of_all_that_there_is_to_be_away_from(count, factor):
    found = bound(MOVE, state(effective_count=torch.tensor(count)))
    torch.testing.assert_close(found, factor * bound(MOVE, state()))


@pytest.mark.parametrize("place", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_fade_is_a_squared_cosine_over_the_window(place):
    found = fade(MOVE, state(window=(0.2, 0.6), fraction=0.2 + 0.4 * place))
    torch.testing.assert_close(found, MOVE * math.cos(math.pi / 2 * min(place, 1.0)) ** 2)
