import pytest
import torch

from kspec_guidance import MemoryBank
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory, MemoryFileError
from kspec_guidance.objectives import RKE, ConditionalRKE
from tests.memory.banks import filled
from tests.samples import clustered, unit


def means_of(n, capacity, **more):
    memory = CentroidMemory(capacity, **more)
    x, t = clustered(n)
    for start in range(0, n, 5):
        memory.add(x[start : start + 5], t[start : start + 5])
    return memory, x, t


def test_below_capacity_centroids_are_the_exact_memory(g):
    exact, x, t = filled(60)
    means, _, _ = means_of(60, 64)
    z = unit(x[:3] + 0.5 * torch.randn(3, 24, generator=g))
    for objective in (ConditionalRKE(GaussianKernel(0.6)), RKE(GaussianKernel(0.6))):
        right, found = objective.gradient(z, t[:3], exact).rows, objective.gradient(z, t[:3], means).rows
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
        assert float(objective.value(z, t[:3], means)) == pytest.approx(float(objective.value(z, t[:3], exact)), rel=1e-4)


def test_centroids_are_the_means_of_what_they_stand_for():
    memory, x, t = means_of(300, 12)
    assert len(memory) == 300
    assert float(memory.weights.sum()) == pytest.approx(300)
    mean = (memory.weights[:, None] * memory.x).sum(0) / 300
    torch.testing.assert_close(mean, unit(x).mean(0), rtol=1e-3, atol=1e-5)
    text = (memory.weights[:, None] * memory.prompts).sum(0) / 300
    torch.testing.assert_close(text, t.mean(0), rtol=1e-3, atol=1e-5)
    spread = torch.cdist(memory.prompts, t[:9]).amin(1)
    assert (spread < 0.05).float().mean() > 0.7  # different prompts are hardly mixed


@pytest.mark.parametrize(("capacity", "least"), [(18, 0.98), (90, 0.99)])
def test_few_centroids_point_the_right_way(capacity, least, g):
    exact, x, t = filled(900)
    means, _, _ = means_of(900, capacity)
    z = unit(x[:9] + 0.5 * torch.randn(9, 24, generator=g))
    objective = ConditionalRKE(GaussianKernel(0.6))
    alike = torch.cosine_similarity(
        objective.gradient(z, t[:9], means).rows, objective.gradient(z, t[:9], exact).rows, dim=1
    )
    assert alike.min() > least


def test_the_cheapest_pair_is_always_known():
    memory = CentroidMemory(10)
    x, t = clustered(120)
    for k in range(120):
        memory.add(x[k : k + 1], t[k : k + 1])
        if k:
            assert memory._cost[memory._cheapest()] == memory._cost.min()


def test_centroids_merge_and_come_back_from_disk(tmp_path):
    a, _, _ = means_of(200, 16)
    b, _, _ = means_of(100, 16)
    a.merge(b)
    assert len(a) == 300
    assert float(a.weights.sum()) == pytest.approx(300)
    fresh = CentroidMemory(16).merge(b)
    torch.testing.assert_close(fresh.x, b.x)
    a.save(tmp_path / "c")
    again = CentroidMemory.load(tmp_path / "c")
    assert (len(again), again.shape) == (300, (24,))
    torch.testing.assert_close(again.x, a.x)
    torch.testing.assert_close(again._cost, a._cost, rtol=1e-2, atol=1e-3)
    with pytest.raises(MemoryFileError, match="expected a 'rows'"):
        MemoryBank.load(tmp_path / "c")
    with pytest.raises(ValueError, match="normalize"):
        a.merge(CentroidMemory(16, normalize=False))
    with pytest.raises(ValueError, match="normalize=False"):
        a.select(normalize=False)
    CentroidMemory().save(tmp_path / "empty")
    assert len(CentroidMemory.load(tmp_path / "empty")) == 0


@pytest.mark.parametrize("settings", [{"capacity": 1}, {"capacity": 3.0}, {"spread": 0}, {"prompt_spread": -1.0}])
def test_centroid_settings_outside_their_ranges_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CentroidMemory(**settings)
