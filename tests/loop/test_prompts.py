import pytest
import torch

from kspec_guidance.loop.prompts import masked_mean, prompts_of_samples, repeat_rows, token_mask
from tests.samples import rows

CPU = torch.device("cpu")


def test_prompts_are_repeated_per_image_and_negatives_dropped():
    t = rows(2, 3)
    assert torch.equal(prompts_of_samples(t, 4, CPU), t[[0, 0, 1, 1]])
    with_negatives = rows(4, 3)
    assert torch.equal(prompts_of_samples(with_negatives, 2, CPU), with_negatives[2:])  # negative prompts first
    # negative class labels last
    assert torch.equal(prompts_of_samples(with_negatives, 2, CPU, class_labels=True), with_negatives[:2])
    frames = rows(3, 3).repeat_interleave(4, dim=0)  # 4 frames of each of 3 clips
    assert torch.equal(prompts_of_samples(frames, 3, CPU), frames[::4])
    assert prompts_of_samples(None, 3, CPU) is None


def test_mismatched_prompt_count_warns_and_returns_none():
    with pytest.warns(UserWarning, match="encoded 5 prompts for 3 samples, so prompts are ignored"):
        assert prompts_of_samples(rows(5, 3), 3, CPU) is None
    with pytest.warns(UserWarning, match="encoded 6 prompts for 2 samples, so prompts are ignored"):
        assert prompts_of_samples(rows(6, 3), 2, CPU) is None  # never the mean of rows of different prompts
    with pytest.raises(ValueError, match="3 samples cannot be divided evenly among 2 prompts"):
        repeat_rows(rows(2, 3), 3)


def test_masked_mean_excludes_padding_and_start_token():
    mask = token_mask(torch.tensor([[0, 7, 9, 1, 1, 1], [0, 7, 9, 8, 5, 1]]), bos=0)
    assert mask.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    x = rows(12, 4).view(2, 6, 4)
    expected = x[0, 1:4].mean(0)
    torch.testing.assert_close(masked_mean(x, mask)[0].double(), expected / expected.norm(), rtol=1e-5, atol=1e-6)
