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
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, Novelty, Vendi

D, P = 6, 3
KERNELS = [
    GaussianKernel(1.3),
    CosineKernel(),
    PolynomialKernel(),
    RationalQuadraticKernel(1.1, 0.7),
    LaplacianKernel(2.0),
    GaussianKernel(2.0) * PolynomialKernel(2),
]
PROMPT = GaussianKernel(1.0)


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUMS = {
    "rke": lambda k: RKE(k, unit=False),
    "conditional": lambda k: ConditionalRKE(k, unit=False, prompt_kernel=PROMPT),
    "novelty": lambda k: Novelty(k, unit=False, reference=rows(9, D, 3)),
    "mmd": lambda k: MMD(rows(9, D, 3), k),
    "prompt-aware mmd": lambda k: MMD(rows(9, D, 3), k, reference_prompts=rows(9, P, 4), prompt_kernel=PROMPT),
}


def relative_error(objective, memory):
    x, t = rows(5, D, 0).requires_grad_(), rows(5, P, 1)
    (expected,) = torch.autograd.grad(objective.value(x, t, memory), x)
    found = objective.gradient(x.detach(), t, memory)
    return ((found - expected).norm() / expected.norm()).item()


def filled(memory, n=7):
    memory.add(rows(n, D, 5), rows(n, P, 6))
    return memory


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
    objective = Vendi(kernel, order, prompt_kernel, unit=False)
    assert relative_error(objective, filled(MemoryBank())) < 1e-8


FEATURES = RandomFourierFeatures(GaussianKernel(2.5), D, 64)
PSI = RandomFourierFeatures(PROMPT, P, 32)
BY_FEATURES = {
    "rke": lambda: RKE(FEATURES.kernel, FEATURES, unit=False),
    "conditional": lambda: ConditionalRKE(
        FEATURES.kernel, FEATURES, unit=False, prompt_features=RandomFourierFeatures(PROMPT, P, 32)
    ),
    "novelty": lambda: Novelty(FEATURES.kernel, FEATURES, unit=False, reference=rows(9, D, 3)),
    "mmd": lambda: MMD(rows(9, D, 3), FEATURES.kernel, features=FEATURES),
    "prompt-aware novelty": lambda: Novelty(
        FEATURES.kernel, FEATURES, unit=False, prompt_features=PSI, reference=rows(9, D, 3), reference_prompts=rows(9, P, 4)
    ),
    "prompt-aware mmd": lambda: MMD(
        rows(9, D, 3), FEATURES.kernel, rows(9, P, 4), PROMPT, features=FEATURES, prompt_features=PSI
    ),
}


@pytest.mark.filterwarnings("ignore:.*random features in")
@pytest.mark.parametrize("name", BY_FEATURES)
def test_the_random_feature_form_equals_its_autograd(name):
    objective = BY_FEATURES[name]()
    assert relative_error(objective, filled(objective.make_memory())) < 1e-8


@pytest.mark.filterwarnings("ignore:.*random features in")
def test_random_features_approach_the_exact_gradient():
    kernel, x = GaussianKernel(3.0), rows(5, D, 0)
    exact, memory = RKE(kernel, unit=False), filled(MemoryBank(), 50)
    coarse = RKE(kernel, RandomFourierFeatures(kernel, D, 16384), unit=False)
    found = coarse.gradient(x, None, filled(coarse.make_memory(), 50)).flatten()
    expected = exact.gradient(x, None, memory).flatten()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99


@pytest.mark.filterwarnings("ignore:.*random features in")
@pytest.mark.parametrize("kind", ["conditional", "novelty", "mmd"])
def test_prompt_aware_random_features_approach_the_exact_gradient(kind):
    kernel, x, t = GaussianKernel(3.0), rows(5, D, 0), torch.nn.functional.normalize(rows(5, P, 1))
    reference, prompts = rows(20, D, 3), rows(20, P, 4)
    phi, psi = RandomFourierFeatures(kernel, D, 8192), RandomFourierFeatures(PROMPT, P, 2048)
    make = {
        "conditional": lambda **f: ConditionalRKE(kernel, unit=False, prompt_kernel=PROMPT, **f),
        "novelty": lambda **f: Novelty(
            kernel, unit=False, prompt_kernel=PROMPT, reference=reference, reference_prompts=prompts, **f
        ),
        "mmd": lambda **f: MMD(reference, kernel, prompts, PROMPT, **f),
    }[kind]
    exact, coarse = make(), make(features=phi, prompt_features=psi)
    expected = exact.gradient(x, t, filled(exact.make_memory(), 20)).flatten()
    found = coarse.gradient(x, t, filled(coarse.make_memory(), 20)).flatten()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98
    assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.15)


