import torch

from kspec_guidance.memory import CentroidMemory, choose_memory


def test_choose_memory_by_sample_count_and_budget():
    assert choose_memory(1000, (4, 64, 64)).dtype == torch.float32
    assert choose_memory(100_000, (4, 64, 64)).dtype == torch.float16
    centroids = choose_memory(10**8, (4, 64, 64))
    assert isinstance(centroids, CentroidMemory)
    assert centroids.capacity == 2048
    assert choose_memory(10**8, (16, 128, 128), budget=1 << 30).capacity == 128
