import math
import warnings

import pytest
import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import (
    CosineKernel,
    ExpCosineKernel,
    GaussianKernel,
    Kernel,
    LaplacianKernel,
    PolynomialKernel,
    RationalQuadraticKernel,
)
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, LogDet, Novelty, PublishedRKE, Vendi
from tests.objectives.common import FEATURE_MAP, PROMPT_KERNEL, D, P, fill, relative_error
from tests.samples import rows

KERNELS = [
    GaussianKernel(1.3),
    CosineKernel(),
    ExpCosineKernel(),
    PolynomialKernel(),
    RationalQuadraticKernel(1.1, 0.7),
    LaplacianKernel(2.0),
    GaussianKernel(2.0) * PolynomialKernel(2),
]

OBJECTIVES = {
    "rke": lambda k: RKE(k, normalize=False),
    "conditional": lambda k: ConditionalRKE(k, normalize=False, prompt_kernel=PROMPT_KERNEL),
    "novelty": lambda k: Novelty(k, normalize=False, reference=rows(9, D, 3)),
    "mmd": lambda k: MMD(rows(9, D, 3), k),
    "prompt-aware mmd": lambda k: MMD(rows(9, D, 3), k, reference_prompts=rows(9, P, 4), prompt_kernel=PROMPT_KERNEL),
}


