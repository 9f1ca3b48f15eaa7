import threading

import pytest
import torch
from safetensors.torch import save_file

from kspec_guidance import MemoryBank, MemoryFileError, RandomFeatureMemory
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from tests.memory.banks import bank


def test_a_saved_bank_comes_back_whole(tmp_path):
    memory = bank()
    memory.save(tmp_path / "m.safetensors")
    again = MemoryBank.load(tmp_path / "m.safetensors")
    assert torch.equal(again.x, memory.x)
    assert torch.equal(again.prompts, memory.prompts)
    assert (again.shape, again.space, again.prompt_encoder) == (memory.shape, "x0", "encoder-1")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    MemoryBank().save(tmp_path / "empty.safetensors")
    assert len(MemoryBank.load(tmp_path / "empty.safetensors")) == 0


def test_every_cut_and_every_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    bank().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(MemoryFileError):
            MemoryBank.load(path)
    for place in range(0, len(whole), 3):  # header and data alike
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(MemoryFileError):
            MemoryBank.load(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file({"x": torch.ones(2, 2)}, path)
    with pytest.raises(MemoryFileError, match=r"was it saved by memory\.save"):
        MemoryBank.load(path)
    with pytest.raises(FileNotFoundError, match="no memory file"):
        MemoryBank.load(tmp_path / "none")
    phi = RandomFourierFeatures(GaussianKernel(1.0), 16, 8)
    RandomFeatureMemory(phi).save(path)
    with pytest.raises(MemoryFileError, match="expected a 'rows'"):
        MemoryBank.load(path)


def test_a_file_is_whole_at_every_moment(tmp_path):
    memory, path, failures = bank(500), tmp_path / "m", []
    memory.save(path)
    done = threading.Event()

    def read():
        while not done.is_set():
            try:
                MemoryBank.load(path)
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        memory.save(path)
    done.set()
    reader.join()
    assert not failures
