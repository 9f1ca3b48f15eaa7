"""The experiment of classifiers on synthetic sets, with a bed of flat images."""

import pytest
import torch

from benchmarks import downstream
from tests import tiny


class FlatBed:
    """Images of one value, which is also the probability of their class."""

    def __init__(self, values):
        self.values, self.pipe, self.judge_ = values, tiny.build("StableDiffusionPipeline"), self

    def run(self, case, n):
        return torch.tensor(self.values[case.seed - 50_000])[:n, None, None, None].expand(-1, 1, 2, 2)

    def decode(self, samples):
        return samples * 2 - 1

    def rows(self, samples):
        return samples.flatten(1)[:, 0]

    def agreement(self, rows, prompts):
        return rows


@pytest.fixture
def bed():
    g = torch.Generator().manual_seed(0)
    return FlatBed(torch.rand(9, downstream.BATCH, generator=g).tolist())


def made(bed, name, number, folder, also=()):
    """Images of the only prompt, made together with those of other sets."""
    downstream.make(bed, ["a"], [name, *also], number, folder)
    return downstream.load(name, ["a"], number, folder)[0]


def test_the_first_images_of_a_set_are_the_set_of_a_smaller_size(bed, tmp_path):
    small, large = (made(bed, "plain", n, tmp_path) for n in (5, 40))
    assert torch.equal(small, large[:5])
    assert torch.equal(made(bed, "plain", 40, tmp_path), large)


@pytest.mark.parametrize("names", downstream.SOURCES)
def test_sets_that_are_made_of_the_same_images_are_those_that_are_made_alone(bed, tmp_path, names):
    together = [made(bed, name, 20, tmp_path / "one", names) for name in names]
    for name, images in zip(names, together, strict=True):
        assert torch.equal(made(bed, name, 20, tmp_path / "two"), images)


def test_the_filter_keeps_images_of_which_the_judge_is_sure(bed, tmp_path):
    kept = made(bed, "guided, filtered", 20, tmp_path)
    values = torch.tensor(bed.values).flatten()
    assert torch.equal(kept[:, 0, 0, 0], (values[values >= downstream.SURE][:20] * 255).round().byte())


def test_one_of_two_candidates_is_kept(bed, tmp_path):
    kept = made(bed, "candidates", 8, tmp_path)[:, 0, 0, 0]
    pairs = (torch.tensor(bed.values[0]) * 255).round().byte().view(8, 2)
    assert ((kept[:, None] == pairs).any(1)).all()


def test_the_table_has_paired_differences():
    found = {"digits": {"plain": {"16": [0.5, 0.7, 0.6]}, "guided": {"16": [0.6, 0.8, 0.7], "32": [0.9, 0.9, 0.9]}}}
    lines = downstream.page(found)["digits"].splitlines()
    assert lines[2] == "| plain | 60.0 +- 24.8 | - |"  # 4.303 * 10 / sqrt(3)
    assert lines[3] == "| guided | 70.0 +- 24.8 (+10.0 +- 0.0) | 90.0 +- 0.0 |"
