import pytest
import torch

from kspec_guidance import MemoryBank
from kspec_guidance.objectives import ConditionalRKE
from tests.memory.banks import filled_bank
from tests.samples import normalize_rows


def test_growth_keeps_rows_in_place_with_low_overhead():
    memory, addresses = MemoryBank(), {}
    t = torch.eye(16)
    for k in range(1000):
        memory.add(torch.full((1, 2048), float(k)), t[k % 16 : k % 16 + 1])
        for index, chunk in enumerate(memory._store.chunks):
            assert addresses.setdefault(index, chunk.data_ptr()) == chunk.data_ptr()
    assert len(addresses) <= 8  # chunks grow, which bounds their number
    assert memory.overhead_bytes < 0.05 * memory.x.numel() * 4
    assert memory.x[:, 0].tolist() == list(range(1000))


def test_mapped_rows_match_and_leave_no_files(tmp_path, g):
    exact, x, t = filled_bank()
    mapped, _, _ = filled_bank(folder=tmp_path / "rows")
    assert torch.equal(mapped.x, exact.x)
    z = normalize_rows(x[:4] + torch.randn(4, 24, generator=g))
    assert torch.equal(ConditionalRKE().gradient(z, t[:4], mapped).rows, ConditionalRKE().gradient(z, t[:4], exact).rows)
    assert list((tmp_path / "rows").iterdir()) == []
    mapped.save(tmp_path / "m")
    loaded = MemoryBank.load(tmp_path / "m", folder=tmp_path / "rows")
    assert torch.equal(loaded.x, exact.x)
    assert torch.equal(loaded.prompts, exact.prompts)


def test_full_disk_raises_and_keeps_rows(tmp_path, monkeypatch):
    bank, x, t = filled_bank(16, folder=tmp_path)
    before = bank.x.clone()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        bank.add(x.repeat(20, 1), t.repeat(20, 1))
    assert len(bank) == 16
    assert torch.equal(bank.x, before)
    assert list(tmp_path.iterdir()) == []
