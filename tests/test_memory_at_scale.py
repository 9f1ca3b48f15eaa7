"""Pruning, forgetting, storage and the memories of constant size."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kspec_guidance import MemoryBank, MemoryFileError
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel, RationalQuadraticKernel
from kspec_guidance.memory import CentroidMemory, PromptWeights, choose_memory
from kspec_guidance.memory.selection import prune
from kspec_guidance.objectives import RKE, ConditionalRKE
from kspec_guidance.objectives.base import TOLERANCE

WEIGH = PromptWeights(GaussianKernel(0.35))


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def clustered(n, d=24, p=6, prompts=9, seed=0):
    """Samples about a centre for each prompt, and the prompts' features; near and far prompts alike."""
    g = torch.Generator().manual_seed(seed)
    centres, texts = torch.randn(prompts, d, generator=g), torch.randn(prompts, p, generator=g)
    which = torch.arange(n) % prompts
    return centres[which] + 0.4 * torch.randn(n, d, generator=g), unit(texts)[which]


def filled(n=300, **settings):
    bank = MemoryBank(**settings)
    x, t = clustered(n)
    for start in range(0, n, 7):
        bank.add(x[start : start + 7], t[start : start + 7])
    return bank, x, t


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 0.1])
def test_what_pruning_drops_is_within_the_stated_bound(seed, tolerance, g):
    bank, _, _ = filled()
    b = 0.6
    x, t = (z[seed : seed + 2] for z in clustered(20, seed=seed))
    t = unit(t + 0.2 * torch.randn(2, 6, generator=g))
    x = unit(x).double()
    kernel = GaussianKernel(b)
    every = bank.select(t, WEIGH, 0.0)
    some = bank.select(t, WEIGH, tolerance)
    assert len(some) < len(every) == 300
    left = every.mass(2) - some.mass(2)
    allowed = tolerance * every.mass(2).clamp_min(1)
    assert (left <= allowed * (1 + 1e-5) + 1e-4).all()  # masses are sums of float32 weights
    pull = lambda s: kernel.squared().vjp(x, s.rows(x), s.weights.double())  # noqa: E731
    error = (pull(every) - pull(some)).norm(dim=1)
    assert (error <= allowed * math.sqrt(2 / math.e) / b).all()


def test_pruning_drops_the_lightest_and_counts_their_rows():
    weights = torch.tensor([[1.0, 1e-4, 1e-5, 1e-2], [1e-6, 1e-5, 1e-5, 1e-2]])
    assert prune(weights, torch.ones(4), 1e-3).tolist() == [True, False, False, True]
    assert prune(weights, torch.tensor([1, 100, 1, 1]), 1e-3).tolist() == [True, True, False, True]
    heavy = torch.tensor([[1.0, 1e-4, 1e-5, 1e-2]])
    assert prune(heavy, torch.tensor([1000, 100, 1, 1]), 1e-3).tolist() == [True, False, False, False]  # of 1,000 rows
    assert prune(weights, torch.ones(4), 0.0).all()
    assert not prune(weights, torch.ones(4), 10.0).any()


@pytest.mark.parametrize("kernel", [
    GaussianKernel(0.6), RationalQuadraticKernel(0.6, 0.7), CosineKernel(), PolynomialKernel(3, 0.5), PolynomialKernel(2),
    LaplacianKernel(2.0), GaussianKernel(0.9) * CosineKernel(),
])  # fmt: skip
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_one_pass_over_blocks_is_the_gradient_of_the_sum(kernel, unit_rows, shift, g, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.selection.BLOCK_BYTES", 1000)  # many blocks, across chunks
    memory, x, t = filled()
    if shift:
        memory = MemoryBank()
        memory.add(x + shift, t)
    objective = ConditionalRKE(kernel=kernel.fit(x) if kernel == PolynomialKernel(2) else kernel)
    objective.unit = unit_rows
    z = (x[:5] + shift + 0.3 * torch.randn(5, 24, generator=g)).double()
    z = (unit(z) if unit_rows else z).requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(z, t[:5], memory), z)
    found = objective.gradient(z.detach(), t[:5], memory)
    assert (found - expected).norm() < 1e-6 * expected.norm() + 1e-12  # weights are float32


