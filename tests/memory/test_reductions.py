import pytest
import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, Novelty
from tests.objectives.common import FEATURES, PROMPT, D, P, filled, relative_error
from tests.samples import rows

PSI = RandomFourierFeatures(PROMPT, P, 32)


BY_FEATURES = {
    "rke": lambda: RKE(FEATURES.kernel, FEATURES, normalize=False),
    "conditional": lambda: ConditionalRKE(
        FEATURES.kernel, FEATURES, normalize=False, prompt_feature_map=RandomFourierFeatures(PROMPT, P, 32)
    ),
    "novelty": lambda: Novelty(FEATURES.kernel, FEATURES, normalize=False, reference=rows(9, D, 3)),
    "mmd": lambda: MMD(rows(9, D, 3), FEATURES.kernel, feature_map=FEATURES),
    "prompt-aware novelty": lambda: Novelty(
        FEATURES.kernel,
        FEATURES,
        normalize=False,
        prompt_feature_map=PSI,
        reference=rows(9, D, 3),
        reference_prompts=rows(9, P, 4),
    ),
    "prompt-aware mmd": lambda: MMD(
        rows(9, D, 3), FEATURES.kernel, rows(9, P, 4), PROMPT, feature_map=FEATURES, prompt_feature_map=PSI
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
    exact, memory = RKE(kernel, normalize=False), filled(MemoryBank(), 50)
    coarse = RKE(kernel, RandomFourierFeatures(kernel, D, 16384), normalize=False)
    found = coarse.gradient(x, None, filled(coarse.make_memory(), 50)).rows.flatten()
    expected = exact.gradient(x, None, memory).rows.flatten()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99


@pytest.mark.filterwarnings("ignore:.*random features in")
@pytest.mark.parametrize("kind", ["conditional", "novelty", "mmd"])
def test_prompt_aware_random_features_approach_the_exact_gradient(kind):
    kernel, x, t = GaussianKernel(3.0), rows(5, D, 0), torch.nn.functional.normalize(rows(5, P, 1))
    reference, prompts = rows(20, D, 3), rows(20, P, 4)
    phi, psi = RandomFourierFeatures(kernel, D, 8192), RandomFourierFeatures(PROMPT, P, 2048)
    make = {
        "conditional": lambda **f: ConditionalRKE(kernel, normalize=False, prompt_kernel=PROMPT, **f),
        "novelty": lambda **f: Novelty(
            kernel, normalize=False, prompt_kernel=PROMPT, reference=reference, reference_prompts=prompts, **f
        ),
        "mmd": lambda **f: MMD(reference, kernel, prompts, PROMPT, **f),
    }[kind]
    exact, coarse = make(), make(feature_map=phi, prompt_feature_map=psi)
    expected = exact.gradient(x, t, filled(exact.make_memory(), 20)).rows.flatten()
    found = coarse.gradient(x, t, filled(coarse.make_memory(), 20)).rows.flatten()
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98
    assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.15)
