import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, MemoryBank
from kspec_guidance.evaluation.image_sets import load_images
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.synthesis import Prompt, SynthesisError, estimate, synthesize
from kspec_guidance.synthesis.jobs import image_seed
from tests.synthesis.small_runs import CALL, PROMPTS, contents, make, rows_of

# -- one run -------------------------------------------------------------------------------------------------------------


def test_a_run_writes_a_folder_that_datasets_loads_and_running_it_again_makes_nothing(tmp_path, pipe):
    import datasets

    prompts = [{"prompt": "heart", "group": "things", "mood": "warm"}, {"prompt": "runner", "group": "people", "mood": "x"}]
    result = make(tmp_path / "set", pipe, prompts, report=True)
    assert (result.images, result.made, result.rejected) == (10, 10, {})
    rows = rows_of(tmp_path / "set")
    assert [r["file_name"] for r in rows] == [f"0000/{p:06d}-{k:04d}.png" for p in range(2) for k in range(5)]
    assert {(r["prompt"], r["group"], r["mood"]) for r in rows} == {("heart", "things", "warm"), ("runner", "people", "x")}
    assert {r["seed"] for r in rows} == {image_seed(0, p, k) for p in ("heart", "runner") for k in range(5)}
    assert [r["nearest"] is None for r in rows] == [k == 0 for k in range(5)] * 2
    assert all(1 <= r["vendi"] <= 5 and r["guide"] == "ConditionalRKE" and r["scale"] == 1.0 for r in rows)
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert loaded["prompt"][:] == [r["prompt"] for r in rows]
    assert loaded[0]["image"].size == (64, 64)
    page = (tmp_path / "set" / "report.html").read_text()
    assert "prompts ended: all images made 2" in page
    assert json.loads((tmp_path / "set" / "summary.json").read_text())["images"] == 10
    before = contents(tmp_path / "set")
    again = make(tmp_path / "set", pipe, prompts)
    assert (again.images, again.made) == (10, 0)
    assert contents(tmp_path / "set") == before


def test_the_same_run_makes_the_same_files_and_plain_images_are_those_of_the_pipeline(tmp_path, pipe):
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


def test_the_memory_of_the_run_repels_across_batches(tmp_path, pipe):
    make(tmp_path / "on", pipe, ["heart"], images=12, batch=2)
    make(tmp_path / "off", pipe, ["heart"], images=12, batch=2, guide=SPARKE(0.0))
    last = lambda name: rows_of(tmp_path / name)[-1]["vendi"]  # noqa: E731
    assert last("on") > last("off")


def test_the_guide_and_the_pipeline_are_as_before(tmp_path, pipe):
    guide, step = SPARKE(), pipe.scheduler.step
    bank = guide.memory
    make(tmp_path / "a", pipe, guide=guide, images=2)
    assert guide.memory is bank
    assert guide.remember

    def broken(image, row):
        raise RuntimeError("filter broke")

    with pytest.raises(RuntimeError, match="filter broke"):
        make(tmp_path / "b", pipe, guide=guide, images=2, filter=broken)
    assert guide.remember
    assert guide.memory is bank
    assert pipe.scheduler.step == step
    assert not list((tmp_path / "b").rglob("*.png"))
    make(tmp_path / "b", pipe, guide=guide, images=2, filter=lambda image, row: True, force=True)  # and the lock is free


def test_a_memory_of_earlier_images_is_heeded_and_saved_with_the_new_ones(tmp_path, pipe):
    make(tmp_path / "a", pipe, ["heart"], memory_file=tmp_path / "m.safetensors")
    bank = MemoryBank.load(tmp_path / "m.safetensors")
    assert len(bank) == 5
    make(tmp_path / "b", pipe, ["heart"], guide=SPARKE(memory=bank), seed=1, memory_file=tmp_path / "m.safetensors")
    make(tmp_path / "c", pipe, ["heart"], seed=1)
    assert contents(tmp_path / "b") != contents(tmp_path / "c")
    assert len(MemoryBank.load(tmp_path / "m.safetensors")) == 10


@pytest.mark.parametrize("kind", ["auto", "exact", "centroids"])
def test_kinds_of_memory(tmp_path, pipe, kind):
    made = make(tmp_path / kind, pipe, memory=kind, images=4)
    assert made.images == 20


def test_a_centroid_memory_of_the_guide_itself(tmp_path, pipe):
    guide = SPARKE(memory=CentroidMemory(4))
    assert make(tmp_path, pipe, ["heart"], guide=guide, images=8, memory="guide").images == 8
    assert len(guide.memory) == 8


def test_a_bank_with_settings_is_taken_as_it_is(tmp_path, pipe):
    guide = SPARKE(memory=MemoryBank(limit=3))
    make(tmp_path / "a", pipe, ["heart"], guide=guide, images=8)
    assert (len(guide.memory), guide.memory.total_added) == (3, 8)
    guide = SPARKE()
    make(tmp_path / "b", pipe, ["heart"], guide=guide, images=2)
    assert len(guide.memory) == 0  # an empty one without settings is left alone
    with pytest.raises(SynthesisError, match="2 memories in different spaces"):
        make(tmp_path / "c", pipe, guide=SPARKE() + SPARKE(space="pooled"))