def test_half_precision_keeps_half_the_bytes_and_the_direction(g):
    exact, x, t = filled()
    z = unit(x[:4] + 0.3 * torch.randn(4, 24, generator=g))
    right = ConditionalRKE().gradient(z, t[:4], exact)
    for dtype, least in ((torch.float16, 0.99999), (torch.bfloat16, 0.999)):
        half, _, _ = filled(dtype=dtype)
        assert half.nbytes * 2 == exact.nbytes
        found = ConditionalRKE().gradient(z, t[:4], half)
        assert torch.cosine_similarity(found, right, dim=1).min() > least


def test_rows_in_a_folder_are_mapped_and_leave_nothing_behind(tmp_path, g):
    exact, x, t = filled()
    mapped, _, _ = filled(folder=tmp_path / "rows")
    assert torch.equal(mapped.x, exact.x)
    z = unit(x[:4] + torch.randn(4, 24, generator=g))
    assert torch.equal(ConditionalRKE().gradient(z, t[:4], mapped), ConditionalRKE().gradient(z, t[:4], exact))
    assert list((tmp_path / "rows").iterdir()) == []
    mapped.save(tmp_path / "m")
    again = MemoryBank.load(tmp_path / "m", folder=tmp_path / "rows")
    assert torch.equal(again.x, exact.x)
    assert torch.equal(again.prompts, exact.prompts)


def test_a_full_disk_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    bank, x, t = filled(16, folder=tmp_path)
    before = bank.x.clone()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        bank.add(x.repeat(20, 1), t.repeat(20, 1))
    assert len(bank) == 16
    assert torch.equal(bank.x, before)
    assert list(tmp_path.iterdir()) == []


def test_a_window_keeps_the_newest(tmp_path):
    bank = MemoryBank(limit=20)
    for k in range(0, 90, 9):
        bank.add(torch.arange(k, k + 9.0)[:, None].repeat(1, 2), torch.eye(9))
    assert sorted(bank.x[:, 0].tolist()) == list(range(70, 90))
    assert bank.newest(3)[0][:, 0].tolist() == [87, 88, 89]
    assert (len(bank), bank.seen) == (20, 90)
    bank.save(tmp_path / "m")
    again = MemoryBank.load(tmp_path / "m")
    for memory in (bank, again):
        memory.add(torch.full((1, 2), 90.0), torch.eye(9)[:1])
    assert torch.equal(again.x, bank.x)
    assert 70 not in again.x[:, 0]
    assert torch.equal(again.prompts, bank.prompts)


def test_a_reservoir_keeps_a_uniform_sample():
    hits = torch.zeros(200)
    for seed in range(300):
        bank = MemoryBank(limit=20, forget="reservoir", seed=seed)
        for k in range(0, 200, 10):
            bank.add(torch.arange(k, k + 10.0)[:, None])
        hits[bank.x[:, 0].long()] += 1
    expected = 300 * 20 / 200
    assert hits.sum() == 300 * 20
    chi2 = ((hits - expected) ** 2 / expected).sum()
    assert 120 < chi2 < 280  # 199 degrees of freedom
    assert abs(hits[:100].mean() / hits[100:].mean() - 1) < 0.1


def test_decay_halves_the_weight_of_old_rows():
    bank = MemoryBank(half_life=10)
    bank.add(torch.eye(30), torch.ones(30, 1))
    weights = bank.select(torch.ones(1, 1), WEIGH).weights[0]
    assert weights[-1] == pytest.approx(1.0)
    assert weights[-11] == pytest.approx(0.5)
    assert weights[-21] == pytest.approx(0.25)
    assert bank.select().weights[0, -11] == pytest.approx(0.5)


