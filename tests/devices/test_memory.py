"""Memories and feature maps on a simulated accelerator: results as on the CPU, and few reads by the host."""

import copy
import weakref

import pytest
import torch

from kspec_guidance import MemoryBank, RandomFeatureMemory
from kspec_guidance.features import NystromFeatures, RandomFourierFeatures, RandomProjection
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, RationalQuadraticKernel
from kspec_guidance.memory import CentroidMemory, choose_memory
from kspec_guidance.memory.bank import _budget
from kspec_guidance.memory.store import RowStore
from tests.devices.simulated import DeviceTensor, SimulatedDevice
from tests.memory.banks import PROMPT_WEIGHTS
from tests.samples import clustered_samples, normalize_rows

KERNEL, PROMPT_KERNEL = GaussianKernel(0.6), GaussianKernel(0.35)
KINDS = pytest.mark.parametrize("kind", ["cuda", "mps"])
MEMORIES = {
    "rows": lambda kind: MemoryBank(),
    "rows on the host": lambda kind: MemoryBank(device="cpu"),
    "float16": lambda kind: MemoryBank(dtype=torch.float16),
    "float16 on the host": lambda kind: MemoryBank(dtype=torch.float16, device="cpu"),
    "bfloat16 by name": lambda kind: MemoryBank(dtype=torch.bfloat16, device=kind),
    "window": lambda kind: MemoryBank(limit=30, half_life=20),
    "centroids": lambda kind: CentroidMemory(30),
}


@pytest.fixture
def device(request):
    with SimulatedDevice(request.getfixturevalue("kind")) as device:
        yield device


def fill(memory, n=60, to=lambda z: z):
    x, t = clustered_samples(n)
    for start in range(0, n, 10):
        memory.add(to(x[start : start + 10]), to(t[start : start + 10]))
    return memory


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MEMORIES)
def test_kernel_sums_match_those_on_the_cpu_with_one_read_per_add_and_selection(name, dtype, kind, device):
    x, t = (z.to(dtype) for z in clustered_samples(4, seed=1))
    u = normalize_rows(x.float())
    expected = fill(MEMORIES[name]("cpu"), to=lambda z: z.to(dtype)).select(t, PROMPT_WEIGHTS, 1e-3)
    memory = fill(MEMORIES[name](kind), to=lambda z: z.to(device.device, dtype))
    assert sum(device.reads.values()) <= 2 * 6  # rows (or their norms) and prompts, of 6 batches
    device.reads.clear()
    selection = memory.select(t.to(device.device), PROMPT_WEIGHTS, 1e-3)
    assert sum(device.reads.values()) == 1
    assert torch.equal(selection.indices, expected.indices)
    on_device = u.to(device.device)
    for kernel in (KERNEL, CosineKernel(), LaplacianKernel(2.0)):
        actual, largest = selection.kernel_gradient(kernel, on_device)
        assert (actual.device, largest.device) == (device.device, device.device)
        device.reads.clear()
        assert torch.equal(selection.kernel_gradient(kernel, on_device)[0].cpu(), actual.cpu())
        assert sum(device.reads.values()) == 0
        torch.testing.assert_close(actual.cpu(), expected.kernel_gradient(kernel, u)[0], rtol=1e-4, atol=1e-5)
    actual, weights = selection.distances(on_device, 8)
    torch.testing.assert_close(actual.cpu(), expected.distances(u, 8)[0], rtol=1e-4, atol=1e-4)
    assert weights.device == device.device


