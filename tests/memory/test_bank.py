import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kspec_guidance import MemoryBank, RandomFeatureMemory
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel, RationalQuadraticKernel
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.objectives import RKE, ConditionalRKE
from kspec_guidance.objectives.base import TOLERANCE
from tests.memory.banks import WEIGH, bank, filled
from tests.samples import unit


def test_what_is_added_is_there_in_order():
    g = torch.Generator().manual_seed(1)
    parts = [torch.randn(k, 4, 2, 2, generator=g) for k in (1, 40, 3)]
    memory = MemoryBank()
    for part in parts:
        memory.add(part)
    assert len(memory) == 44
    assert torch.equal(memory.x, torch.cat(parts).flatten(1))


def test_merging_appends_and_refuses_other_things():
    a, b = bank(3), bank(4, seed=1)
    both = torch.cat([a.x, b.x])
    assert torch.equal(a.merge(b).x, both)
    other = MemoryBank("x0", "encoder-2")
    other.add(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="differ in prompt_encoder"):
        a.merge(other)
    with pytest.raises(TypeError, match="cannot merge"):
        a.merge(RandomFeatureMemory(RandomFourierFeatures(GaussianKernel(1.0), 16, 8)))
    assert len(a) == 7
    a.merge(a)
    assert len(a) == 14


@pytest.mark.parametrize(
    ("x", "t", "words"),
    [
        (torch.zeros(1, 4, 4, 4), torch.zeros(1, 3), r"features of shape \(4, 2, 2\), got \(4, 4, 4\)"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 7), "prompt features of width 3, got width 7"),
        (torch.zeros(1, 4, 2, 2), None, "got no prompts"),
        (torch.zeros(2, 4, 2, 2), torch.zeros(1, 3), "2 samples but 1 prompt"),
        (torch.full((1, 4, 2, 2), float("nan")), torch.zeros(1, 3), "nothing was added"),
        (torch.zeros(4), torch.zeros(1, 3), r"tensor \[n, ...\]"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(x, t, words):
    memory = bank()
    before = memory.x.clone()
    with pytest.raises(ValueError, match=words):
        memory.add(x, t)
    assert torch.equal(memory.x, before)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (((4, 8, 8), "x0", "encoder-1"), r"this pipeline makes \(4, 8, 8\); use a separate memory"),
        (((4, 2, 2), "latents", "encoder-1"), "entries of space 'x0'"),
        (((4, 2, 2), "x0", "encoder-2"), "encoded by encoder-1, this pipeline uses encoder-2"),
    ],
)
def test_another_pipeline_is_refused_until_cleared(args, words):
    memory = bank()
    with pytest.raises(ValueError, match=words):
        memory.bind(*args)
    memory.clear()
    memory.bind(*args)


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
    objective.normalize = unit_rows
    z = (x[:5] + shift + 0.3 * torch.randn(5, 24, generator=g)).double()
    z = (unit(z) if unit_rows else z).requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(z, t[:5], memory), z)
    found = objective.gradient(z.detach(), t[:5], memory).rows
    assert (found - expected).norm() < 1e-6 * expected.norm() + 1e-12  # weights are float32


def test_half_precision_keeps_half_the_bytes_and_the_direction(g):
    exact, x, t = filled()
    z = unit(x[:4] + 0.3 * torch.randn(4, 24, generator=g))
    right = ConditionalRKE().gradient(z, t[:4], exact).rows
    for dtype, least in ((torch.float16, 0.99999), (torch.bfloat16, 0.999)):
        half, _, _ = filled(dtype=dtype)
        assert half.nbytes * 2 == exact.nbytes
        found = ConditionalRKE().gradient(z, t[:4], half).rows
        assert torch.cosine_similarity(found, right, dim=1).min() > least


def test_a_window_keeps_the_newest(tmp_path):
    bank = MemoryBank(limit=20)
    for k in range(0, 90, 9):
        bank.add(torch.arange(k, k + 9.0)[:, None].repeat(1, 2), torch.eye(9))
    assert sorted(bank.x[:, 0].tolist()) == list(range(70, 90))
    assert bank.newest(3)[0][:, 0].tolist() == [87, 88, 89]
    assert (len(bank), bank.total_added) == (20, 90)
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
    assert (RKE(GaussianKernel(0.6)).gradient(x, None, memory, jitter=jitter).rows.norm(dim=1) > 1e-3).all()


def test_threads_read_one_bank_and_scratch_is_not_pickled(g):
    bank, x, t = filled(3000)
    z = unit(x[:64] + 0.3 * torch.randn(64, 24, generator=g))
    objective = ConditionalRKE(GaussianKernel(0.6))
    alone = [objective.gradient(z[k : k + 1], t[k : k + 1], bank).rows for k in range(64)]

    def work(k):
        return objective.gradient(z[k : k + 1], t[k : k + 1], bank).rows

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, right in zip(pool.map(work, range(64)), alone, strict=True):
                torch.testing.assert_close(found, right)
    for other in (pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
        assert other._store.scratch_bytes == 0
        torch.testing.assert_close(objective.gradient(z[:1], t[:1], other).rows, alone[0])


def test_unrelated_prompts_do_not_repel():
    bank = MemoryBank()
    bank.add(torch.randn(50, 8), torch.eye(6)[:1].repeat(50, 1))
    x, other = unit(torch.randn(1, 8)), torch.eye(6)[1:2]
    objective = ConditionalRKE()
    assert objective.gradient(x, other, bank).rows.norm() == 0
    assert float(objective.pairs(x, other, bank).effective_count[0]) < TOLERANCE
    near = unit(torch.tensor([[1.0, 0.7, 0, 0, 0, 0]]))
    assert objective.gradient(x, near, bank).rows.norm() > 0


@pytest.mark.parametrize("settings", [
    {"dtype": torch.float64}, {"limit": 0}, {"limit": 2.5}, {"forget": "all"}, {"half_life": 0},
    {"device": "cuda", "folder": "x"},
])  # fmt: skip
def test_settings_outside_their_ranges_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MemoryBank(**settings)
