import pytest
import torch

from kspec_guidance import RandomFeatureMemory
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import MemoryBank, MemoryFileError
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, Novelty
from tests.objectives.common import FEATURE_MAP, PROMPT_KERNEL, D, P, fill, relative_error
from tests.samples import rows

PROMPT_FEATURE_MAP = RandomFourierFeatures(PROMPT_KERNEL, P, 32)
OBJECTIVES = {
    "rke": lambda: RKE(FEATURE_MAP.kernel, FEATURE_MAP, normalize=False),
    "conditional": lambda: ConditionalRKE(
        FEATURE_MAP.kernel, FEATURE_MAP, normalize=False, prompt_feature_map=RandomFourierFeatures(PROMPT_KERNEL, P, 32)
    ),
    "novelty": lambda: Novelty(FEATURE_MAP.kernel, FEATURE_MAP, normalize=False, reference=rows(9, D, 3)),
    "mmd": lambda: MMD(rows(9, D, 3), FEATURE_MAP.kernel, feature_map=FEATURE_MAP),
    "prompt-aware novelty": lambda: Novelty(
        FEATURE_MAP.kernel,
        FEATURE_MAP,
        normalize=False,
        prompt_feature_map=PROMPT_FEATURE_MAP,
        reference=rows(9, D, 3),
        reference_prompts=rows(9, P, 4),
    ),
    "prompt-aware mmd": lambda: MMD(
        rows(9, D, 3),
        FEATURE_MAP.kernel,
        rows(9, P, 4),
        PROMPT_KERNEL,
        feature_map=FEATURE_MAP,
        prompt_feature_map=PROMPT_FEATURE_MAP,
    ),
}


def make_memory(prompts=True):
    phi = RandomFourierFeatures(GaussianKernel(1.0), 16, 64)
    psi = RandomFourierFeatures(GaussianKernel(1.0), 3, 16) if prompts else None
    return RandomFeatureMemory(phi, psi)


@pytest.mark.parametrize("prompts", [True, False])
def test_random_feature_memory_merges_and_restores_exactly(prompts, g, tmp_path):
    x, t = torch.randn(30, 4, 2, 2, generator=g), torch.randn(30, 3, generator=g)
    full, parts, rest = make_memory(prompts), make_memory(prompts), make_memory(prompts)
    full.add(x, t)
    for i in torch.randperm(20, generator=g).split(3):
        parts.add(x[i], t[i])
    rest.add(x[20:], t[20:])
    parts.merge(rest)
    assert torch.equal(parts.total, full.total)
    assert len(parts) == 30
    assert parts.total.numel() == (64 * 16 if prompts else 64)
    parts.save(tmp_path / "r")
    restored = make_memory(prompts).restore(tmp_path / "r")
    assert torch.equal(restored.total, parts.total)
    assert (len(restored), restored.shape) == (30, (4, 2, 2))
    with pytest.raises(MemoryFileError, match="other random features"):
        RandomFeatureMemory(RandomFourierFeatures(GaussianKernel(2.0), 16, 64)).restore(tmp_path / "r")


def test_coefficients_approximate_kernel_sums(g):
    x, t = torch.randn(9, 16, generator=g), torch.randn(9, 3, generator=g)
    memory = RandomFeatureMemory(
        RandomFourierFeatures(GaussianKernel(1.0), 16, 4096), RandomFourierFeatures(GaussianKernel(1.0), 3, 1024)
    )
    memory.add(x, t)
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (x, t))
    expected = (GaussianKernel(1.0)(u) * GaussianKernel(1.0)(v)).sum(1)
    actual = (memory.feature_map(u) * memory.coefficients(v, u)).sum(1)
    torch.testing.assert_close(actual, expected, atol=0.2, rtol=0)


@pytest.mark.filterwarnings("ignore:.*random features in")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_random_feature_gradient_matches_autograd(name):
    objective = OBJECTIVES[name]()
    assert relative_error(objective, fill(objective.make_memory())) < 1e-8


@pytest.mark.filterwarnings("ignore:.*random features in")
def test_random_feature_gradient_approximates_exact():
    kernel, x = GaussianKernel(3.0), rows(5, D, 0)
    exact, memory = RKE(kernel, normalize=False), fill(MemoryBank(), 50)
    approximate = RKE(kernel, RandomFourierFeatures(kernel, D, 16384), normalize=False)
    actual = approximate.gradient(x, None, fill(approximate.make_memory(), 50)).rows.flatten()
    expected = exact.gradient(x, None, memory).rows.flatten()
    assert torch.cosine_similarity(actual, expected, dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*random features in")
@pytest.mark.parametrize("name", ["conditional", "novelty", "mmd"])
def test_prompt_aware_random_feature_gradient_approximates_exact(name):
    kernel, x, t = GaussianKernel(3.0), rows(5, D, 0), torch.nn.functional.normalize(rows(5, P, 1))
    reference, prompts = rows(20, D, 3), rows(20, P, 4)
    phi, psi = RandomFourierFeatures(kernel, D, 4096), RandomFourierFeatures(PROMPT_KERNEL, P, 1024)
    make_objective = {
        "conditional": lambda **f: ConditionalRKE(kernel, normalize=False, prompt_kernel=PROMPT_KERNEL, **f),
        "novelty": lambda **f: Novelty(
            kernel, normalize=False, prompt_kernel=PROMPT_KERNEL, reference=reference, reference_prompts=prompts, **f
        ),
        "mmd": lambda **f: MMD(reference, kernel, prompts, PROMPT_KERNEL, **f),
    }[name]
    exact, approximate = make_objective(), make_objective(feature_map=phi, prompt_feature_map=psi)
    expected = exact.gradient(x, t, fill(exact.make_memory(), 20)).rows.flatten()
    actual = approximate.gradient(x, t, fill(approximate.make_memory(), 20)).rows.flatten()
    assert torch.cosine_similarity(actual, expected, dim=0) > 0.98
    assert actual.norm().item() == pytest.approx(expected.norm().item(), rel=0.15)