@pytest.mark.parametrize("with_memory", [False, True], ids=["empty memory", "memory"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_closed_form_gradient_matches_autograd(name, kernel, with_memory):
    objective = OBJECTIVES[name](kernel)
    memory = objective.make_memory()
    assert relative_error(objective, fill(memory) if with_memory else memory) < 1e-8


@pytest.mark.parametrize("prompt_kernel", [None, PROMPT_KERNEL], ids=["plain", "conditional"])
@pytest.mark.parametrize("order", [0.5, 1, 2, 3, math.inf])
@pytest.mark.parametrize("kernel", [GaussianKernel(1.3), CosineKernel(), LaplacianKernel(3.0)], ids=str)
def test_vendi_gradient_matches_autograd(kernel, order, prompt_kernel):
    objective = Vendi(kernel, order, prompt_kernel, normalize=False)
    assert relative_error(objective, fill(MemoryBank())) < 1e-8


@pytest.mark.parametrize("prompt_kernel", [None, PROMPT_KERNEL], ids=["plain", "conditional"])
@pytest.mark.parametrize("strength", [0.3, 4, 100])
@pytest.mark.parametrize("kernel", [GaussianKernel(1.3), CosineKernel(), ExpCosineKernel()], ids=str)
def test_log_determinant_gradient_matches_autograd(kernel, strength, prompt_kernel):
    objective = LogDet(kernel, strength, prompt_kernel, normalize=False)
    assert relative_error(objective, fill(MemoryBank())) < 1e-8


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("size", [0, 5, 7])  # with a batch of 5: up to 10 samples, and more
def test_published_gradient_matches_autograd(form, size):
    objective = PublishedRKE(GaussianKernel(1.3), PROMPT_KERNEL, form)
    objective.normalize = False
    assert relative_error(objective, fill(MemoryBank(), size) if size else MemoryBank()) < 1e-8
    with pytest.raises(TypeError, match="need the rows of a MemoryBank, got a CentroidMemory"):
        objective.gradient(rows(5, D, 0), rows(5, P, 1), CentroidMemory())


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("size", [3, 9])  # up to 10 samples with the context, and more
def test_context_of_published_gradient_matches_autograd(form, size):
    context = {"context": rows(size, D, 7), "context_prompts": rows(size, P, 8), "beta": 0.7}
    objective = PublishedRKE(GaussianKernel(1.3), PROMPT_KERNEL, form, **context)
    objective.normalize = False
    assert relative_error(objective, fill(MemoryBank(), 5)) < 1e-8


@pytest.mark.parametrize("size", [4, 20])
def test_context_of_published_score_is_that_of_the_authors_code(size):
    x, context, y = rows(1, D, 0), rows(size, D, 2), rows(6, D, 4)
    t, its_prompts, s = (torch.nn.functional.normalize(rows(n, P, seed)) for n, seed in ((1, 1), (size, 3), (6, 5)))

    def rank(others, prompts):  # of one new sample with others: exp of the conditional entropy of order 2, or its own mean
        z = torch.cat([others, x])
        joint = GaussianKernel(1.3)(z) * PROMPT_KERNEL(torch.cat([prompts, t]))
        return 1 / (joint / len(z)).square().sum() if len(z) <= 10 else 1 / joint[-1].mean()

    memory = MemoryBank()
    memory.add(y, s)
    objective = PublishedRKE(GaussianKernel(1.3), PROMPT_KERNEL, "code", context, its_prompts, beta=0.5)
    objective.normalize = False
    expected = rank(y, s) - 0.5 * rank(context, its_prompts)
    torch.testing.assert_close(objective.value(x, t, memory), expected, rtol=1e-6, atol=1e-9)


def test_a_context_attracts_samples_of_its_prompts():
    x, t = rows(1, D, 0), rows(1, P, 1)
    near = PublishedRKE(GaussianKernel(1.3), PROMPT_KERNEL, context=x + 0.5, context_prompts=t, beta=1.0)
    near.normalize = False
    assert (near.gradient(x, t, MemoryBank()).rows > 0).all()
    other = PublishedRKE(GaussianKernel(1.3), GaussianKernel(0.01), context=x + 0.5, context_prompts=t + 1, beta=1.0)
    other.normalize = False
    assert float(other.gradient(x, t, MemoryBank()).rows.abs().max()) < 1e-12


@pytest.mark.parametrize(
    "settings", [{"beta": 0.5}, {"context": torch.ones(2, 3)}, {"context": torch.ones(2, 3), "beta": -1.0}]
)
def test_a_context_needs_a_weight_and_a_weight_a_context(settings):
    with pytest.raises(ValueError, match="beta"):
        PublishedRKE(**settings)


def test_inaccurate_random_features_warn_with_suggestion():
    kernel = GaussianKernel(0.3)
    objective = RKE(kernel, RandomFourierFeatures(kernel, D, 16))
    with pytest.warns(UserWarning, match=r"leave feature_map=None for the exact sum, or use at least 48 features"):
        objective.gradient(rows(5, D, 0)).rows
    smooth = GaussianKernel(6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RKE(smooth, RandomFourierFeatures(smooth, D, 64), normalize=False).gradient(rows(5, D, 0)).rows


def test_batch_and_memory_pairs_have_equal_weight():
    kernel, x = GaussianKernel(1.3), rows(4, D, 0)
    batch_gradient = RKE(kernel, normalize=False).gradient(x).rows
    bank = MemoryBank()
    bank.add(x[1:])
    memory_gradient = RKE(kernel, normalize=False).gradient(x[:1], memory=bank).rows
    torch.testing.assert_close(batch_gradient[:1], memory_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_step_improves_corresponding_score(seed):
    from kspec_guidance import functional as F

    x, t = rows(8, D, 10 * seed), rows(8, P, 10 * seed + 1)
    k = GaussianKernel(1.5)
    moved = x + 0.1 * ConditionalRKE(k, prompt_kernel=PROMPT_KERNEL, normalize=False).gradient(x, t).rows
    assert F.conditional_rke_score(moved, t, k, PROMPT_KERNEL) > F.conditional_rke_score(x, t, k, PROMPT_KERNEL)
    moved = x + 0.1 * Vendi(k, normalize=False).gradient(x).rows
    assert F.vendi_score(moved, k) > F.vendi_score(x, k)
    reference = rows(20, D, 10 * seed + 9) + 1
    moved = x + 0.1 * MMD(reference, k).gradient(x).rows
    assert F.mmd(moved, reference, k, unbiased=False) < F.mmd(x, reference, k, unbiased=False)


def test_only_similar_prompts_repel():
    x, t = rows(2, D, 0), torch.eye(2, dtype=torch.float64)
    assert ConditionalRKE(GaussianKernel(2.0)).gradient(x, t).rows.norm() < 1e-3
    same_prompts = torch.ones(2, 2, dtype=torch.float64)
    assert ConditionalRKE(GaussianKernel(2.0)).gradient(x, same_prompts).rows.norm() > 0.1


def test_jitter_moves_exact_duplicate_of_memory_row():
    x = rows(2, D, 0)
    bank = MemoryBank()
    bank.add(x)
    x = bank.x.double()
    jitter = 1e-2 * rows(2, D, 8)
    objective = RKE(GaussianKernel(0.2), normalize=False)
    assert objective.gradient(x[:1], memory=bank).rows.norm() < 1e-6
    gradient = objective.gradient(x[:1], memory=bank, jitter=jitter[:1]).rows
    assert gradient.norm() > 1e-3
    assert torch.equal(gradient, objective.gradient(x[:1], memory=bank, jitter=jitter[:1]).rows)


class NoGradient(Kernel):
    def __call__(self, x, y=None):
        return x @ (x if y is None else y).mT


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RKE(NoGradient()), TypeError, "NoGradient has no closed-form gradient"),
        (lambda: Vendi(PolynomialKernel()), ValueError, r"k\(x, x\) = 1"),
        (lambda: Vendi(order=-1), ValueError, "order"),
        (lambda: LogDet(strength=0), ValueError, "strength must be a positive"),
        (lambda: Novelty(), ValueError, "needs reference="),
        (lambda: ConditionalRKE(feature_map=FEATURE_MAP), ValueError, "also needs prompt_feature_map"),
        (lambda: MMD(rows(9, D, 3)).gradient(rows(2, D + 1, 0)), ValueError, "reference set has rows of length 6"),
        (lambda: RKE(normalize=False).gradient(rows(2, D, 0), None, fill(RKE(feature_map=FEATURE_MAP).make_memory())),
         TypeError, "use a MemoryBank"),
        (lambda: ConditionalRKE().gradient(rows(2, D, 0), rows(2, 9, 0), fill(MemoryBank())), ValueError, "width 9"),
        (lambda: MMD(rows(9, D, 3), reference_prompts=rows(9, P, 4)).gradient(rows(2, D)), ValueError, "needs prompt"),
    ],
)  # fmt: skip
def test_invalid_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
