import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from synthesising import CALL, PROMPTS, contents, make, quiet_pipeline, rows_of

from kspec_guidance import SPARKE, MemoryBank, load_demo_reference
from kspec_guidance.demo import encode_reference
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.sources import load_images
from kspec_guidance.synthesis import (
    Attribute,
    CheckpointError,
    Prompt,
    SettingsChangedError,
    SynthesisError,
    Target,
    estimate,
    read_prompts,
    synthesize,
)
from kspec_guidance.synthesis.jobs import goals, image_seed
from kspec_guidance.synthesis.quotas import Balance, allot
from kspec_guidance.synthesis.sharding import shard
from kspec_guidance.synthesis.store import Store


@pytest.fixture(scope="module")
def pipe():
    return quiet_pipeline()


# -- prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_from_every_kind_of_source(tmp_path):
    import datasets

    rows = [{"caption": "heart", "group": "a", "mood": "warm"}, {"caption": "runner", "group": "b", "images": 2}]
    (tmp_path / "p.txt").write_text("heart\n\nrunner\n")
    (tmp_path / "p.csv").write_text('caption,group,mood,images\nheart,a,warm,\n"runner",b,,2\n')
    (tmp_path / "p.tsv").write_text("caption\tgroup\tmood\timages\nheart\ta\twarm\t\nrunner\tb\t\t2\n")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    table = datasets.Dataset.from_list([{"images": None, "mood": None, **row} for row in rows])
    table.to_parquet(tmp_path / "p.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert [p.text for p in read_prompts(tmp_path / "p.txt")] == ["heart", "runner"]
    for source in (
        *(tmp_path / f"p.{k}" for k in ("csv", "tsv", "jsonl", "json", "parquet")),
        tmp_path / "saved",
        table,
        rows,
    ):
        found = read_prompts(source)
        assert [(p.text, p.group, p.images) for p in found] == [("heart", "a", None), ("runner", "b", 2)], source
        assert found[0].extra["mood"] == "warm"
    assert [p.text for p in read_prompts(rows[:1], column="mood")] == ["warm"]
    again = read_prompts(["heart", "runner", "heart"])
    assert [(p.text, p.times) for p in again] == [("heart", 2), ("runner", 1)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.txt", None, "no prompts file"),
        ("empty.txt", "\n \n", "no prompts in"),
        ("p.jsonl", '{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        ("p.csv", "name,words\na,b\n", "no column prompt, caption, text; its columns are name, words"),
        ("p.json", '{"prompt": "a"}', "holds a dict; expected a list"),
        ("p.csv", "prompt,images\na,many\n", "asks for 'many' images"),
        ("p.jsonl", '{"prompt": "a", "images": -1}\n', "asks for -1 images"),
        ("p.docx", "x", "of no known kind"),
        ("p.parquet", "x", "no Parquet file"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SynthesisError, match=words):
        read_prompts(tmp_path / name)
    with pytest.raises(SynthesisError, match="row with a column of prompts"):
        read_prompts([3])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SynthesisError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_goals_and_seeds():
    prompts = [Prompt("a", "x"), Prompt("b", "x"), Prompt("c", "y", images=7), Prompt("d", times=3)]
    assert goals(prompts, 4, {}) == [4, 4, 7, 12]
    assert goals(prompts, 4, {"x": 9}) == [5, 4, 7, 12]
    with pytest.raises(SynthesisError, match="no prompt has group z; groups are x, y"):
        goals(prompts, 4, {"z": 1})
    assert len({image_seed(s, p, k) for s in range(3) for p in "abc" for k in range(50)}) == 450


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
    assert all(1 <= r["vendi"] <= 5 and r["guide"] == "ConditionalRKE" and r["scale"] == 0.6 for r in rows)
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
    assert (len(guide.memory), guide.memory.seen) == (3, 8)
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
        return SPARKE(kernel=kernel, prompt_kernel=prompts, features=phi, prompt_features=psi)

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


# -- targets, quotas, filters --------------------------------------------------------------------------------------------


def test_a_target_stops_a_prompt_early_and_says_why(tmp_path, pipe):
    result = make(tmp_path / "a", pipe, ["heart", "cat face"], images=40, batch=4, target="vendi>=3")
    assert result.stopped == {"target reached": 2}
    assert result.images < 40
    from kspec_guidance.synthesis.engine import back

    rows = [r for r in Store(tmp_path / "a").records(tensors=True) if r.rows[0]["prompt"] == "heart"]
    features = torch.cat([back(r.tensors)[2] for r in rows])
    target = Target.parse("vendi>=3")
    assert target.reached(features, 4) == "target reached"
    assert target.reached(features[:-4], 4) is None
    again = make(tmp_path / "a", pipe, ["heart", "cat face"], images=40, batch=4, target="vendi>=3")
    assert (again.made, again.stopped) == (0, {"target reached": 2})
    high = make(tmp_path / "b", pipe, ["heart"], images=12, batch=4, target="vendi>=12")
    assert sum(high.stopped.values()) == 1
    assert "target reached" not in high.stopped


def test_returns_that_diminish_stop_too(g):
    target = Target("vendi", 10.0, gain=0.05)
    few = torch.randn(3, 8, generator=g)
    x = few[torch.arange(40) % 3] + 1e-3 * torch.randn(40, 8, generator=g)
    assert target.reached(x, 8) == "more images add little"
    assert target.reached(torch.randn(40, 400, generator=g), 8) == "target reached"
    assert target.reached(x[:7], 4) is None


@pytest.mark.parametrize("text", ["vendi", "vendi>12", "fid>=3", "vendi>=0.5", "vendi>=1.2.3", "vendi>=", ""])
def test_targets_that_mean_nothing_are_refused(text):
    with pytest.raises(SynthesisError):
        Target.parse(text)


def test_quotas_by_group(tmp_path, pipe):
    prompts = [Prompt("heart", "a"), Prompt("red heart", "a"), Prompt("man", "b"), Prompt("runner")]
    result = make(tmp_path, pipe, prompts, images=2, quotas={"a": 5, "b": 3})
    assert result.images == 10
    counts = [sum(r["prompt"] == p.text for r in rows_of(tmp_path)) for p in prompts]
    assert counts == [3, 2, 3, 2]


def test_attributes_come_out_in_the_wanted_shares(tmp_path, pipe):
    call = {"num_inference_steps": 10, "guidance_scale": 5.0}
    dark, light = (encode_reference(pipe, load_demo_reference(f"{n}-skin-tone")) for n in ("dark", "light"))
    quotas = {"dark": Attribute(dark, 3.0), "light": Attribute(light, 1.0)}
    prompts = ["man", "farmer", "student", "health worker"]
    result = make(tmp_path / "a", pipe, prompts, images=8, batch=8, call=call, quotas=quotas)
    assert sum(result.attributes.values()) == 32
    assert 20 <= result.attributes["dark"] <= 28  # 24 wanted
    with pytest.raises(SynthesisError, match="two reference sets or more"):
        make(tmp_path / "b", pipe, quotas={"dark": Attribute(dark)})
    with pytest.raises(SynthesisError, match="encode the references"):
        make(tmp_path / "b", pipe, quotas={"x": Attribute(torch.ones(3, 5)), "y": Attribute(torch.zeros(3, 5))})
    with pytest.raises(SynthesisError, match="a number of images or an Attribute"):
        make(tmp_path / "b", pipe, quotas={"x": "many"})


def test_the_balance_objective_is_the_gradient_of_its_value(g):
    references = [torch.randn(5, 6, generator=g).double() + 1, torch.randn(7, 6, generator=g).double() - 1]
    objective = Balance(references)
    objective.wanted = [0, 1, 1, 0]
    x = torch.randn(4, 6, generator=g).double().requires_grad_()
    (expected,) = torch.autograd.grad(objective.value(x), x)
    torch.testing.assert_close(objective.gradient(x.detach()), expected)
    assert objective.assign(torch.cat(references)) == [0] * 5 + [1] * 7
    assert allot([10, 0], [1, 1], 4) == [1] * 4
    assert allot([0, 0, 0], [2, 1, 1], 8).count(0) == 4


def test_what_a_filter_drops_is_made_again_and_counted(tmp_path, pipe):
    seen = []

    def every_other(image, row):
        seen.append(row["file_name"])
        assert image.size == (64, 64)
        return "odd one" if len(seen) % 2 else True

    result = make(tmp_path, pipe, ["heart"], images=4, batch=4, filter=every_other, report=True)
    assert result.images == 4
    assert result.rejected == {"odd one": 4}
    assert [r["attempt"] for r in rows_of(tmp_path)] == [1, 3, 5, 7]
    assert "dropped: odd one 4" in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_near_duplicates_and_blank_images_are_dropped(tmp_path, pipe):
    result = make(tmp_path / "a", pipe, ["heart"], images=6, batch=3, duplicates=0.2)
    assert result.rejected["near duplicate"] > 0
    rows = rows_of(tmp_path / "a")
    assert all(r["nearest"] is None or r["nearest"] < 0.2 for r in rows)
    again = make(tmp_path / "b", pipe, ["heart"], images=4, batch=2, duplicates=1.0)
    assert again.rejected == {}
    from kspec_guidance.synthesis.screening import Screen

    white, picture = Image.new("RGB", (8, 8), "white"), Image.effect_noise((8, 8), 50)
    assert Screen(None, None).reasons([white, picture], [{}, {}], torch.randn(2, 3)) == ["blank", None]


def test_a_prompt_whose_images_are_all_dropped_is_given_up(tmp_path, pipe):
    result = make(tmp_path, pipe, ["heart", "man"], images=2, batch=2, filter=lambda image, row: row["prompt"] == "man")
    assert result.stopped == {"all images made": 1, "too many rejected": 1}
    assert result.images == 2
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path / "none", pipe, images=1, filter=lambda image, row: None)


# -- what goes wrong -----------------------------------------------------------------------------------------------------


def test_changed_settings_are_shown_and_refused_and_force_goes_on(tmp_path, pipe):
    make(tmp_path, pipe, ["heart", "man"], images=3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}
    with pytest.raises(SettingsChangedError) as error:
        make(tmp_path, pipe, ["heart", "man"], images=5, guide=SPARKE(0.3), call={**CALL, "num_inference_steps": 4})
    text = str(error.value)
    for words in ("6 images", "images: 3 before, now 5", "num_inference_steps: 3 before, now 4", "--force"):
        assert words in text
    assert any("scale" in d or "terms" in d for d in error.value.differences)
    result = make(tmp_path, pipe, ["man", "runner", "heart"], images=5, guide=SPARKE(0.3), force=True)
    assert (result.images, result.made) == (15, 9)
    rows = rows_of(tmp_path)
    assert len({r["file_name"] for r in rows}) == 15
    assert {p: sum(r["prompt"] == p for r in rows) for p in ("man", "runner", "heart")} == {
        "man": 5,
        "runner": 5,
        "heart": 5,
    }
    assert all(p.read_bytes() == data for p, data in before.items())
    assert sorted({r["scale"] for r in rows}) == [0.3, 0.6]
    assert make(tmp_path, pipe, ["man", "runner", "heart"], images=5, guide=SPARKE(0.3)).made == 0


def test_forcing_on_with_another_space_or_other_features_counts_the_old_images_and_forgets_their_rows(tmp_path, pipe):
    from kspec_guidance.embedders import module_embedder

    make(tmp_path, pipe, ["heart", "man"], images=3)
    result = make(tmp_path, pipe, ["heart", "man"], images=5, guide=SPARKE(space="pooled"), force=True)
    assert (result.images, result.made) == (10, 4)
    pixels = module_embedder(torch.nn.Flatten(), 8, "pixels")
    result = make(tmp_path, pipe, ["heart", "man"], images=9, embedder=pixels, duplicates=1.0, force=True)
    assert (result.images, result.made) == (18, 8)
    assert len({row["file_name"] for row in rows_of(tmp_path)}) == 18
    assert make(tmp_path, pipe, ["heart", "man"], images=9, embedder=pixels, duplicates=1.0).made == 0


def test_a_run_of_one_process_keeps_nothing_for_others(tmp_path, pipe, monkeypatch):
    from kspec_guidance.synthesis.engine import Worker

    seen, real = [], Worker.run
    monkeypatch.setattr(Worker, "run", lambda self: (real(self), seen.append(self)))
    make(tmp_path, pipe, images=3)
    assert seen[0].fresh == []
    assert not any(job.features for job in seen[0].jobs)


def test_damaged_settings_are_named_and_force_goes_on(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"])
    (tmp_path / ".kspec" / "epoch-000" / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings.json is damaged"):
        make(tmp_path, pipe, ["heart"])
    assert make(tmp_path, pipe, ["heart"], force=True).images == 5


def test_two_runs_in_one_folder_are_refused(tmp_path, pipe):
    code = (
        "import sys; from pathlib import Path; from kspec_guidance.synthesis.store import Store\n"
        "store = Store(Path(sys.argv[1])); store.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(SynthesisError, match="another run is writing"):
        make(tmp_path, pipe, images=1)
    holder.kill()
    holder.wait()
    assert make(tmp_path, pipe, images=1).images == 5


def test_a_damaged_record_is_named_and_force_makes_its_images_again(tmp_path, pipe):
    make(tmp_path, pipe)
    whole = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    record = tmp_path / ".kspec" / "epoch-000" / "rank-0000" / "000002.safetensors"
    data = bytearray(record.read_bytes())
    data[-5] ^= 1
    record.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"000002.safetensors was altered.*--force"):
        make(tmp_path, pipe)
    result = make(tmp_path, pipe, force=True)
    assert result.images == 25
    assert 1 <= result.made <= 3
    now = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert len(now) == 25
    assert sum(now.get(name) == data for name, data in whole.items()) >= 22
    assert make(tmp_path, pipe).made == 0


def test_missing_images_are_named_and_force_makes_as_many(tmp_path, pipe):
    make(tmp_path, pipe)
    (tmp_path / "0000" / "000001-0002.png").unlink()
    with pytest.raises(CheckpointError, match=r"1 finished images are gone.*000001-0002"):
        make(tmp_path, pipe)
    assert make(tmp_path, pipe, force=True).images == 25
    assert len(list(tmp_path.rglob("*.png"))) == 25


@pytest.mark.parametrize("fails", [1, 4, 8, 15])
def test_a_full_disk_loses_nothing(tmp_path, pipe, monkeypatch, fails):
    import os

    make(tmp_path / "whole", pipe)
    real, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > 3 * fails:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SynthesisError, match=r"no space left.*finished images are safe"):
            make(tmp_path / "cut", pipe)
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    make(tmp_path / "cut", pipe)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_folders_that_cannot_be_used_are_refused(tmp_path, pipe):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SynthesisError, match="cannot write to"):
        make(tmp_path / "file" / "set", pipe)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.jsonl").write_text("{}")
    with pytest.raises(SynthesisError, match="that no run of this program wrote"):
        make(tmp_path / "other", pipe)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"images": -1}, "images must be a whole number"),
        ({"batch": 0}, "batch must be"),
        ({"format": "zip"}, "format must be one of imagefolder, webdataset, parquet"),
        ({"memory": "all"}, "memory must be one of auto"),
        ({"memory_by": "mood"}, "memory_by must be"),
        ({"duplicates": 3}, "cosine in"),
        ({"target": "much"}, "cannot read the target"),
        ({"quotas": {"x": 3}}, "no prompt has group x"),
        ({"call": {"steps": 3}}, "does not take steps"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, pipe, settings, words):
    with pytest.raises(SynthesisError, match=words):
        make(tmp_path / "set", pipe, **settings)
    assert not (tmp_path / "set").exists()


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
    from kspec_guidance.embedders import module_embedder

    pixels = module_embedder(torch.nn.Flatten(), 8, "pixels")
    sets = [load_images(tmp_path / name, pixels) for name in ("folder", "whole", "cut")]
    for found in sets[1:]:
        assert found.prompts == sets[0].prompts
        assert torch.equal(found.features, sets[0].features)
    assert not list((tmp_path / "whole" / ".kspec").rglob("*.png"))


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_of_an_epoch_that_was_broken_off_hold_all_its_images(tmp_path, pipe, kind):
    from kspec_guidance.embedders import module_embedder

    left = iter([True] * 11 + [None])
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path, pipe, format=kind, shard_size=4, filter=lambda image, row: next(left))
    with pytest.raises(SynthesisError, match="another folder for another"):
        make(tmp_path, pipe, force=True)
    result = make(tmp_path, pipe, images=6, format=kind, shard_size=5, force=True)
    found = load_images(tmp_path, module_embedder(torch.nn.Flatten(), 8, "pixels"))
    assert len(found) == result.images == 30
    assert not list((tmp_path / ".kspec").rglob("*.png"))
    assert sum("rest" in path.name for path in tmp_path.glob("shard-00-*")) == 1
    make(tmp_path, pipe, images=6, format=kind, shard_size=5)
    assert len(load_images(tmp_path, module_embedder(torch.nn.Flatten(), 8, "pixels"))) == 30


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


