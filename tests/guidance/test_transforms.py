import math

import pytest
import torch

from kspec_guidance.guidance.run import TermState, ascent_direction
from kspec_guidance.guidance.term import Term
from kspec_guidance.guidance.transforms import (
    TRANSFORMS,
    TransformState,
    bound,
    fade,
    off_score,
    plain,
    rescale,
    rescale_damped,
    rescale_from,
    tangent,
    transformed,
)
from kspec_guidance.objectives import RKE
from tests.samples import rows

MOVE, TARGET, SCORE = (rows(4, 16, seed) for seed in (0, 1, 2))
SIZE = TARGET.norm(dim=1)


def state(**settings):
    return TransformState(TARGET, SCORE, **({"fraction": 0.0, "window": (0.0, 1.0), "scale": 0.2} | settings))


@pytest.mark.parametrize(("transform", "direction"), [(tangent, TARGET), (off_score, SCORE)])
def test_projection_removes_only_its_direction(transform, direction):
    result = transform(MOVE, state())
    assert (result * direction).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(transform(result, state()), result)  # idempotent
    removed = MOVE - result
    torch.testing.assert_close(torch.cosine_similarity(removed, direction).abs(), torch.ones(4, dtype=torch.float64))


def test_gradients_in_rows_of_norm_1_need_no_tangent_transform():
    """Except where the moved sample is not the row: then the pullback may have a component along it."""
    g = ascent_direction(RKE(), TARGET, None, None)[0]
    torch.testing.assert_close(tangent(g, state()), g)
    names = ("tangent", "fade")
    for term, expected in [
        (Term(RKE(), 0.1, transforms=names), ("fade",)),
        (Term(RKE(), 0.1, space="latents", transforms=names), ("fade",)),
        (Term(RKE(), 0.1, space="pooled", transforms=names), names),
        (Term(RKE(normalize=False), 0.1, transforms=names), names),
        (Term(RKE(), 0.1, transforms=("off_score", "tangent")), ("off_score", "tangent")),
    ]:
        assert TermState(term, frozenset(), (0.0, 1.0)).transforms == expected


def test_rescale_sets_relative_norm_and_keeps_zeros():
    torch.testing.assert_close(rescale(MOVE, state()).norm(dim=1), 0.2 * SIZE)
    torch.testing.assert_close(torch.cosine_similarity(rescale(MOVE, state()), MOVE), torch.ones(4, dtype=torch.float64))
    assert rescale(torch.zeros_like(MOVE), state()).abs().max() == 0


def test_published_steps_at_small_gradients():
    unit = MOVE / MOVE.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rescale_from(2e-8 * unit, state()), rescale(MOVE, state()))
    torch.testing.assert_close(rescale_from(5e-9 * unit, state()), 0.2 * 5e-9 * unit)
    torch.testing.assert_close(rescale_damped(1e-5 * unit, state()), rescale(MOVE, state()) / 2)
    torch.testing.assert_close(plain(MOVE, state()), 0.2 * MOVE)


@pytest.mark.parametrize(
    "names",
    [(), ("fade",), ("off_score", "bound", "fade"), ("rescale", "tangent", "plain"), ("fade", "rescale_from", "off_score")],
)
def test_transforms_together_are_those_in_turn(names):
    values, expected = state(fraction=0.3), MOVE
    for name in names:
        expected = TRANSFORMS[name](expected, values)
    move, size = transformed(MOVE, names, values)
    torch.testing.assert_close(move, expected)
    torch.testing.assert_close(size, expected.norm(dim=1, keepdim=True))


def test_bound_scales_relative_to_largest_gradient():
    relative = bound(MOVE, state()).norm(dim=1) / SIZE
    torch.testing.assert_close(relative, 0.2 * MOVE.norm(dim=1) / MOVE.norm(dim=1).max())
    assert bound(torch.zeros_like(MOVE), state()).abs().max() == 0


@pytest.mark.parametrize(
    ("count", "factor"), [([0.0, 0.01, 0.0, 0.0], 0.01), ([0.3, 0.2, 0.0, 0.1], 0.3), ([5.0] * 4, 1.0)]
)
def test_bound_scales_with_effective_count(count, factor):
    result = bound(MOVE, state(effective_count=torch.tensor(count)))
    torch.testing.assert_close(result, factor * bound(MOVE, state()))


@pytest.mark.parametrize("position", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_fade_is_squared_cosine_over_window(position):
    result = fade(MOVE, state(window=(0.2, 0.6), fraction=0.2 + 0.4 * position))
    torch.testing.assert_close(result, MOVE * math.cos(math.pi / 2 * min(position, 1.0)) ** 2)
