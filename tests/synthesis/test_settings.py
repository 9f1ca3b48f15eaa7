import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.synthesis import SettingsChangedError
from tests.synthesis.small_runs import CALL, make, rows_of


def test_changed_settings_are_listed_and_refused_and_force_continues(tmp_path, pipe):
    make(tmp_path, pipe, ["heart", "man"], images_per_prompt=3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}
    with pytest.raises(SettingsChangedError) as error:
        make(tmp_path, pipe, ["heart", "man"], guide=SPARKE(0.3), call={**CALL, "num_inference_steps": 4})
    message = str(error.value)
    for text in ("6 images", "images_per_prompt: 3 before, now 5", "num_inference_steps: 3 before, now 4", "--force"):
        assert text in message
    assert any("scale" in d or "terms" in d for d in error.value.differences)
    prompts = ["man", "runner", "heart"]
    result = make(tmp_path, pipe, prompts, guide=SPARKE(0.3), force=True)
    assert (result.images, result.made) == (15, 9)
    rows = rows_of(tmp_path)
    assert len({r["file_name"] for r in rows}) == 15
    assert [sum(r["prompt"] == p for r in rows) for p in prompts] == [5, 5, 5]
    assert all(p.read_bytes() == data for p, data in before.items())
    assert sorted({r["scale"] for r in rows}) == [0.3, 1.0]
    assert make(tmp_path, pipe, prompts, guide=SPARKE(0.3)).made == 0


def test_after_a_change_of_space_or_embedder_old_images_count_and_their_tensors_are_left_out(tmp_path, pipe):
    make(tmp_path, pipe, ["heart", "man"], images_per_prompt=3)
    result = make(tmp_path, pipe, ["heart", "man"], guide=SPARKE(space="pooled"), force=True)
    assert (result.images, result.made) == (10, 4)
    settings = {"images_per_prompt": 9, "embedder": ImageEmbedder(torch.nn.Flatten(), 8, "pixels"), "duplicates": 1.0}
    result = make(tmp_path, pipe, ["heart", "man"], force=True, **settings)
    assert (result.images, result.made) == (18, 8)
    assert len({row["file_name"] for row in rows_of(tmp_path)}) == 18
    assert make(tmp_path, pipe, ["heart", "man"], **settings).made == 0