@KINDS
@pytest.mark.parametrize("name", ["rows", "float16 on the host", "centroids"])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_rows_far_from_the_origin_keep_precision(shift, name, kind, device, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.selection.BLOCK_BYTES_GPU", 1000)
    x, t = clustered_samples(60)
    z = x[:3] + shift + 0.3
    memory = CentroidMemory(30, normalize=False) if name == "centroids" else MEMORIES[name](kind)
    memory.add((x + shift).to(device.device), t.to(device.device))
    selection = memory.select(t[:3].to(device.device), PROMPT_WEIGHTS, 1e-3, normalize=False)
    expected = memory.select(t[:3], PROMPT_WEIGHTS, 1e-3, normalize=False)
    for kernel in (GaussianKernel(2.0), RationalQuadraticKernel(2.0, 0.7)):
        actual, largest = selection.kernel_gradient(kernel, z.to(device.device))
        exact, exact_largest = expected.kernel_gradient(kernel, z.double())
        tolerance = 3e-4 if name == "centroids" else 1e-5  # squares of means are float32
        assert (actual.cpu() - exact).norm() < tolerance * exact.norm()
        torch.testing.assert_close(largest.cpu().double(), exact_largest, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("where", ["cpu", None])
def test_nearest_rows_and_their_prompts_are_not_read(where, scattered, kind, device, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.store.CHUNK_BYTES", 2000)
    monkeypatch.setattr("kspec_guidance.memory.selection.BLOCK_BYTES_GPU", 1000)
    x, t = clustered_samples(4, seed=1)
    tolerance = 0.01 if scattered else 0.0
    expected = fill(MemoryBank()).select(t, PROMPT_WEIGHTS, tolerance)
    selection = fill(MemoryBank(device=where), to=lambda z: z.to(device.device)).select(
        t.to(device.device), PROMPT_WEIGHTS, tolerance
    )
    assert (selection.indices is not None) == scattered
    u, like = normalize_rows(x).to(device.device), t.to(device.device)
    selection.kernel_gradient(KERNEL, u)
    device.reads.clear()
    nearest = selection.nearest(u, 7)
    rows, prompts = selection.rows(u, nearest), selection.prompts(like, nearest)
    assert not device.reads
    at = expected.nearest(normalize_rows(x), 7)
    assert torch.equal(nearest.cpu(), at)
    torch.testing.assert_close(rows.cpu(), expected.rows(normalize_rows(x), at))
    assert torch.equal(prompts.cpu(), expected.prompts(t, at))


@KINDS
def test_rows_are_copied_to_the_device_of_the_samples_once(kind, device, monkeypatch):
    x, t = clustered_samples(4, seed=1)
    u = normalize_rows(x).to(device.device)
    for memory in (MemoryBank(device="cpu"), MemoryBank(device="cpu", dtype=torch.float16)):
        selection = fill(memory, to=lambda z: z.to(device.device)).select(t.to(device.device), PROMPT_WEIGHTS)
        first = selection.kernel_gradient(KERNEL, u)[0]
        with monkeypatch.context() as patch:
            patch.setattr(memory._store, "gather", None)
            patch.setattr(memory._store, "view", None)
            assert torch.equal(selection.kernel_gradient(KERNEL, u)[0].cpu(), first.cpu())
    on_device = fill(MemoryBank(), to=lambda z: z.to(device.device))
    selection = on_device.select(t.to(device.device), PROMPT_WEIGHTS)
    selection.kernel_gradient(KERNEL, u)
    assert not selection._copies  # read in place


@KINDS
def test_rows_that_exceed_the_device_are_read_by_block(kind, device, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.selection.GATHER_BYTES", 0)
    monkeypatch.setattr("kspec_guidance.memory.selection.BLOCK_BYTES_GPU", 1000)
    x, t = clustered_samples(4, seed=1)
    u = normalize_rows(x)
    for dtype in (torch.float32, torch.float16):
        memory = fill(MemoryBank(device="cpu", dtype=dtype))
        selection = memory.select(t.to(device.device), PROMPT_WEIGHTS)
        actual = selection.kernel_gradient(KERNEL, u.to(device.device))[0]
        assert not selection._copies
        expected = memory.select(t, PROMPT_WEIGHTS).kernel_gradient(KERNEL, u)[0]
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)


@KINDS
def test_rows_move_to_the_host_beyond_the_limit_unless_a_device_is_given(kind, device, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.bank.DEVICE_BYTES", 30 * 24 * 4)
    monkeypatch.setattr("kspec_guidance.memory.bank._placed", weakref.WeakSet())
    x, _ = clustered_samples(60)
    bank, given = MemoryBank(), MemoryBank(device=kind)
    for start in range(0, 60, 10):
        selection = bank.select()
        for memory in (bank, given):
            memory.add(x[start : start + 10].to(device.device))
        assert bank._store.device.type == (kind if start < 30 else "cpu")
        assert len(selection) == start
        if start:
            assert torch.equal(selection.rows(x.to(device.device)).cpu() > 0, x[:start] > 0)
    assert given.device == given._store.device == device.device
    assert torch.equal(bank.x, x)
    assert torch.equal(given.x.cpu(), x)


@pytest.fixture
def gpu(monkeypatch):
    """A simulated CUDA device whose total, allocated and reserved bytes a test sets."""
    monkeypatch.setattr("kspec_guidance.memory.bank._placed", weakref.WeakSet())
    sizes = {"total": 80 << 30, "foreign": 10 << 30, "allocated": 0, "reserved": 0}
    with SimulatedDevice("cuda") as device:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(
            "torch.cuda.mem_get_info",
            lambda device: (sizes["total"] - sizes["foreign"] - sizes["reserved"], sizes["total"]),
        )
        monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: sizes["allocated"])
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: sizes["reserved"])
        sizes["device"] = device.device
        yield sizes
        monkeypatch.undo()


MIB = 1 << 20


@pytest.mark.parametrize(("free", "share"), [(70 << 10, 1 / 8), (2 << 10, 1 / 8), (1600, 256 / 1600), (400, 1 / 4)])
@pytest.mark.parametrize("cached", [0, 300])
def test_rows_take_an_eighth_of_the_free_memory_or_256_mib(free, share, cached, gpu):
    gpu["foreign"] = gpu["total"] - (free << 20)
    gpu["allocated"], gpu["reserved"] = 0, cached * MIB  # what torch has reserved and does not use is free, too
    assert _budget(gpu["device"], 0) == pytest.approx(share * free * MIB)
    gpu["allocated"] = gpu["reserved"] = 100 * MIB  # of rows: they do not lower their own budget
    assert _budget(gpu["device"], 100 * MIB) == pytest.approx(share * free * MIB)


def test_banks_share_the_budget_and_the_one_that_passes_it_moves_whole(gpu, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.bank.DEVICE_BYTES", 0)
    gpu["foreign"] = gpu["total"] - 8 * 60 * 24 * 4  # an eighth is 60 rows
    x, t = clustered_samples(60)
    first, second = MemoryBank(), MemoryBank()

    def on_device():
        return sum(bank.nbytes for bank in (first, second) if bank._store and bank._store.device.type == "cuda")

    for start in range(0, 60, 10):
        for bank in (first, second):
            gpu["allocated"] = gpu["reserved"] = on_device()
            bank.add(x[start : start + 10].to(gpu["device"]), t[start : start + 10].to(gpu["device"]))
    assert {first._store.device.type, second._store.device.type} == {"cuda", "cpu"}
    assert on_device() <= 60 * 24 * 4
    for bank in (first, second):
        assert torch.equal(bank.x.cpu(), x)
        assert torch.equal(bank.prompts, fill(MemoryBank()).prompts)


def test_a_full_device_sends_the_rows_to_the_host_unless_a_device_is_given(gpu, monkeypatch):
    x, _ = clustered_samples(60)
    bank, given = MemoryBank(), MemoryBank(device="cuda")
    for memory in (bank, given):
        memory.add(x[:10].to(gpu["device"]))
    make = RowStore._chunk

    def full(store, size):
        if store.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(store, size)

    monkeypatch.setattr(RowStore, "_chunk", full)
    bank.add(x[10:].to(gpu["device"]))
    assert bank._store.device.type == "cpu"
    assert torch.equal(bank.x, x)
    with pytest.raises(torch.OutOfMemoryError):
        given.add(x[10:].to(gpu["device"]))
    assert torch.equal(given.x.cpu(), x[:10])


@pytest.mark.parametrize("inside", [True, False])
def test_rows_of_many_chunks_are_gathered_without_a_wait(inside, gpu, monkeypatch):
    monkeypatch.setattr("kspec_guidance.memory.store.CHUNK_BYTES_GPU", 2000)
    x, _ = clustered_samples(60)
    store = RowStore(24, device="cuda")
    for start in range(0, 60, 10):
        store.reserve(start + 10)
        store.write(start, x[start : start + 10].to(gpu["device"]))
    assert len(store.chunks) > 2
    indices = torch.tensor([1, 3, 4, 9] if inside else [0, 15, 16, 33, 59])
    device = torch.utils._python_dispatch._get_current_dispatch_mode()
    device.reads.clear()
    found = store.gather(indices)
    assert not device.reads
    assert torch.equal(found.cpu(), x[indices])


@KINDS
def test_saved_rows_of_a_device_load_on_the_host(kind, device, tmp_path):
    memory = fill(MemoryBank(device=kind, dtype=torch.float16), to=lambda z: z.to(device.device))
    memory.save(tmp_path / "m")
    loaded = MemoryBank.load(tmp_path / "m")
    assert loaded.x.device.type == "cpu"
    assert torch.equal(loaded.x, memory.x.cpu())
    assert isinstance(MemoryBank.load(tmp_path / "m", device=kind).x, DeviceTensor)
    assert isinstance(copy.deepcopy(memory).x, DeviceTensor)
    merged = MemoryBank().merge(loaded).merge(memory)
    assert torch.equal(merged.x, torch.cat([loaded.x, loaded.x]))


@KINDS
def test_values_out_of_range_are_found_on_the_device(kind, device):
    memory = MemoryBank(dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"up to 7e\+04, more than torch.float16 can store \(6.55e\+04\).*dtype=torch.bfloat16"
    ):
        memory.add(torch.full((2, 3), 7e4).to(device.device))
    with pytest.raises(ValueError, match="NaN or infinite values; nothing was added"):
        memory.add(torch.full((2, 3), float("nan")).to(device.device))
    memory = MemoryBank()
    memory.add(torch.full((2, 3), 1e25).to(device.device))  # its float32 norm overflows
    assert torch.isfinite(memory._norms[:2]).all()


@KINDS
def test_random_feature_memory_is_exact_with_one_read_per_run(kind, device):
    def make():
        return RandomFeatureMemory(RandomFourierFeatures(KERNEL, 24, 64), RandomFourierFeatures(PROMPT_KERNEL, 6, 16))

    x, t = clustered_samples(3, seed=1)
    expected, memory = fill(make()), fill(make(), to=lambda z: z.to(device.device))
    assert torch.equal(memory.total, expected.total)
    assert sum(device.reads.values()) <= 2 * 6
    device.reads.clear()
    actual = memory.coefficients(t.to(device.device), x.to(device.device))
    assert sum(device.reads.values()) == 1
    torch.testing.assert_close(actual.cpu(), expected.coefficients(t, x))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [
    lambda: RandomFourierFeatures(KERNEL, 24, 64), lambda: RandomFourierFeatures(LaplacianKernel(9.0), 24, 64),
    lambda: RandomProjection(24, 8), lambda: NystromFeatures(KERNEL, clustered_samples(10)[0]),
])  # fmt: skip
@pytest.mark.parametrize("move", [False, True])
def test_feature_maps_follow_their_input(make, dtype, move, kind, device):
    x, phi = clustered_samples(4)[0].to(dtype), make()
    expected, on_device = phi(x), x.to(device.device)
    if move:
        phi.to(device.device, torch.float32)
        assert all(b.device == device.device and b.dtype == torch.float32 for b in phi.buffers())
    actual = phi(on_device)
    assert actual.device == device.device
    assert actual.dtype == torch.float32
    if isinstance(phi, NystromFeatures):  # in float32 some eigenvectors may be missing
        actual, expected = actual.cpu() @ actual.cpu().mT, (expected @ expected.mT).float()
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-3, atol=1e-4)
    device.reads.clear()
    copies = len(phi._copies)
    phi(on_device)
    assert len(phi._copies) == copies
    assert (sum(device.reads.values()) == 0) or isinstance(phi, NystromFeatures)
    if isinstance(phi, RandomFourierFeatures):
        c = torch.ones(4, 64)
        torch.testing.assert_close(phi.vjp(on_device, c.to(device.device)).cpu(), phi.vjp(x, c), rtol=1e-3, atol=1e-4)


@KINDS
def test_feature_map_moves_to_a_device_without_float64(kind, device):
    phi = RandomFourierFeatures(KERNEL, 24, 64)
    exact = phi.frequencies
    phi.to(device.device)
    assert phi.frequencies.device == device.device
    assert phi.frequencies.dtype == (torch.float32 if kind == "mps" else torch.float64)
    torch.testing.assert_close(phi.frequencies.cpu().double(), exact, rtol=1e-6, atol=0)
    memory = fill(RandomFeatureMemory(phi), to=lambda z: z.to(device.device))  # the memory computes on the host
    torch.testing.assert_close(
        memory.total, fill(RandomFeatureMemory(RandomFourierFeatures(KERNEL, 24, 64))).total, rtol=1e-4, atol=1e6
    )


@KINDS
def test_selections_are_deterministic(kind, device):
    x, t = clustered_samples(3, seed=1)
    torch.use_deterministic_algorithms(True)
    try:
        for name in MEMORIES:
            memory = fill(MEMORIES[name](kind), to=lambda z: z.to(device.device))
            selection = memory.select(t.to(device.device), PROMPT_WEIGHTS, 1e-3)
            selection.kernel_gradient(KERNEL, normalize_rows(x).to(device.device))
    finally:
        torch.use_deterministic_algorithms(False)


@KINDS
def test_budget_of_rows_on_a_device_is_half_of_its_free_memory(kind, device, monkeypatch):
    for module in ("choosing", "bank"):
        monkeypatch.setattr(
            f"kspec_guidance.memory.{module}.free_bytes", lambda device: 16 << 20 if device.type == kind else None
        )
    assert choose_memory(1000, (4, 64, 64)).dtype == torch.float32
    assert choose_memory(1000, (4, 64, 64)).device is None
    assert choose_memory(1000, (4, 32, 32), device=kind).dtype == torch.float16
    assert choose_memory(400, (4, 32, 32), device=kind).device == device.device
    assert isinstance(choose_memory(1000, (4, 64, 64), device=kind), CentroidMemory)
    bank = MemoryBank()
    bank.add(torch.ones(3, 1 << 20, device=device.device))  # 12 of 16 MiB
    assert bank._store.device.type == "cpu"
