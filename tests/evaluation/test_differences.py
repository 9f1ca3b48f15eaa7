"""What two sets have more of, and the prompts on which they disagree: figures, JSON and page."""

import json

import pytest
import torch
from PIL import Image

from kspec_guidance.evaluation.differences import novel_modes, split_prompts
from kspec_guidance.evaluation.embedders import ImageEmbedder, one_hot_embedder
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.evaluation.page import write_page
from kspec_guidance.evaluation.set_pairs import compare_sets
from kspec_guidance.kernels import GaussianKernel
from tests.evaluation.test_sets import encode_png
from tests.samples import normalize_rows, rows

KERNEL = GaussianKernel(0.5)
PROMPTS = [f"prompt {k}" for k in range(6) for _ in range(8)]
NAMED = ImageEmbedder(lambda x: x.flatten(1), 8, "pixels", fingerprint="0")


def sets(changed, noise=0.1):
    centres, other = rows(6, 24), rows(6, 24, 1)
    group = torch.arange(6).repeat_interleave(8)
    moved = torch.where(torch.tensor([k in changed for k in range(6)])[:, None], other, centres)
    return (normalize_rows(c[group] + noise * rows(48, 24, s)) for c, s in ((centres, 2), (moved, 3)))


@pytest.mark.parametrize("exact", [True, False])
def test_prompts_with_different_images_are_listed_and_sure(exact, monkeypatch):
    if not exact:
        monkeypatch.setattr("kspec_guidance.evaluation.differences.EXACT", 0)
    x, y = sets({1, 4})
    for side in split_prompts(x, PROMPTS, y, PROMPTS, one_hot_embedder(), KERNEL):
        assert {p for d in side[:2] for p in d.prompts} == {"prompt 1", "prompt 4"}
        assert all(d.sure for d in side[:2])
        for d in side[:2]:
            assert {PROMPTS[i] for i in d.samples} == {PROMPTS[i] for i in d.samples_other} == set(d.prompts)


def test_like_sets_have_no_sure_difference():
    x, y = sets(set())
    found = (*split_prompts(x, PROMPTS, y, PROMPTS, one_hot_embedder(), KERNEL), *novel_modes(x, y, KERNEL))
    assert not [d for side in found for d in side if d.sure]


def test_images_without_captions_are_left_out():
    x, y = sets({1})
    some = [None if k % 2 else p for k, p in enumerate(PROMPTS)]
    first, second = split_prompts(x, some, y, PROMPTS, one_hot_embedder(), KERNEL)
    assert first[0].prompts == ["prompt 1"]
    assert not any(i % 2 for d in first for i in d.samples)
    assert any(i % 2 for d in second for i in d.samples)
    assert split_prompts(x, None, y, PROMPTS, one_hot_embedder(), KERNEL) == ([], [])
    assert split_prompts(x, ["a"] * 48, y, ["a"] * 48, one_hot_embedder(), KERNEL) == ([], [])


def test_sets_without_a_common_prompt_have_no_p_values():
    x, y = sets({1})
    first, second = split_prompts(x, PROMPTS, y, [p + "!" for p in PROMPTS], one_hot_embedder(), KERNEL)
    assert first
    assert all(d.p_value is None and not d.sure and not d.samples_other for d in (*first, *second))


def test_modes_that_one_set_has_more_of():
    x, y = sets({1})
    first, second = novel_modes(x, y, KERNEL)
    for d in (first[0], second[0]):
        assert d.p_value < 0.3
        assert d.value == pytest.approx(1 / 6, abs=0.05)
        assert {PROMPTS[i] for i in d.samples} == {"prompt 1"}


def test_page_and_json_of_a_comparison_show_them(tmp_path):
    picture = encode_png(Image.new("RGB", (8, 8), "red"))
    names = [f"{i}.png" for i in range(48)]
    a, b = (
        ImageSet(tmp_path / n, names, list(PROMPTS), [picture] * 48, z.float(), [f"{n}{i}" for i in range(48)])
        for n, z in zip(("first", "second"), sets({1, 4}), strict=True)
    )
    result = compare_sets(a, b, NAMED)
    (line,) = result.disagreement
    assert line in ("The sets differ most on: prompt 1, prompt 4.", "The sets differ most on: prompt 4, prompt 1.")
    assert line in result.summary()
    write_page(result, tmp_path / "page.html")
    page, record = (tmp_path / "page.html").read_text(), json.loads((tmp_path / "page.json").read_text())
    assert "Prompts on which they disagree" in page
    assert "Modes of one set (KEN)" in page
    for key in ("split_in_a", "split_in_b"):
        assert {p for d in record[key][:2] for p in d["prompts"]} == {"prompt 1", "prompt 4"}
        assert set(record[key][0]) == {"value", "p_value", "prompts", "images", "images_other"}
    assert record["novel_in_a"][0]["images"][0] in names
