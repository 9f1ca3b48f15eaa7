import threading

import pytest
import torch
from safetensors.torch import save_file

from kspec_guidance import MemoryBank, RandomFeatureMemory
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import MemoryFileError
from tests.memory.banks import small_bank


def test_bank_save_load_round_trip(tmp_path):
    memory = small_bank()
    memory.save(tmp_path / "m.safetensors")
    loaded = MemoryBank.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded.x, memory.x)
    assert torch.equal(loaded.prompts, memory.prompts)
    assert (loaded.shape, loaded.space, loaded.prompt_encoder) == (memory.shape, "x0", "encoder-1")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    MemoryBank().save(tmp_path / "empty.safetensors")
    assert len(MemoryBank.load(tmp_path / "empty.safetensors")) == 0


def test_truncated_or_corrupted_file_raises(tmp_path):
    path = tmp_path / "m.safetensors"
    small_bank().save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(MemoryFileError):
            MemoryBank.load(path)
    for position in range(0, len(data), 3):  # header and data
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(MemoryFileError):
            MemoryBank.load(path)


def test_foreign_file_raises(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"x": torch.ones(2, 2)}, path)
    with pytest.raises(MemoryFileError, match=r"was it saved by memory\.save"):
        MemoryBank.load(path)
    with pytest.raises(FileNotFoundError, match="no memory file"):
        MemoryBank.load(tmp_path / "none")
    phi = RandomFourierFeatures(GaussianKernel(1.0), 16, 8)
    RandomFeatureMemory(phi).save(path)
    with pytest.raises(MemoryFileError, match="expected 'rows'"):
        MemoryBank.load(path)


def test_save_is_atomic_for_concurrent_reader(tmp_path):
    memory, path, loaded, failures = small_bank(500), tmp_path / "m", [], []
    memory.save(path)

    def read():
        for _ in range(30):
            try:
                loaded.append(len(MemoryBank.load(path)))
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    saves = 0
    while reader.is_alive() or saves < 30:  # writes for as long as the reader reads
        memory.save(path)
        saves += 1
    reader.join()
    assert not failures
    assert loaded == [500] * 30
