import pytest
import torch

from kspec_guidance.synthesis.sharding import shard


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shards_are_even_and_keep_similar_prompts_together(g, parts):
    centres = 10 * torch.randn(parts, 16, generator=g)
    which = torch.arange(parts * 20) % parts
    owner = torch.tensor(shard(centres[which] + 0.1 * torch.randn(parts * 20, 16, generator=g), [3] * (parts * 20), parts))
    assert torch.bincount(owner, minlength=parts).tolist() == [20] * parts
    for k in range(parts):
        assert len(set(owner[which == k].tolist())) == 1
    sizes = torch.randint(1, 30, (200,), generator=g).tolist()
    owner = torch.tensor(shard(torch.randn(200, 8, generator=g), sizes, parts))
    loads = torch.zeros(parts).index_add_(0, owner, torch.tensor(sizes).float())
    assert loads.max() / loads.min() < 1.4
    assert set(shard(torch.zeros(10, 2), [1] * 10, parts)) == set(range(min(parts, 10)))