def test_poor_random_features_warn_with_the_better_choice():
    kernel = GaussianKernel(0.3)
    objective = RKE(kernel, RandomFourierFeatures(kernel, D, 16))
    with pytest.warns(UserWarning, match=r"leave features=None for the exact sum, or use at least 48 features"):
        objective.gradient(rows(5, D, 0))
    good = GaussianKernel(6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RKE(good, RandomFourierFeatures(good, D, 64), unit=False).gradient(rows(5, D, 0))


def test_pairs_in_the_batch_count_as_much_as_pairs_with_the_memory():
    kernel, x = GaussianKernel(1.3), rows(4, D, 0)
    together = RKE(kernel, unit=False).gradient(x)
    bank = MemoryBank()
    bank.add(x[1:])
    alone = RKE(kernel, unit=False).gradient(x[:1], memory=bank)
    torch.testing.assert_close(together[:1], alone, rtol=1e-6, atol=1e-9)


def test_ascent_raises_the_scores_the_objectives_stand_for():
    from kspec_guidance import functional as F

    x, t = rows(8, D, 0), rows(8, P, 1)
    k = GaussianKernel(1.5)
    step = x + 0.1 * ConditionalRKE(k, prompt_kernel=PROMPT, unit=False).gradient(x, t)
    assert F.conditional_rke_score(step, t, k, PROMPT) > F.conditional_rke_score(x, t, k, PROMPT)
    step = x + 0.1 * Vendi(k, unit=False).gradient(x)
    assert F.vendi_score(step, k) > F.vendi_score(x, k)
    reference = rows(20, D, 9) + 1
    step = x + 0.1 * MMD(reference, k).gradient(x)
    assert F.mmd(step, reference, k, unbiased=False) < F.mmd(x, reference, k, unbiased=False)


def test_conditional_vendi_of_a_large_memory_uses_the_nearest_rows_of_similar_prompts():
    g = torch.Generator().manual_seed(0)
    x, t = torch.nn.functional.normalize(rows(2, D, 0)), torch.eye(2, P, dtype=torch.float64)[:1].expand(2, -1)
    near = torch.nn.functional.normalize(x.repeat(3, 1) + 0.1 * torch.randn(6, D, generator=g, dtype=torch.float64))
    far = torch.nn.functional.normalize(torch.randn(40, D, generator=g, dtype=torch.float64))
    bank, small = MemoryBank(), MemoryBank()
    for b in (bank, small):
        b.add(near, t[:1].expand(6, -1))
    bank.add(far, torch.eye(2, P, dtype=torch.float64)[1:].expand(40, -1))  # of another subject
    objective = Vendi(GaussianKernel(), 0.5, GaussianKernel(0.2), max_rows=6)
    torch.testing.assert_close(objective.gradient(x, t, bank), objective.gradient(x, t, small))
    torch.testing.assert_close(objective.mass(2, t, bank), torch.full((2,), 7.0), atol=1e-3, rtol=0, check_dtype=False)
    assert objective._gram(x, t, bank)[0].shape == (8, D)


def test_conditional_vendi_takes_weighted_means_too():
    x, t = torch.nn.functional.normalize(rows(3, D, 0)), torch.nn.functional.normalize(rows(3, P, 1))
    exact, means, objective = MemoryBank(), CentroidMemory(50), Vendi(GaussianKernel(0.5), 0.5, PROMPT)
    for memory in (exact, means):
        memory.add(rows(20, D, 2), rows(20, P, 3))
    torch.testing.assert_close(objective.gradient(x, t, exact), objective.gradient(x, t, means), rtol=1e-3, atol=1e-5)


def test_only_similar_prompts_repel():
    x, t = rows(2, D, 0), torch.eye(2, dtype=torch.float64)
    assert ConditionalRKE(GaussianKernel(2.0)).gradient(x, t).norm() < 1e-3
    same = torch.ones(2, 2, dtype=torch.float64)
    assert ConditionalRKE(GaussianKernel(2.0)).gradient(x, same).norm() > 0.1


def test_an_exact_duplicate_of_a_memory_entry_moves():
    x = rows(2, D, 0)
    bank = MemoryBank()
    bank.add(x)
    x = bank.x.double()
    jitter = 1e-2 * rows(2, D, 8)
    objective = RKE(GaussianKernel(0.2), unit=False)
    assert objective.gradient(x[:1], memory=bank).norm() < 1e-6
    g = objective.gradient(x[:1], memory=bank, jitter=jitter[:1])
    assert g.norm() > 1e-3
    assert torch.equal(g, objective.gradient(x[:1], memory=bank, jitter=jitter[:1]))


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
        (lambda: ConditionalRKE(features=FEATURES), ValueError, "also needs prompt_features"),
        (lambda: MMD(rows(9, D, 3)).gradient(rows(2, D + 1, 0)), ValueError, "reference set holds rows of 6"),
        (lambda: RKE(unit=False).gradient(rows(2, D, 0), None, filled(RKE(features=FEATURES).make_memory())),
         TypeError, "needs a MemoryBank"),
        (lambda: ConditionalRKE().gradient(rows(2, D, 0), rows(2, 9, 0), filled(MemoryBank())), ValueError, "width 9"),
        (lambda: MMD(rows(9, D, 3), reference_prompts=rows(9, P, 4)).gradient(rows(2, D, 0)), ValueError, "needs prompt"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
