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
from tests.memory.banks import PROMPT_WEIGHTS, filled_bank, small_bank
from tests.samples import normalize_rows, rows


def test_add_preserves_order():
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(k, 4, 2, 2, generator=g) for k in (1, 40, 3)]
    memory = MemoryBank()
    for batch in batches:
        memory.add(batch)
    assert len(memory) == 44
    assert torch.equal(memory.x, torch.cat(batches).flatten(1))


def test_merge_appends_rows_and_mismatch_raises():
    a, b = small_bank(3), small_bank(4, seed=1)
    expected = torch.cat([a.x, b.x])
    assert torch.equal(a.merge(b).x, expected)
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
    ("x", "t", "message"),
    [
        (torch.zeros(1, 4, 4, 4), torch.zeros(1, 3), r"features of shape \(4, 2, 2\), got \(4, 4, 4\)"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 7), "prompt features of width 3, got width 7"),
        (torch.zeros(1, 4, 2, 2), None, "got no prompts"),
        (torch.zeros(2, 4, 2, 2), torch.zeros(1, 3), "2 samples but 1 prompt"),
        (torch.full((1, 4, 2, 2), float("nan")), torch.zeros(1, 3), "nothing was added"),
        (torch.zeros(4), torch.zeros(1, 3), r"tensor \[n, ...\]"),
    ],
)
def test_add_mismatched_input_raises_and_keeps_rows(x, t, message):
    memory = small_bank()
    before = memory.x.clone()
    with pytest.raises(ValueError, match=message):
        memory.add(x, t)
    assert torch.equal(memory.x, before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (((4, 8, 8), "x0", "encoder-1"), r"this pipeline makes \(4, 8, 8\); use a separate memory"),
        (((4, 2, 2), "latents", "encoder-1"), "entries of space 'x0'"),
        (((4, 2, 2), "x0", "encoder-2"), "encoded by encoder-1, this pipeline uses encoder-2"),
    ],
)
def test_bind_to_other_pipeline_raises_until_cleared(args, message):
    memory = small_bank()
    with pytest.raises(ValueError, match=message):
        memory.bind(*args)
    memory.clear()
    memory.bind(*args)


@pytest.mark.parametrize("kernel", [
    GaussianKernel(0.6), RationalQuadraticKernel(0.6, 0.7), CosineKernel(), PolynomialKernel(3, 0.5), PolynomialKernel(2),
    LaplacianKernel(2.0), GaussianKernel(0.9) * CosineKernel(),
])  # fmt: skip
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_blockwise_gradient_matches_autograd(kernel, normalize, shift, g, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.selection.BLOCK_BYTES", 1000)  # many blocks, across chunks
    memory, x, t = filled_bank()
    if shift:
        memory = MemoryBank()
        memory.add(x + shift, t)
    objective = ConditionalRKE(kernel=kernel.fit(x) if kernel == PolynomialKernel(2) else kernel)
    objective.normalize = normalize
    z = (x[:5] + shift + 0.3 * torch.randn(5, 24, generator=g)).double()
    z = (normalize_rows(z) if normalize else z).requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(z, t[:5], memory), z)
    actual = objective.gradient(z.detach(), t[:5], memory).rows
    assert (actual - expected).norm() < 1e-6 * expected.norm() + 1e-12  # weights are float32


def test_half_precision_halves_bytes_and_preserves_gradient_direction(g):
    exact, x, t = filled_bank()
    z = normalize_rows(x[:4] + 0.3 * torch.randn(4, 24, generator=g))
    expected = ConditionalRKE().gradient(z, t[:4], exact).rows
    for dtype, min_cosine in ((torch.float16, 0.99999), (torch.bfloat16, 0.999)):
        half, _, _ = filled_bank(dtype=dtype)
        assert half.nbytes * 2 == exact.nbytes
        actual = ConditionalRKE().gradient(z, t[:4], half).rows
        assert torch.cosine_similarity(actual, expected, dim=1).min() > min_cosine


def test_window_keeps_newest_rows(tmp_path):
    bank = MemoryBank(limit=20)
    for k in range(0, 90, 9):
        bank.add(torch.arange(k, k + 9.0)[:, None].repeat(1, 2), torch.eye(9))
    assert sorted(bank.x[:, 0].tolist()) == list(range(70, 90))
    assert bank.newest(3)[0][:, 0].tolist() == [87, 88, 89]
    nearly = torch.eye(9)[2] + 1e-3
    assert bank.newest(3, torch.eye(9)[2])[0][:, 0].tolist() == [74, 83]  # of one prompt
    assert [len(bank.newest(1, nearly, tolerance)[0]) for tolerance in (0.0, 0.005)] == [0, 1]
    assert (len(bank), bank.total_added) == (20, 90)
    bank.save(tmp_path / "m")
    loaded = MemoryBank.load(tmp_path / "m")
    for memory in (bank, loaded):
        memory.add(torch.full((1, 2), 90.0), torch.eye(9)[:1])
    assert torch.equal(loaded.x, bank.x)
    assert 70 not in loaded.x[:, 0]
    assert torch.equal(loaded.prompts, bank.prompts)


