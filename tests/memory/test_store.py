import pytest
import torch

from kspec_guidance import MemoryBank
from kspec_guidance.objectives import ConditionalRKE
from tests.memory.banks import filled
from tests.samples import unit


def test_rows_never_move_and_little_lies_beside_them():
    memory, first = MemoryBank(), {}
    t = torch.eye(16)
    for k in range(1000):
        memory.add(torch.full((1, 2048), float(k)), t[k % 16 : k % 16 + 1])
        for number, chunk in enumerate(memory._store.chunks):
            assert first.setdefault(number, chunk.data_ptr()) == chunk.data_ptr()
    assert len(first) <= 8  # chunks grow, so that there are few
    assert memory.overhead_bytes < 0.05 * memory.x.numel() * 4
    assert memory.x[:, 0].tolist() == list(range(1000))


def test_rows_in_a_folder_are_mapped_and_leave_nothing_behind(tmp_path, g):
    exact, x, t = filled()
    mapped, _, _ = filled(folder=tmp_path / "rows")
    assert torch.equal(mapped.x, exact.x)
    z = unit(x[:4] + torch.randn(4, 24, generator=g))
    assert torch.equal(ConditionalRKE().gradient(z, t[:4], mapped).rows, ConditionalRKE().gradient(z, t[:4], exact).rows)
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
