"""Perceptual distances of images of one prompt, with stand-ins for the networks, whose weights are not at hand."""

import json
import sys
from itertools import combinations
from types import ModuleType

import pytest
import torch
from PIL import Image

from kspec_guidance.evaluation import evaluate_set, load_images
from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.evaluation.perceptual import pair_distance, perceptual_diversity

EMBEDDER = ImageEmbedder(lambda x: x.mean((2, 3)), 8, "mean colour")


def mean_difference(a, b):
    return (a - b).abs().mean((1, 2, 3))


@pytest.fixture
def images(tmp_path):
    """Grey images of 5 prompts, 3 of each, whose levels are 3 k apart for prompt k, and one image without a prompt."""
    rows = []
    for k in range(5):
        for i in range(3):
            Image.new("L", (32, 32), 3 * k * i).save(tmp_path / f"{k}-{i}.png")
            rows.append({"file_name": f"{k}-{i}.png", "prompt": f"prompt {k}"})
    Image.new("L", (32, 32), 255).save(tmp_path / "alone.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_images(tmp_path, EMBEDDER)


def test_mean_distance_of_pairs_of_a_prompt(images):
    found, pairs = perceptual_diversity(images, mean_difference, 32)
    expected = sum(3 * k * (j - i) / 255 / 3 for k in range(5) for i, j in combinations(range(3), 2)) / 5
    assert pairs == 15
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert found.low < found.value < found.high


def test_scores_have_the_distance(images):
    records = evaluate_set(images, EMBEDDER, distances={"lpips": mean_difference}).scores
    assert [r.score for r in records if "lpips" in r.score] == ["lpips, mean of 15 pairs of one prompt"]


def test_a_distance_of_wrong_shape_is_refused(images):
    with pytest.raises(ValueError, match="returned shape"):
        perceptual_diversity(images, lambda a, b: a - b, 32)


def test_one_image_of_each_prompt_has_no_pairs(tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    assert perceptual_diversity(load_images(tmp_path, EMBEDDER), mean_difference, 32) is None


def test_names(monkeypatch):
    with pytest.raises(ValueError, match="unknown perceptual distance 'ssim'"):
        pair_distance("ssim")
    monkeypatch.setitem(sys.modules, "dreamsim", None)
    with pytest.raises(ImportError, match="pip install dreamsim"):
        pair_distance("dreamsim")


def test_lpips_gets_images_in_0_to_1(monkeypatch):
    class Lpips(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b, normalize):
            assert normalize  # images are in 0..1, and its networks take -1..1
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    module = ModuleType("lpips")
    module.LPIPS = Lpips
    monkeypatch.setitem(sys.modules, "lpips", module)
    a, b = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(pair_distance("lpips")(a, b), mean_difference(a, b))
