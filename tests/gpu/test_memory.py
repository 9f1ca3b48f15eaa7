"""Memories and feature maps on a CUDA device: results as on the CPU, and steps that do not wait for the device."""

import weakref

import pytest
import torch

from kspec_guidance import MemoryBank, RandomFeatureMemory
from kspec_guidance.features import NystromFeatures, RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel
from kspec_guidance.memory import CentroidMemory, choose_memory
from tests.memory.banks import PROMPT_WEIGHTS
from tests.samples import clustered_samples, normalize_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KERNEL = GaussianKernel(0.6)


@pytest.fixture(autouse=True)
def _full_precision():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("sample", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("make", "home"), [
    (MemoryBank, "cuda"), (lambda: MemoryBank(device="cuda", dtype=torch.float16), "cuda"),
    (lambda: MemoryBank(device="cpu"), "cpu"), (lambda: MemoryBank(device="cpu", dtype=torch.float16), "cpu"),
    (lambda: MemoryBank(limit=40), "cuda"), (lambda: CentroidMemory(40), "cpu"),
])  # fmt: skip
def test_steps_match_the_cpu_without_waiting_for_the_device(make, home, sample, inference):
    x, t = clustered_samples(90)
    z, s = clustered_samples(4, seed=1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(inference):
            memory, expected = make(), MemoryBank(limit=40) if getattr(make(), "limit", None) else make()
            if home == "cuda" and getattr(expected, "device", None) is not None:
                expected = MemoryBank(dtype=expected.dtype)
            for k in range(0, 90, 15):
                memory.add(x[k : k + 15].to("cuda", sample), t[k : k + 15].to("cuda", sample))
                expected.add(x[k : k + 15].to(sample), t[k : k + 15].to(sample))
            assert memory._store.device.type == home
            for tolerance in (0.0, 0.05):
                selection, reference = (
                    m.select(p, PROMPT_WEIGHTS, tolerance) for m, p in ((memory, s.cuda()), (expected, s))
                )
                u = normalize_rows(z)
                on_device = u.cuda()
                for kernel in (KERNEL, CosineKernel()):
                    selection.kernel_gradient(kernel, on_device)
                    selection.distances(on_device)
                    nearest = selection.nearest(on_device, 5)
                    selection.rows(on_device, nearest), selection.prompts(on_device, nearest)
                    torch.cuda.set_sync_debug_mode("error")
                    g = selection.kernel_gradient(kernel, on_device)[0]
                    selection.distances(on_device)
                    nearest = selection.nearest(on_device, 5)
                    rows, prompts = selection.rows(on_device, nearest), selection.prompts(on_device, nearest)
                    torch.cuda.set_sync_debug_mode("default")
                    torch.testing.assert_close(g.cpu(), reference.kernel_gradient(kernel, u)[0], rtol=1e-3, atol=1e-4)
                    torch.testing.assert_close(rows.cpu(), reference.rows(u, reference.nearest(u, 5)), rtol=1e-3, atol=1e-4)
                    assert prompts is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)


def test_rows_move_to_the_host_and_the_budget_is_free_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("kspec_guidance.memory.bank.DEVICE_BYTES", 1 << 20)
    monkeypatch.setattr("kspec_guidance.memory.bank.FREE_SHARE", 0)
    monkeypatch.setattr("kspec_guidance.memory.bank._placed", weakref.WeakSet())
    bank, x = MemoryBank(), torch.randn(40, 100, 100, device="cuda")
    for start in range(0, 40, 4):
        bank.add(x[start : start + 4])
    assert bank._store.device.type == "cpu"
    assert torch.equal(bank.x, x.flatten(1).cpu())
    bank.save(tmp_path / "m")
    on_device = MemoryBank.load(tmp_path / "m", device="cuda")
    assert torch.equal(on_device.x, x.flatten(1))
    assert on_device.device == torch.device("cuda:0")
    free = torch.cuda.mem_get_info()[0]
    assert choose_memory(1000, (1, 250_000), device="cuda").device == torch.device("cuda:0")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 20, free))
    monkeypatch.setattr("torch.cuda.memory_reserved", torch.cuda.memory_allocated)
    assert isinstance(choose_memory(1000, (1, 250_000), device="cuda"), CentroidMemory)
    small = MemoryBank()
    small.add(torch.ones(3, 30_000, device="cuda"))  # more than a quarter of the free MiB
    assert small._store.device.type == "cpu"


def test_feature_maps_and_their_memory_match_the_cpu():
    x, t = clustered_samples(30)

    def make():
        return RandomFeatureMemory(
            RandomFourierFeatures(KERNEL, 24, 256), RandomFourierFeatures(GaussianKernel(0.35), 6, 64)
        )

    memory, expected = make(), make()
    memory.feature_map.to("cuda")
    memory.add(x.cuda(), t.cuda())
    expected.add(x, t)
    assert torch.equal(memory.total, expected.total)
    torch.testing.assert_close(memory.coefficients(t.cuda(), x.cuda()).cpu(), expected.coefficients(t, x))
    phi = NystromFeatures(KERNEL, x[:20])
    expected_phi = phi(x)
    torch.testing.assert_close(phi(x.cuda()).cpu(), expected_phi.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(phi.to("cuda")(x.cuda()).cpu(), expected_phi, rtol=1e-6, atol=1e-8)
    single = NystromFeatures(KERNEL, x[:20].cuda()).to(torch.float32)(x.cuda()).cpu()
    torch.testing.assert_close((single @ single.mT).double(), expected_phi @ expected_phi.mT, rtol=1e-3, atol=1e-3)