# -- sharding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shards_are_even_and_keep_similar_prompts_together(g, parts):
    centres = 10 * torch.randn(parts, 16, generator=g)
    which = torch.arange(parts * 20) % parts
    owner = torch.tensor(shard(centres[which] + 0.1 * torch.randn(parts * 20, 16, generator=g), [3] * (parts * 20), parts))
    assert torch.bincount(owner, minlength=parts).tolist() == [20] * parts
    for k in range(parts):
        assert len(set(owner[which == k].tolist())) == 1
    sizes = torch.randint(1, 30, (200,), generator=g).tolist()
    owner = torch.tensor(shard(torch.randn(200, 8, generator=g), sizes, parts))
    loads = torch.zeros(parts).index_add_(0, owner, torch.tensor(sizes).float())
    assert loads.max() / loads.min() < 1.4
    assert set(shard(torch.zeros(10, 2), [1] * 10, parts)) == set(range(min(parts, 10)))


def test_command_line(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    (tmp_path / "p.jsonl").write_text('{"prompt": "heart", "group": "a"}\n{"prompt": "man", "group": "b"}\n')
    call = lambda *more: CliRunner().invoke(  # noqa: E731
        app, ["generate", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "set"), "--steps", "3", *more]
    )
    said = call("--images", "4", "--dry-run")
    assert said.exit_code == 0, said.output
    assert "8 images of 2 prompts" in said.output
    assert not (tmp_path / "set").exists()
    said = call("--images", "4", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert said.exit_code == 0, said.output
    assert len(rows_of(tmp_path / "set")) == 6
    said = call("--images", "5", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert said.exit_code == 2
    assert "images: 4 before, now 5" in said.stderr
    said = call("--images", "5", "--quota", "b=2", "--no-report", "--force")
    assert said.exit_code == 0
    assert len(rows_of(tmp_path / "set")) == 7
    for more, words in (
        (("--quota", "b"), "name=value"), (("--target", "x"), "cannot read the target"),
        (("--filter", "nothing:here"), "import"), (("--device", "nowhere"), "cannot use device"),
        (("--dtype", "int8"), "dtype must be one of"), (("heart",), "not both"),
    ):  # fmt: skip
        said = call(*more)
        assert said.exit_code == 2, words
        assert words in said.stderr


def test_filters_are_found_by_name(tmp_path, monkeypatch):
    from kspec_guidance.synthesis.screening import load_filter

    (tmp_path / "my_filter_of_a_test.py").write_text("def keep(image, row):\n    return row['attempt'] > 0\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_filter("my_filter_of_a_test:keep")(None, {"attempt": 1})
    for name, words in (
        ("my_filter_of_a_test:number", "not a function"),
        ("x", "module:function"),
        ("os:nothing", "import"),
    ):
        with pytest.raises(SynthesisError, match=words):
            load_filter(name)


def test_synthesis_of_the_embedded_pipeline_needs_two_arguments(tmp_path):
    result = synthesize(["heart"], tmp_path / "x", images=1, call={"num_inference_steps": 2}, report=False)
    assert result.images == 1
    assert str(result).startswith(f"1 images in {Path(tmp_path / 'x')}")
