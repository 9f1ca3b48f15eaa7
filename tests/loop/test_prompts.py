import pytest
import torch

from kspec_guidance.loop.prompts import masked_mean, prompts_of_samples, repeat_rows, token_mask
from tests.samples import rows

CPU = torch.device("cpu")


def test_prompts_are_repeated_for_their_images_and_negatives_are_left_out():
    t = rows(2, 3)
    assert torch.equal(prompts_of_samples(t, 4, CPU), t[[0, 0, 1, 1]])
    both = rows(4, 3)
    assert torch.equal(prompts_of_samples(both, 2, CPU), both[2:])  # negatives come first
    assert torch.equal(prompts_of_samples(both, 2, CPU, class_labels=True), both[:2])  # but after class labels
    frames = rows(12, 3)  # of three clips
    torch.testing.assert_close(prompts_of_samples(frames, 3, CPU), frames.view(3, 4, 3).mean(1))
    assert prompts_of_samples(None, 3, CPU) is None


def test_prompts_that_do_not_fit_the_samples_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="encoded 5 prompts for 3 samples, so prompts are not told apart"):
        assert prompts_of_samples(rows(5, 3), 3, CPU) is None
    with pytest.raises(ValueError, match="3 samples cannot be shared out over 2 prompts"):
        repeat_rows(rows(2, 3), 3)


def test_padding_and_the_start_token_do_not_count():
    mask = token_mask(torch.tensor([[0, 7, 9, 1, 1, 1], [0, 7, 9, 8, 5, 1]]), bos=0)
    assert mask.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    x = rows(12, 4).view(2, 6, 4)
    expected = x[0, 1:4].mean(0)
    torch.testing.assert_close(masked_mean(x, mask)[0].double(), expected / expected.norm(), rtol=1e-5, atol=1e-6)
