import threading

import pytest
import torch
from safetensors.torch import save_file

from kspec_guidance import MemoryBank, MemoryFileError, RandomFeatureMemory
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel


def bank(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    memory = MemoryBank("x0", "encoder-1")
    memory.add(torch.randn(n, 4, 2, 2, generator=g), torch.randn(n, 3, generator=g))
    return memory


def test_what_is_added_is_there_in_order():
    g = torch.Generator().manual_seed(1)
    parts = [torch.randn(k, 4, 2, 2, generator=g) for k in (1, 40, 3)]
    memory = MemoryBank()
    for part in parts:
        memory.add(part)
    assert len(memory) == 44
    assert torch.equal(memory.x, torch.cat(parts).flatten(1))
    torch.testing.assert_close(memory.unit().norm(dim=1), torch.ones(44))


def test_rows_never_move_and_little_lies_beside_them():
    memory, first = MemoryBank(), {}
    t = torch.eye(16)
    for k in range(1000):
        memory.add(torch.full((1, 2048), float(k)), t[k % 16 : k % 16 + 1])
        for number, chunk in enumerate(memory._store.chunks):
            assert first.setdefault(number, chunk.data_ptr()) == chunk.data_ptr()
    assert len(first) <= 8  # chunks grow, so that there are few
    assert memory.nbytes_beside < 0.05 * memory.x.numel() * 4
    assert memory.x[:, 0].tolist() == list(range(1000))


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


def feature_memory(prompts=True):
    phi = RandomFourierFeatures(GaussianKernel(1.0), 16, 64)
    psi = RandomFourierFeatures(GaussianKernel(1.0), 3, 16) if prompts else None
    return RandomFeatureMemory(phi, psi)


@pytest.mark.parametrize("prompts", [True, False])
def test_random_feature_sums_merge_and_subtract_exactly(prompts, g, tmp_path):
    x, t = torch.randn(30, 4, 2, 2, generator=g), torch.randn(30, 3, generator=g)
    whole, parts, rest = feature_memory(prompts), feature_memory(prompts), feature_memory(prompts)
    whole.add(x, t)
    for i in torch.randperm(20, generator=g).split(3):
        parts.add(x[i], t[i])
    rest.add(x[20:], t[20:])
    parts.merge(rest)
    assert torch.equal(parts.total, whole.total)
    assert len(parts) == 30
    parts.subtract(x[20:], t[20:])
    rest.clear()
    rest.add(x[:20], t[:20])
    assert torch.equal(parts.total, rest.total)
    assert parts.total.numel() == (64 * 16 if prompts else 64)
    parts.save(tmp_path / "r")
    again = feature_memory(prompts).restore(tmp_path / "r")
    assert torch.equal(again.total, parts.total)
    assert (len(again), again.shape) == (20, (4, 2, 2))
    with pytest.raises(MemoryFileError, match="other random features"):
        RandomFeatureMemory(RandomFourierFeatures(GaussianKernel(2.0), 16, 64)).restore(tmp_path / "r")


def test_coefficients_are_the_kernel_sums(g):
    x, t = torch.randn(9, 16, generator=g), torch.randn(9, 3, generator=g)
    memory = RandomFeatureMemory(
        RandomFourierFeatures(GaussianKernel(1.0), 16, 8192), RandomFourierFeatures(GaussianKernel(1.0), 3, 2048)
    )
    memory.add(x, t)
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (x, t))
    expected = (GaussianKernel(1.0)(u) * GaussianKernel(1.0)(v)).sum(1)
    found = (memory.features(u) * memory.coefficients(v, u)).sum(1)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0)


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