def test_random_features_repel_over_a_run_and_come_back(tmp_path, pipe):
    from kspec_guidance.features import RandomFourierFeatures
    from kspec_guidance.kernels import GaussianKernel

    def guide():
        kernel, prompts = GaussianKernel(1.0), GaussianKernel(0.35)
        phi, psi = RandomFourierFeatures(kernel, 576, 256), RandomFourierFeatures(prompts, 160, 64)
        return SPARKE(kernel=kernel, prompt_kernel=prompts, feature_map=phi, prompt_feature_map=psi)

    make(tmp_path / "whole", pipe, ["heart", "runner"], guide=guide())
    stopped = iter([True] * 5 + [None])
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path / "cut", pipe, ["heart", "runner"], guide=guide(), filter=lambda image, row: next(stopped))
    assert len(list((tmp_path / "cut").rglob("*.png"))) == 3
    make(tmp_path / "cut", pipe, ["heart", "runner"], guide=guide(), filter=lambda image, row: True)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in ("whole", "cut"))
    assert one == two


def test_groups_have_memories_of_their_own(tmp_path, pipe):
    prompts = [Prompt("heart", "a"), Prompt("heart ", "b"), Prompt("red heart", "b")]
    make(tmp_path / "x", pipe, prompts, memory_by="group", batch=4, images=3)
    make(tmp_path / "x", pipe, prompts, memory_by="all", batch=4, images=4, force=True)  # batches of both groups
    assert make(tmp_path / "x", pipe, prompts, memory_by="group", batch=4, images=5, force=True).images == 15
    alone = [Prompt("heart", "a")]
    make(tmp_path / "y", pipe, alone, memory_by="group", batch=4, images=3)
    first = lambda name: (tmp_path / name / "0000" / "000000-0002.png").read_bytes()  # noqa: E731
    assert first("x") == first("y")


# -- formats, estimates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_hold_the_same_images_also_after_a_break(tmp_path, pipe, kind):
    make(tmp_path / "folder", pipe)
    make(tmp_path / "whole", pipe, format=kind, shard_size=4)
    left = 11

    def breaks(image, row):
        nonlocal left
        left -= 1
        if not left:
            raise RuntimeError("broken off")
        return True

    with pytest.raises(RuntimeError, match="broken off"):
        make(tmp_path / "cut", pipe, format=kind, shard_size=4, filter=breaks)
    left = -1
    make(tmp_path / "cut", pipe, format=kind, shard_size=4, filter=breaks)
    ending = "tar" if kind == "webdataset" else "parquet"
    names = sorted(p.name for p in (tmp_path / "whole").glob(f"*.{ending}"))
    assert names == [f"shard-00-0000-{k:06d}.{ending}" for k in range(7)]
    if kind == "webdataset":  # the settings' digest in each row differs by the filter alone
        assert [p.stat().st_size for p in sorted((tmp_path / "cut").glob("*.tar"))] == [
            p.stat().st_size for p in sorted((tmp_path / "whole").glob("*.tar"))
        ]
    from kspec_guidance.evaluation.embedders import ImageEmbedder

    pixels = ImageEmbedder(torch.nn.Flatten(), 8, "pixels")
    sets = [load_images(tmp_path / name, pixels) for name in ("folder", "whole", "cut")]
    for found in sets[1:]:
        assert found.prompts == sets[0].prompts
        assert torch.equal(found.features, sets[0].features)
    assert not list((tmp_path / "whole" / ".kspec").rglob("*.png"))


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_of_an_epoch_that_was_broken_off_hold_all_its_images(tmp_path, pipe, kind):
    from kspec_guidance.evaluation.embedders import ImageEmbedder

    left = iter([True] * 11 + [None])
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path, pipe, format=kind, shard_size=4, filter=lambda image, row: next(left))
    with pytest.raises(SynthesisError, match="another folder for another"):
        make(tmp_path, pipe, force=True)
    result = make(tmp_path, pipe, images=6, format=kind, shard_size=5, force=True)
    found = load_images(tmp_path, ImageEmbedder(torch.nn.Flatten(), 8, "pixels"))
    assert len(found) == result.images == 30
    assert not list((tmp_path / ".kspec").rglob("*.png"))
    assert sum("rest" in path.name for path in tmp_path.glob("shard-00-*")) == 1
    make(tmp_path, pipe, images=6, format=kind, shard_size=5)
    assert len(load_images(tmp_path, ImageEmbedder(torch.nn.Flatten(), 8, "pixels"))) == 30


def test_an_estimate_writes_nothing_and_is_near_what_happens(tmp_path, pipe):
    found = estimate(PROMPTS, tmp_path / "set", pipe, SPARKE(), images=5, batch=5, call=CALL)
    assert not (tmp_path / "set").exists()
    assert (found.images, found.prompts, found.batches, found.finished) == (25, 5, 5, 0)
    result = make(tmp_path / "set", pipe, batch=5)
    assert found.seconds > 0
    assert result.images == 25
    size = sum(p.stat().st_size for p in (tmp_path / "set").rglob("*") if p.is_file())
    assert 0.5 < size / found.disk_bytes < 2
    for words in ("25 images of 5 prompts", "exact rows", "nothing was written"):
        assert words in str(found)
    there = estimate(PROMPTS, tmp_path / "set", pipe, SPARKE(), images=6, batch=5, call=CALL)
    assert (there.finished, there.batches) == (25, 1)


def test_synthesis_of_the_embedded_pipeline_needs_two_arguments(tmp_path):
    result = synthesize(["heart"], tmp_path / "x", images=1, call={"num_inference_steps": 2}, report=False)
    assert result.images == 1
    assert str(result).startswith(f"1 images in {Path(tmp_path / 'x')}")
