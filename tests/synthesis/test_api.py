import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, MemoryBank
from kspec_guidance.synthesis import SynthesisError, estimate, synthesize
from kspec_guidance.synthesis.schedule import image_seed
from tests.synthesis.small_runs import CALL, contents, make, rows_of


def test_a_run_writes_a_folder_that_datasets_loads_and_a_second_run_makes_nothing(tmp_path, pipe):
    import datasets

    prompts = [{"prompt": "heart", "group": "things", "mood": "warm"}, {"prompt": "runner", "group": "people", "mood": "x"}]
    result = make(tmp_path / "set", pipe, prompts, report=True)
    assert (result.images, result.made, result.rejected) == (10, 10, {})
    rows = rows_of(tmp_path / "set")
    assert [r["file_name"] for r in rows] == [f"0000/{p:06d}-{k:04d}.png" for p in range(2) for k in range(5)]
    assert {(r["prompt"], r["group"], r["mood"]) for r in rows} == {("heart", "things", "warm"), ("runner", "people", "x")}
    assert {r["seed"] for r in rows} == {image_seed(0, p, k) for p in ("heart", "runner") for k in range(5)}
    assert [r["nearest"] is None for r in rows] == [k == 0 for k in range(5)] * 2
    assert all(1 <= r["vendi"] <= 5 and r["guide"] == "ConditionalRKE" and r["variety"] == 50 for r in rows)
    assert all(r["scale"] is None for r in rows)
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert loaded["prompt"][:] == [r["prompt"] for r in rows]
    assert loaded[0]["image"].size == (64, 64)
    page = (tmp_path / "set" / "report.html").read_text()
    assert "prompts ended: all images made 2" in page
    assert json.loads((tmp_path / "set" / "summary.json").read_text())["images"] == 10
    files = contents(tmp_path / "set")
    again = make(tmp_path / "set", pipe, prompts)
    assert (again.images, again.made) == (10, 0)
    assert contents(tmp_path / "set") == files


def test_runs_are_reproducible_and_unguided_images_are_those_of_the_pipeline(tmp_path, pipe):
    for name in ("a", "b"):
        make(tmp_path / name, pipe, ["heart", "runner"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    make(tmp_path / "plain", pipe, ["heart"], guide=SPARKE(0.0))
    generators = [torch.Generator().manual_seed(image_seed(0, "heart", k)) for k in range(3)]
    images = pipe("heart", num_images_per_prompt=3, generator=generators, **CALL).images
    for k, image in enumerate(images):
        with Image.open(tmp_path / "plain" / "0000" / f"000000-{k:04d}.png") as file:
            assert file.tobytes() == image.tobytes()
    assert contents(tmp_path / "plain") != contents(tmp_path / "a")


def test_the_guide_and_the_pipeline_are_restored(tmp_path, pipe):
    guide, step = SPARKE(), pipe.scheduler.step
    bank = guide.memory
    make(tmp_path / "a", pipe, guide=guide, images_per_prompt=2)
    assert guide.memory is bank
    assert guide.remember

    def broken(image, row):
        raise RuntimeError("filter broke")

    with pytest.raises(RuntimeError, match="filter broke"):
        make(tmp_path / "b", pipe, guide=guide, images_per_prompt=2, filter=broken)
    assert guide.remember
    assert guide.memory is bank
    assert pipe.scheduler.step == step
    assert not list((tmp_path / "b").rglob("*.png"))
    keep_all = lambda image, row: True  # noqa: E731
    make(tmp_path / "b", pipe, guide=guide, images_per_prompt=2, filter=keep_all, force=True)  # the lock is released


def test_a_memory_file_of_earlier_images_repels_and_gets_the_new_ones(tmp_path, pipe):
    file = tmp_path / "m.safetensors"
    make(tmp_path / "a", pipe, ["heart"], memory_file=file)
    bank = MemoryBank.load(file)
    assert len(bank) == 5
    make(tmp_path / "b", pipe, ["heart"], guide=SPARKE(memory=bank), seed=1, memory_file=file)
    make(tmp_path / "c", pipe, ["heart"], seed=1)
    assert contents(tmp_path / "b") != contents(tmp_path / "c")
    assert len(MemoryBank.load(file)) == 10


def test_two_arguments_suffice_with_the_embedded_pipeline(tmp_path):
    result = synthesize(["heart"], tmp_path / "x", images_per_prompt=1, call={"num_inference_steps": 2}, report=False)
    assert result.images == 1
    assert str(result).startswith(f"1 images in {Path(tmp_path / 'x')}")


def test_the_arguments_of_the_first_release_candidate_still_work(tmp_path, pipe):
    progress = []
    old_names = {"images": 3, "batch": 2, "tick": progress.append}
    with pytest.warns(FutureWarning) as warned:
        result = synthesize(["heart"], tmp_path, pipe, **old_names, call=CALL, report=False, sign=None)
    assert [str(w.message) for w in warned if w.category is FutureWarning] == [
        f"synthesize({old}=) is now {new}="
        for old, new in (("images", "images_per_prompt"), ("batch", "batch_size"), ("tick", "progress_callback"))
    ]
    assert result.images == 3
    assert [p.done for p in progress] == [2, 3]
    with pytest.warns(FutureWarning, match=r"estimate\(images=\) is now images_per_prompt="):
        assert estimate(["heart"], tmp_path, pipe, SPARKE(), images=4, batch_size=2, call=CALL).images == 4
    assert make(tmp_path, pipe, ["heart"], 3, 2).made == 0  # the settings are the same


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images_per_prompt": -1}, "images_per_prompt must be an integer of at least 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"format": "zip"}, "format must be one of imagefolder, webdataset, parquet"),
        ({"memory": "all"}, "memory must be one of auto"),
        ({"memory_by": "mood"}, "memory_by must be"),
        ({"duplicates": 3}, "cosine in"),
        ({"target": "much"}, "cannot read the target"),
        ({"quotas": {"x": 3}}, "no prompt has group x"),
        ({"call": {"steps": 3}}, "does not take steps"),
        ({"prompts": []}, "no prompts"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"call": {"generator": None}}, "generator cannot be set"),
        ({"call": {"negative_prompt": ["a", "b"]}}, "negative_prompt must be one text"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(tmp_path, pipe, settings, message):
    with pytest.raises(SynthesisError, match=message):
        make(tmp_path / "set", pipe, **settings)
    assert not (tmp_path / "set").exists()


def test_a_run_under_inference_mode_makes_the_same_images_and_is_resumed_outside(tmp_path, pipe):
    make(tmp_path / "plain", pipe, ["heart"], 4, 2, guide=SPARKE(space="pooled"))
    with torch.inference_mode():
        make(tmp_path / "set", pipe, ["heart"], 4, 2, guide=SPARKE(space="pooled"))
    assert contents(tmp_path / "set") == contents(tmp_path / "plain")
    assert make(tmp_path / "set", pipe, ["heart"], 6, 2, guide=SPARKE(space="pooled"), force=True).images == 6
    with torch.inference_mode():
        assert make(tmp_path / "set", pipe, ["heart"], 7, 2, guide=SPARKE(space="pooled"), force=True).images == 7
        assert estimate(["heart"], tmp_path / "new", pipe, SPARKE(), 4, 2, call=CALL).images == 4