@pytest.mark.parametrize("make", [lambda: MemoryBank(half_life=10), lambda: CentroidMemory(8)])
def test_duplicates_part_where_all_samples_share_one_row_of_weights(make):
    memory = make()
    memory.add(torch.eye(5), torch.ones(5, 1))
    x = torch.eye(5)[2:5].clone()
    jitter = 0.01 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert (RKE(GaussianKernel(0.6)).gradient(x, None, memory, jitter).norm(dim=1) > 1e-3).all()


def test_threads_read_one_bank_and_scratch_is_not_pickled(g):
    bank, x, t = filled(3000)
    z = unit(x[:64] + 0.3 * torch.randn(64, 24, generator=g))
    objective = ConditionalRKE(GaussianKernel(0.6))
    alone = [objective.gradient(z[k : k + 1], t[k : k + 1], bank) for k in range(64)]

    def work(k):
        return objective.gradient(z[k : k + 1], t[k : k + 1], bank)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(work, range(64)), alone, strict=True):
                torch.testing.assert_close(found, right)
    assert bank._store.scratch_bytes > 0
    for other in (pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
        assert other._store.scratch_bytes == 0
        torch.testing.assert_close(objective.gradient(z[:1], t[:1], other), alone[0])


def test_a_selection_is_kept_for_the_run_and_dropped_when_something_is_added():
    bank, x, t = filled()
    first = bank.select(t[:2], WEIGH, 1e-3)
    assert bank.select(t[:2].clone(), PromptWeights(GaussianKernel(0.35)), 1e-3) is first
    assert bank.select(t[2:4], WEIGH, 1e-3) is not first
    bank.add(x[:1], t[:1])
    assert len(bank.select(t[:2], WEIGH, 1e-3)) > len(first)


def test_unrelated_prompts_do_not_repel():
    bank = MemoryBank()
    bank.add(torch.randn(50, 8), torch.eye(6)[:1].repeat(50, 1))
    x, other = unit(torch.randn(1, 8)), torch.eye(6)[1:2]
    objective = ConditionalRKE()
    assert objective.gradient(x, other, bank).norm() == 0
    assert float(objective.mass(1, other, bank)[0]) < TOLERANCE
    near = unit(torch.tensor([[1.0, 0.7, 0, 0, 0, 0]]))
    assert objective.gradient(x, near, bank).norm() > 0


@pytest.mark.parametrize("settings", [
    {"dtype": torch.float64}, {"limit": 0}, {"limit": 2.5}, {"forget": "all"}, {"half_life": 0},
    {"pinned": True, "folder": "x"},
    {"device": "cuda", "folder": "x"},
])  # fmt: skip
def test_settings_outside_their_ranges_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MemoryBank(**settings)


# -- centroids -----------------------------------------------------------------------------------------------------------


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
        right, found = objective.gradient(z, t[:3], exact), objective.gradient(z, t[:3], means)
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
    alike = torch.cosine_similarity(objective.gradient(z, t[:9], means), objective.gradient(z, t[:9], exact), dim=1)
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
    with pytest.raises(ValueError, match="unit"):
        a.merge(CentroidMemory(16, unit=False))
    with pytest.raises(ValueError, match="unit=False"):
        a.select(unit=False)
    CentroidMemory().save(tmp_path / "empty")
    assert len(CentroidMemory.load(tmp_path / "empty")) == 0


@pytest.mark.parametrize("settings", [{"capacity": 1}, {"capacity": 3.0}, {"spread": 0}, {"prompt_spread": -1.0}])
def test_centroid_settings_outside_their_ranges_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CentroidMemory(**settings)


def test_the_rule_that_picks_a_memory():
    assert choose_memory(1000, (4, 64, 64)).dtype == torch.float32
    assert choose_memory(100_000, (4, 64, 64)).dtype == torch.float16
    means = choose_memory(10**8, (4, 64, 64))
    assert isinstance(means, CentroidMemory)
    assert means.capacity == 2048
    assert choose_memory(10**8, (16, 128, 128), budget=1 << 30).capacity == 128
