"""Metadata of runs: who made the images of a folder, and from which seeds."""

import json

from benchmarks.arena.networks import emoji_pipeline
from kspec_guidance import load_demo_pipeline
from kspec_guidance.evaluation.runs import made_by_demo, seeds_of
from kspec_guidance.utils.hashing import fingerprint


def test_folders_of_the_embedded_model_are_recognised(tmp_path):
    assert not made_by_demo(tmp_path)
    state = tmp_path / ".kspec" / "epoch-000"
    state.mkdir(parents=True)
    denoiser = fingerprint(load_demo_pipeline().unet)
    for text, expected in (
        (json.dumps({"pipeline": {"denoiser": denoiser}}), True),
        (json.dumps({"pipeline": {"denoiser": fingerprint(emoji_pipeline().unet)}}), True),  # made by 1.0.0rc1
        (json.dumps({"pipeline": {"denoiser": "UNet2DConditionModel-000000000000"}}), False),
        ("{damaged", False),
        ("[]", False),
    ):
        (state / "settings.json").write_text(text)
        assert made_by_demo(tmp_path) is expected
    (state / "settings.json").write_text(json.dumps({"pipeline": {"denoiser": denoiser}}))
    other = tmp_path / ".kspec" / "epoch-001"
    other.mkdir()
    (other / "settings.json").write_text(json.dumps({"pipeline": {"denoiser": "none"}}))
    assert not made_by_demo(tmp_path)  # a later epoch of another model


def test_seeds_are_read_with_their_prompts(tmp_path):
    assert seeds_of(tmp_path) == set()
    assert seeds_of(tmp_path / "no.tar") == set()
    rows = ['{"prompt": "a", "seed": 1}', '{"prompt": "b", "seed": 1}', '{"prompt": "c"}', "{oops", "3", ""]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert seeds_of(tmp_path) == {("a", 1), ("b", 1)}