def test_reservoir_keeps_uniform_sample():
    counts = torch.zeros(200)
    for seed in range(300):
        bank = MemoryBank(limit=20, forget="reservoir", seed=seed)
        for k in range(0, 200, 10):
            bank.add(torch.arange(k, k + 10.0)[:, None])
        counts[bank.x[:, 0].long()] += 1
    expected = 300 * 20 / 200
    assert counts.sum() == 300 * 20
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert 120 < chi2 < 280  # 199 degrees of freedom
    assert abs(counts[:100].mean() / counts[100:].mean() - 1) < 0.1


def test_half_life_decays_weights_of_old_rows():
    bank = MemoryBank(half_life=10)
    bank.add(torch.eye(30), torch.ones(30, 1))
    weights = bank.select(torch.ones(1, 1), PROMPT_WEIGHTS).weights[0]
    assert weights[-1] == pytest.approx(1.0)
    assert weights[-11] == pytest.approx(0.5)
    assert weights[-21] == pytest.approx(0.25)
    assert bank.select().weights[0, -11] == pytest.approx(0.5)


@pytest.mark.parametrize("make_memory", [lambda: MemoryBank(half_life=10), lambda: CentroidMemory(8)])
def test_duplicates_repel_with_shared_weights(make_memory):
    memory = make_memory()
    memory.add(torch.eye(5), torch.ones(5, 1))
    x = torch.eye(5)[2:5].clone()
    jitter = 0.01 * torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert (RKE(GaussianKernel(0.6)).gradient(x, None, memory, jitter=jitter).rows.norm(dim=1) > 1e-3).all()


def test_concurrent_reads_match_and_scratch_is_not_pickled(g):
    bank, x, t = filled_bank(3000)
    z = normalize_rows(x[:64] + 0.3 * torch.randn(64, 24, generator=g))
    objective = ConditionalRKE(GaussianKernel(0.6))
    sequential = [objective.gradient(z[k : k + 1], t[k : k + 1], bank).rows for k in range(64)]

    def work(k):
        return objective.gradient(z[k : k + 1], t[k : k + 1], bank).rows

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for actual, expected in zip(pool.map(work, range(64)), sequential, strict=True):
                torch.testing.assert_close(actual, expected)
    for other in (pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank)):
        assert other._store.scratch_bytes == 0
        torch.testing.assert_close(objective.gradient(z[:1], t[:1], other).rows, sequential[0])


def test_concurrent_adds_keep_all_rows():
    banks = [MemoryBank(), MemoryBank(dtype=torch.float16)]
    t = torch.eye(7)

    def work(k):
        for i in range(20):
            x = torch.full((3, 40), float(20 * k + i))
            banks[k % 2].add(x, t[[k % 7] * 3])
            if i % 5 == 4:
                banks[(k + 1) % 2].merge(banks[k % 2].empty_copy())
                banks[k % 2].select(t[:2], PROMPT_WEIGHTS, TOLERANCE).rows(x)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for parity, bank in enumerate(banks):
        values = [float(20 * k + i) for k in range(parity, 8, 2) for i in range(20)]
        assert sorted(bank.x[:, 0].tolist()) == sorted(values * 3)
        assert torch.equal(bank.prompts.argmax(1), (bank.x[:, 0] // 20).long() % 7)


def test_default_device_of_torch_does_not_matter(tmp_path):
    x, t = torch.randn(30, 16), torch.randn(30, 3)
    phi, psi = RandomFourierFeatures(GaussianKernel(1.0), 16, 32), RandomFourierFeatures(GaussianKernel(1.0), 3, 8)
    for make in (lambda: MemoryBank(half_life=9), lambda: CentroidMemory(9), lambda: RandomFeatureMemory(phi, psi)):
        with torch.device("meta"):  # as torch.set_default_device: new tensors of the package must not follow it
            memory = make()
            memory.add(x, t)
            memory.merge(memory)
            if not isinstance(memory, RandomFeatureMemory):
                selection = memory.select(t[:2], PROMPT_WEIGHTS, TOLERANCE)
                selection.kernel_gradient(GaussianKernel(1.0), x[:2])
                selection.distances(x[:2])
                memory.save(tmp_path / "m")
                type(memory).load(tmp_path / "m")
        assert len(memory) == 60


def test_devices_without_values_raise():
    with pytest.raises(ValueError, match="device 'meta' have no values"):
        MemoryBank(device="meta")
    with pytest.raises(ValueError, match="device 'meta' and have no values; nothing was added"):
        MemoryBank().add(torch.zeros(2, 3, device="meta"))
    with pytest.raises(ValueError, match="prompt features are on the device 'meta'"):
        MemoryBank().add(torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))
    with pytest.raises(ValueError, match="'xpu:77' is not available"):
        MemoryBank(device="xpu:77")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [MemoryBank, lambda: MemoryBank(dtype=torch.float16), lambda: CentroidMemory(4)])
