"""Memories and feature maps that are made, filled or read in torch.inference_mode() work outside of it, and the reverse."""

import copy

import pytest
import torch

from kspec_guidance import MemoryBank, RandomFeatureMemory
from kspec_guidance.features import NystromFeatures, RandomFourierFeatures, RandomProjection
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.objectives import ConditionalRKE
from tests.memory.banks import PROMPT_WEIGHTS
from tests.samples import clustered_samples, normalize_rows

KERNEL, PROMPT_KERNEL = GaussianKernel(0.6), GaussianKernel(0.35)


def random_feature_memory(folder):
    phi, psi = RandomFourierFeatures(KERNEL, 24, 64), RandomFourierFeatures(PROMPT_KERNEL, 6, 16)
    return RandomFeatureMemory(phi.power(2), psi.power(2))


MEMORIES = {
    "rows": lambda folder: MemoryBank(),
    "half precision": lambda folder: MemoryBank(dtype=torch.float16),
    "window": lambda folder: MemoryBank(limit=9),
    "reservoir": lambda folder: MemoryBank(limit=9, forget="reservoir", half_life=10),
    "folder": lambda folder: MemoryBank(folder=folder),
    "centroids": lambda folder: CentroidMemory(9),
    "random features": random_feature_memory,
}


def gradient(memory, x, t):
    if isinstance(memory, RandomFeatureMemory):
        psi = RandomFourierFeatures(PROMPT_KERNEL, 6, 16)
        objective = ConditionalRKE(KERNEL, RandomFourierFeatures(KERNEL, 24, 64), prompt_feature_map=psi)
    else:
        objective = ConditionalRKE(KERNEL)
    return objective.gradient(x, t, memory).rows


def reload(memory, path):
    memory.save(path)
    return memory.empty_copy().restore(path) if isinstance(memory, RandomFeatureMemory) else type(memory).load(path)


@pytest.mark.filterwarnings("ignore:.*random features in")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", MEMORIES)
def test_memory_is_usable_in_and_out_of_inference_mode(name, first, tmp_path):
    x, t = clustered_samples(40)
    z = normalize_rows(x[:3])
    expected, memory = MEMORIES[name](tmp_path / "a"), None
    for mode in (None, first, not first, first):
        with torch.inference_mode(bool(mode)):
            if memory is None:
                memory = MEMORIES[name](tmp_path / "b")
            for part in (slice(0, 1), slice(1, 14), slice(14, 20)):
                memory.add(x[part].clone(), t[part].clone())
            gradient(memory, z.clone(), t[:3].clone())
            other = memory.empty_copy()
            other.add(x[20:].clone(), t[20:].clone())
            memory.merge(other)
            memory = copy.deepcopy(reload(memory, tmp_path / "file"))
        for part in (slice(0, 1), slice(1, 14), slice(14, 20)):
            expected.add(x[part], t[part])
        rest = expected.empty_copy()
        rest.add(x[20:], t[20:])
        expected = reload(expected.merge(rest), tmp_path / "file")
    torch.testing.assert_close(gradient(memory, z, t[:3]), gradient(expected, z, t[:3]))


@pytest.mark.parametrize("indexed", [True, False])
def test_selection_of_inference_mode_is_differentiable_outside(indexed, g):
    x, t = clustered_samples(40)
    with torch.inference_mode():
        memory = MemoryBank(dtype=torch.float16)
        memory.add(x.clone(), t.clone())
        selection = memory.select(t[:2].clone(), PROMPT_WEIGHTS, 1e-3) if indexed else memory.select()
        u = normalize_rows(x[:2])
        selection.kernel_gradient(KERNEL, u)
        selection.distances(u)
    z = normalize_rows(x[:2]).requires_grad_()
    weights = selection.vectors(z)[2]
    (selection.kernel(KERNEL, z) * (1 if weights is None else weights)).sum().backward()
    torch.testing.assert_close(z.grad, selection.kernel_gradient(KERNEL, z.detach())[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [
    lambda: RandomFourierFeatures(KERNEL, 24, 64), lambda: RandomProjection(24, 8),
    lambda: NystromFeatures(KERNEL, clustered_samples(10)[0]),
])  # fmt: skip
def test_feature_map_of_inference_mode_is_differentiable_outside(make):
    x, _ = clustered_samples(4)
    expected = make()(x)
    with torch.inference_mode():
        phi = make()
        torch.testing.assert_close(phi(x), expected)
        moved = copy.deepcopy(phi).to(torch.float32)
        moved(x)
    for feature_map in (phi, moved):
        z = x.clone().requires_grad_()
        feature_map(z).square().sum().backward()
        assert torch.isfinite(z.grad).all()


def test_guidance_with_a_memory_alternates_inference_mode(pipe):
    from kspec_guidance import SPARKE

    guide, kwargs = SPARKE(), {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "latent"}
    for mode in (True, False, True):
        with torch.inference_mode(mode), guide.attach(pipe):
            pipe("heart", **kwargs)
    assert len(guide.memory) == 6
