import pytest
import torch

from kspec_guidance import MemoryBank
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory, MemoryFileError
from kspec_guidance.objectives import RKE, ConditionalRKE
from tests.memory.banks import filled_bank
from tests.samples import clustered_samples, normalize_rows


def centroid_memory(n, capacity, **kwargs):
    memory = CentroidMemory(capacity, **kwargs)
    x, t = clustered_samples(n)
    for start in range(0, n, 5):
        memory.add(x[start : start + 5], t[start : start + 5])
    return memory, x, t


def test_centroids_below_capacity_match_exact_memory(g):
    exact, x, t = filled_bank(60)
    centroids, _, _ = centroid_memory(60, 64)
    z = normalize_rows(x[:3] + 0.5 * torch.randn(3, 24, generator=g))
    for objective in (ConditionalRKE(GaussianKernel(0.6)), RKE(GaussianKernel(0.6))):
        expected, actual = objective.gradient(z, t[:3], exact).rows, objective.gradient(z, t[:3], centroids).rows
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert float(objective.value(z, t[:3], centroids)) == pytest.approx(
            float(objective.value(z, t[:3], exact)), rel=1e-4
        )


def test_centroids_preserve_count_and_mean():
    memory, x, t = centroid_memory(300, 12)
    assert len(memory) == 300
    assert float(memory.weights.sum()) == pytest.approx(300)
    mean = (memory.weights[:, None] * memory.x).sum(0) / 300
    torch.testing.assert_close(mean, normalize_rows(x).mean(0), rtol=1e-3, atol=1e-5)
    mean_prompt = (memory.weights[:, None] * memory.prompts).sum(0) / 300
    torch.testing.assert_close(mean_prompt, t.mean(0), rtol=1e-3, atol=1e-5)
    distance = torch.cdist(memory.prompts, t[:9]).amin(1)
    assert (distance < 0.05).float().mean() > 0.7  # most centroids hold samples of one prompt


@pytest.mark.parametrize(("capacity", "min_cosine"), [(18, 0.98), (90, 0.99)])
def test_few_centroids_preserve_gradient_direction(capacity, min_cosine, g):
    exact, x, t = filled_bank(900)
    centroids, _, _ = centroid_memory(900, capacity)
    z = normalize_rows(x[:9] + 0.5 * torch.randn(9, 24, generator=g))
    objective = ConditionalRKE(GaussianKernel(0.6))
    cosine = torch.cosine_similarity(
        objective.gradient(z, t[:9], centroids).rows, objective.gradient(z, t[:9], exact).rows, dim=1
    )
    assert cosine.min() > min_cosine


def costs_of(memory):
    """Cost of merging each two means, from the means."""
    w = memory.weights.double()
    d2 = torch.cdist(memory.x.double(), memory.x.double()).square() / memory.spread**2
    d2 += torch.cdist(memory.prompts.double(), memory.prompts.double()).square() / memory.prompt_spread**2
    return (d2 * w * w[:, None] / (w + w[:, None])).fill_diagonal_(float("inf"))


def test_cheapest_merge_is_tracked():
    memory = CentroidMemory(10)
    x, t = clustered_samples(120)
    for k in range(120):
        memory.add(x[k : k + 1], t[k : k + 1])
        if k:
            costs = costs_of(memory)
            assert float(costs[memory._cheapest()]) == pytest.approx(float(costs.min()), rel=1e-4)


def test_distances_follow_the_means(g):
    """They are updated with each sample, never computed from the means again."""
    memory = CentroidMemory(8)
    memory.add(torch.randn(5000, 6, generator=g) + 3, torch.randn(5000, 3, generator=g) + 3)
    w = memory.weights.double()
    distances = torch.tensor(memory._distances) * w * w[:, None] / (w + w[:, None])
    torch.testing.assert_close(distances, costs_of(memory), rtol=1e-4, atol=0)
    assert float(memory.weights.sum()) == 5000


def test_samples_added_together_equal_those_added_one_by_one():
    (x, t), together, alone = clustered_samples(300), CentroidMemory(12), CentroidMemory(12)
    together.add(x, t)
    for k in range(300):
        alone.add(x[k : k + 1], t[k : k + 1])
    torch.testing.assert_close(together.weights, alone.weights)
    torch.testing.assert_close(together.x, alone.x)
    torch.testing.assert_close(together.prompts, alone.prompts)


def test_centroids_merge_save_and_load(tmp_path):
    a, _, _ = centroid_memory(200, 16)
    b, _, _ = centroid_memory(100, 16)
    a.merge(b)
    assert len(a) == 300
    assert float(a.weights.sum()) == pytest.approx(300)
    merged = CentroidMemory(16).merge(b)
    torch.testing.assert_close(merged.x, b.x)
    a.save(tmp_path / "c")
    loaded = CentroidMemory.load(tmp_path / "c")
    assert (len(loaded), loaded.shape) == (300, (24,))
    torch.testing.assert_close(loaded.x, a.x)
    torch.testing.assert_close(costs_of(loaded), costs_of(a), rtol=1e-2, atol=1e-3)
    with pytest.raises(MemoryFileError, match="expected 'rows'"):
        MemoryBank.load(tmp_path / "c")
    with pytest.raises(ValueError, match="normalize"):
        a.merge(CentroidMemory(16, normalize=False))
    with pytest.raises(ValueError, match="normalize=False"):
        a.select(normalize=False)
    CentroidMemory().save(tmp_path / "empty")
    assert len(CentroidMemory.load(tmp_path / "empty")) == 0


@pytest.mark.parametrize("settings", [{"capacity": 1}, {"capacity": 3.0}, {"spread": 0}, {"prompt_spread": -1.0}])
def test_invalid_settings_raise(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CentroidMemory(**settings)
