import math
import warnings

import pytest
import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import (
    CosineKernel,
    GaussianKernel,
    Kernel,
    LaplacianKernel,
    PolynomialKernel,
    RationalQuadraticKernel,
)
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, Novelty, Vendi
from tests.objectives.common import FEATURES, PROMPT, D, P, filled, relative_error
from tests.samples import rows

KERNELS = [
    GaussianKernel(1.3),
    CosineKernel(),
    PolynomialKernel(),
    RationalQuadraticKernel(1.1, 0.7),
    LaplacianKernel(2.0),
    GaussianKernel(2.0) * PolynomialKernel(2),
]


SUMS = {
    "rke": lambda k: RKE(k, normalize=False),
    "conditional": lambda k: ConditionalRKE(k, normalize=False, prompt_kernel=PROMPT),
    "novelty": lambda k: Novelty(k, normalize=False, reference=rows(9, D, 3)),
    "mmd": lambda k: MMD(rows(9, D, 3), k),
    "prompt-aware mmd": lambda k: MMD(rows(9, D, 3), k, reference_prompts=rows(9, P, 4), prompt_kernel=PROMPT),
}


@pytest.mark.parametrize("full", [False, True], ids=["empty memory", "memory"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_closed_form_equals_autograd(name, kernel, full):
    objective = SUMS[name](kernel)
    memory = objective.make_memory()
    assert relative_error(objective, filled(memory) if full else memory) < 1e-8


@pytest.mark.parametrize("prompt_kernel", [None, PROMPT], ids=["plain", "conditional"])
@pytest.mark.parametrize("order", [0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize("kernel", [GaussianKernel(1.3), CosineKernel(), LaplacianKernel(3.0)], ids=str)
def test_the_vendi_gradient_equals_autograd(kernel, order, prompt_kernel):
    objective = Vendi(kernel, order, prompt_kernel, normalize=False)
    assert relative_error(objective, filled(MemoryBank())) < 1e-8


def test_poor_random_features_warn_with_the_better_choice():
    kernel = GaussianKernel(0.3)
    objective = RKE(kernel, RandomFourierFeatures(kernel, D, 16))
    with pytest.warns(UserWarning, match=r"leave feature_map=None for the exact sum, or use at least 48 features"):
        objective.gradient(rows(5, D, 0)).rows
    good = GaussianKernel(6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RKE(good, RandomFourierFeatures(good, D, 64), normalize=False).gradient(rows(5, D, 0)).rows


def test_pairs_in_the_batch_count_as_much_as_pairs_with_the_memory():
    kernel, x = GaussianKernel(1.3), rows(4, D, 0)
    together = RKE(kernel, normalize=False).gradient(x).rows
    bank = MemoryBank()
    bank.add(x[1:])
    alone = RKE(kernel, normalize=False).gradient(x[:1], memory=bank).rows
    torch.testing.assert_close(together[:1], alone, rtol=1e-6, atol=1e-9)


def test_ascent_raises_the_scores_the_objectives_stand_for():
    from kspec_guidance import functional as F

    x, t = rows(8, D, 0), rows(8, P, 1)
    k = GaussianKernel(1.5)
    step = x + 0.1 * ConditionalRKE(k, prompt_kernel=PROMPT, normalize=False).gradient(x, t).rows
    assert F.conditional_rke_score(step, t, k, PROMPT) > F.conditional_rke_score(x, t, k, PROMPT)
    step = x + 0.1 * Vendi(k, normalize=False).gradient(x).rows
    assert F.vendi_score(step, k) > F.vendi_score(x, k)
    reference = rows(20, D, 9) + 1
    step = x + 0.1 * MMD(reference, k).gradient(x).rows
    assert F.mmd(step, reference, k, unbiased=False) < F.mmd(x, reference, k, unbiased=False)


def test_only_similar_prompts_repel():
    x, t = rows(2, D, 0), torch.eye(2, dtype=torch.float64)
    assert ConditionalRKE(GaussianKernel(2.0)).gradient(x, t).rows.norm() < 1e-3
    same = torch.ones(2, 2, dtype=torch.float64)
    assert ConditionalRKE(GaussianKernel(2.0)).gradient(x, same).rows.norm() > 0.1


def test_an_exact_duplicate_of_a_memory_entry_moves():
    x = rows(2, D, 0)
    bank = MemoryBank()
    bank.add(x)
    x = bank.x.double()
    jitter = 1e-2 * rows(2, D, 8)
    objective = RKE(GaussianKernel(0.2), normalize=False)
    assert objective.gradient(x[:1], memory=bank).rows.norm() < 1e-6
    g = objective.gradient(x[:1], memory=bank, jitter=jitter[:1]).rows
    assert g.norm() > 1e-3
    assert torch.equal(g, objective.gradient(x[:1], memory=bank, jitter=jitter[:1]).rows)


class Mystery(Kernel):
    def __call__(self, x, y=None):
        return x @ (x if y is None else y).mT


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: RKE(Mystery()), TypeError, "Mystery has no closed-form gradient"),
        (lambda: Vendi(PolynomialKernel()), ValueError, r"k\(x, x\) = 1"),
        (lambda: Vendi(order=-1), ValueError, "order"),
        (lambda: Novelty(), ValueError, "needs reference="),
        (lambda: ConditionalRKE(feature_map=FEATURES), ValueError, "also needs prompt_feature_map"),
        (lambda: MMD(rows(9, D, 3)).gradient(rows(2, D + 1, 0)), ValueError, "reference set holds rows of 6"),
        (lambda: RKE(normalize=False).gradient(rows(2, D, 0), None, filled(RKE(feature_map=FEATURES).make_memory())),
         TypeError, "give it a MemoryBank"),
        (lambda: ConditionalRKE().gradient(rows(2, D, 0), rows(2, 9, 0), filled(MemoryBank())), ValueError, "width 9"),
        (lambda: MMD(rows(9, D, 3), reference_prompts=rows(9, P, 4)).gradient(rows(2, D)), ValueError, "needs prompt"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
