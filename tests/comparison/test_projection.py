import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.comparison import entropy_projection
from kspec_guidance.kernels import CosineKernel, PolynomialKernel
from tests.samples import rows

MODES = torch.eye(3, dtype=torch.float64)[torch.tensor([0] * 7 + [1] * 2 + [2])]


def objective(w, k, prompts, strength):
    a = w / prompts
    entropy = F.matrix_vendi_score(k, weights=a).log()
    change = a - 1 / len(a)
    return change @ k @ change - strength * entropy


def test_rare_modes_gain_by_the_closed_form_of_one_prompt():
    w = entropy_projection(MODES, torch.ones(10, 1), 10, entropy_weight=0.5)
    p = torch.stack([w[:7].sum(), w[7:9].sum(), w[9]])
    # min |p - q|^2 + lam sum p log p over the shares p of modes: 2 (p - q) + lam log p is the same for all
    level = 2 * (p - torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)) + 0.5 * p.log()
    assert float(level.max() - level.min()) < 1e-6
    assert p[2] > 0.1
    assert p[0] < 0.7
    torch.testing.assert_close(w[:7], w[:1].expand(7), atol=1e-6, rtol=0)


def test_kkt_conditions_hold_with_gradients_by_autograd(g):
    x, t = torch.randn(24, 5, generator=g, dtype=torch.float64), torch.randn(6, 3, generator=g, dtype=torch.float64)
    t = t.repeat_interleave(4, 0)
    w = entropy_projection(x, t, 4, entropy_weight=0.3)
    k = CosineKernel()(x) * CosineKernel()(t)
    torch.testing.assert_close(w.view(6, 4).sum(1), torch.ones(6, dtype=torch.float64))
    leaf = w.clamp_min(1e-12).requires_grad_()
    (slope,) = torch.autograd.grad(objective(leaf, k, 6, 0.3), leaf)
    slope, blocks = slope.view(6, 4), w.view(6, 4)
    assert float(((blocks * slope).sum(1) - slope.amin(1)).sum()) < 1e-6


def test_conditional_entropy_grows_with_the_weight_of_entropy(g):
    t = torch.eye(4, dtype=torch.float64).repeat_interleave(10, 0)
    x = MODES.repeat(4, 1)
    k = CosineKernel()(x) * CosineKernel()(t)
    found = []
    for strength in (0.0, 0.1, 1.0):
        w = entropy_projection(x, t, 10, strength)
        found.append(float(F.matrix_vendi_score(k, weights=w)) / 4)
    assert found[0] < found[1] < found[2] < 3
    torch.testing.assert_close(entropy_projection(x, t, 10, 0.0), torch.full((40,), 0.1, dtype=torch.float64))


def test_one_row_of_prompt_features_per_prompt_is_enough(g):
    x, t = torch.randn(12, 5, generator=g), torch.randn(4, 3, generator=g)
    torch.testing.assert_close(entropy_projection(x, t, 3), entropy_projection(x, t.repeat_interleave(3, 0), 3))


def test_random_features_are_close_to_the_exact_weights():
    t = torch.eye(4, dtype=torch.float64).repeat_interleave(10, 0)
    exact, random = (entropy_projection(MODES.repeat(4, 1), t, 10, features=f) for f in (None, 400))
    assert float((exact - random).abs().max()) < 0.05


def test_a_single_candidate_keeps_its_weight(g):
    assert entropy_projection(torch.randn(5, 3, generator=g), torch.randn(5, 2, generator=g), 1).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy_projection(rows(5, 2), torch.ones(5, 1), 2), "divides the number of rows"),
        (lambda: entropy_projection(rows(4, 2), torch.ones(4, 1), 0), "at least 1"),
        (lambda: entropy_projection(rows(4, 2), rows(4, 2), 2), "differ within a block"),
        (lambda: entropy_projection(rows(4, 2), torch.ones(3, 1), 2), "one row of prompt features per sample"),
        (lambda: entropy_projection(rows(4, 2) * math.nan, torch.ones(4, 1), 2), "NaN"),
        (lambda: entropy_projection(rows(4, 2), torch.ones(4, 1), 2, -1.0), "at least 0"),
        (lambda: entropy_projection(rows(4, 2), torch.ones(4, 1), 2, features=0), "at least 1"),
        (lambda: entropy_projection(rows(4, 2), torch.ones(4, 1), 2, kernel=PolynomialKernel(), features=8), "cosine"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
