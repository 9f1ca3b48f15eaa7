import importlib

from kspec_guidance import SPARKE
from kspec_guidance.synthesis import estimate
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.sharding import shard
from tests.synthesis.small_runs import CALL, PROMPTS, make


def test_an_estimate_writes_nothing_and_is_near_the_measured_size(tmp_path, pipe):
    found = estimate(PROMPTS, tmp_path / "set", pipe, SPARKE(), images_per_prompt=5, batch_size=5, call=CALL)
    assert not (tmp_path / "set").exists()
    assert (found.images, found.prompts, found.batches, found.finished) == (25, 5, 5, 0)
    result = make(tmp_path / "set", pipe, batch_size=5)
    assert found.seconds > 0
    assert result.images == 25
    size = sum(p.stat().st_size for p in (tmp_path / "set").rglob("*") if p.is_file())
    assert 0.5 < size / found.disk_bytes < 2
    for text in ("25 images of 5 prompts", "exact rows", "nothing was written"):
        assert text in str(found)
    found = estimate(PROMPTS, tmp_path / "set", pipe, SPARKE(), images_per_prompt=6, batch_size=5, call=CALL)
    assert (found.finished, found.batches) == (25, 1)


def test_of_a_slow_batch_a_few_steps_are_timed(tmp_path, pipe, monkeypatch):
    module = importlib.import_module("kspec_guidance.synthesis.estimate")
    steps = []
    monkeypatch.setattr(module, "TRIAL_SECONDS", 0.0)
    call = {"num_inference_steps": 12, "guidance_scale": 5.0, "callback_on_step_end": lambda *a: steps.append(a[1]) or {}}
    found = estimate(["heart"], tmp_path, pipe, SPARKE(), 2, 2, call=call)
    assert (found.timed_steps, steps) == (2, [0, 1])  # the two warm-up calls of one step have no callback
    assert found.seconds == found.batch_seconds > 0
    assert "as 2 of its steps took now" in str(found)


def test_shares_are_those_of_a_run_also_with_finished_images(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kspec_guidance.synthesis.estimate"), "FEATURE_SECONDS", float("inf"))
    prompts = [{"prompt": p, "group": g} for p, g in zip(PROMPTS, "aabbc", strict=True)]
    make(tmp_path / "set", pipe, prompts=prompts[:2], images_per_prompt=2, batch_size=2)
    settings = {"images_per_prompt": 2, "batch_size": 2, "call": CALL, "processes": 3}
    found = estimate(prompts, tmp_path / "set", pipe, SPARKE(), memory_by="group", **settings)
    assert [(share.prompts, share.images) for share in found.shares] == [(2, 0), (2, 4), (1, 2)]
    assert (found.finished, found.batches, found.assigned) == (4, 3, True)
    assert found.seconds == found.shares[1].seconds == 2 * found.batch_seconds
    features = Generator(pipe, SPARKE(), dict(CALL)).prompt_features(list(PROMPTS), 2)
    owners = shard(features, [2] * 5, 3)
    found = estimate(prompts, tmp_path / "other", pipe, SPARKE(), **settings)
    assert found.assigned
    assert [share.prompts for share in found.shares] == [owners.count(rank) for rank in range(3)]