def test_samples_of_any_dtype_and_layout_are_copied(make, dtype):
    for x in (torch.ones(3, 2).to(dtype).T, torch.ones(1, 3).to(dtype).expand(2, 3)):
        memory = make()
        memory.add(x)
        memory.add(x)
        before = memory.x.clone()
        x.zero_()
        assert len(memory) == 4
        assert memory.x.min() > 0
        assert torch.equal(memory.x, before)


def test_values_beyond_the_dtype_raise_and_keep_rows(tmp_path):
    half = MemoryBank(dtype=torch.float16)
    half.add(torch.ones(2, 3))
    large = MemoryBank()
    large.add(torch.tensor([[1.0, 2.0, 3.0]]))
    large.add(torch.tensor([[1.0, 2.0, -1e5]]))
    large.save(tmp_path / "m")
    message = r"values up to 1e\+05, more than torch.float16 can store.*dtype=torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        half.add(large.x)
    with pytest.raises(ValueError, match=message):
        half.merge(large)
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(tmp_path / "m", dtype=torch.float16)
    assert torch.equal(half.x, torch.ones(2, 3))
    empty = MemoryBank(dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        empty.add(large.x)
    empty.add(torch.ones(2, 5))  # of another width: nothing of the refused rows is left
    with pytest.raises(ValueError, match=r"up to 1e\+300, more than torch.float32.*scale them down"):
        MemoryBank().add(torch.full((2, 3), 1e300, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN or infinite"):
        MemoryBank().add(torch.full((2, 3), float("nan")).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="NaN or infinite"):
        CentroidMemory().add(torch.tensor([[1e300, 1.0]], dtype=torch.float64))


def test_unrelated_prompts_do_not_repel():
    bank = MemoryBank()
    bank.add(torch.randn(50, 8), torch.eye(6)[:1].repeat(50, 1))
    x, other = normalize_rows(torch.randn(1, 8)), torch.eye(6)[1:2]
    objective = ConditionalRKE()
    assert objective.gradient(x, other, bank).rows.norm() == 0
    assert float(objective.pairs(x, other, bank).effective_count[0]) < TOLERANCE
    similar = normalize_rows(torch.tensor([[1.0, 0.7, 0, 0, 0, 0]]))
    assert objective.gradient(x, similar, bank).rows.norm() > 0


@pytest.mark.parametrize("settings", [
    {"dtype": torch.float64}, {"limit": 0}, {"limit": 2.5}, {"limit": True}, {"forget": "all"}, {"half_life": 0},
    {"device": "cuda", "folder": "x"},
])  # fmt: skip
def test_invalid_settings_raise(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MemoryBank(**settings)


@pytest.mark.parametrize("parts", [[1] * 23, [3] * 7 + [2], [23], [9, 14]])
def test_restart_keeps_newest_row_at_limit(parts):
    x, t = rows(23, 4, 0), rows(23, 3, 1)
    bank, kept, start = MemoryBank(limit=5, forget="restart"), [], 0
    for n in parts:
        bank.add(x[start : start + n], t[start : start + n])
        start += n
    for k in range(23):
        kept = [*kept, k][-1:] if len(kept) == 4 else [*kept, k]
    torch.testing.assert_close(bank.x, x[kept].float())
    torch.testing.assert_close(bank.prompts, torch.nn.functional.normalize(t[kept].float()))
    assert bank.total_added == 23
    with pytest.raises(ValueError, match=r"restart.* needs a limit of at least 2"):
        MemoryBank(forget="restart")


@pytest.mark.parametrize("settings", [{}, {"half_life": 4.0}, {"dtype": torch.float16}])
def test_parts_are_views_of_equal_parts_of_each_row(settings, g):
    x, t = torch.randn(40, 3, 5, generator=g), normalize_rows(torch.randn(40, 4, generator=g))
    bank, z = MemoryBank(**settings), torch.randn(2, 5, generator=g)
    assert [len(part) for part in bank.parts(3)] == [0, 0, 0]
    for samples, prompts in zip(x.split(16), t.split(16), strict=True):  # several chunks
        bank.add(samples, prompts)
    for k, part in enumerate(bank.parts(3)):
        alone = MemoryBank(**settings)
        alone.add(x[:, k], t)
        assert part.shape == (5,)
        assert torch.equal(part.x, alone.x)
        assert torch.equal(part.prompts, bank.prompts)
        starts = {chunk.untyped_storage().data_ptr() for chunk in bank._store.chunks}
        assert {chunk.untyped_storage().data_ptr() for chunk in part._store.chunks} == starts
        found, expected = (ConditionalRKE().gradient(z, t[:2], memory).rows for memory in (part, alone))
        torch.testing.assert_close(found, expected)
