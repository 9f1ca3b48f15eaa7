import pytest
import torch

from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.evaluation.image_sets import load_images
from kspec_guidance.synthesis import SynthesisError
from tests.synthesis.small_runs import make, rows_of

PIXELS = ImageEmbedder(torch.nn.Flatten(), 8, "pixels")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_hold_the_images_of_a_folder_also_after_an_interruption(tmp_path, pipe, kind):
    make(tmp_path / "folder", pipe)
    make(tmp_path / "whole", pipe, format=kind, shard_size=4)
    images_left = 11

    def interrupt(image, row):
        nonlocal images_left
        images_left -= 1
        if not images_left:
            raise RuntimeError("interrupted")
        return True

    with pytest.raises(RuntimeError, match="interrupted"):
        make(tmp_path / "cut", pipe, format=kind, shard_size=4, filter=interrupt)
    images_left = -1
    make(tmp_path / "cut", pipe, format=kind, shard_size=4, filter=interrupt)
    suffix = "tar" if kind == "webdataset" else "parquet"
    names = sorted(p.name for p in (tmp_path / "whole").glob(f"*.{suffix}"))
    assert names == [f"shard-00-0000-{k:06d}.{suffix}" for k in range(7)]
    if kind == "webdataset":  # rows differ by the digest of the settings, which include the filter
        assert [p.stat().st_size for p in sorted((tmp_path / "cut").glob("*.tar"))] == [
            p.stat().st_size for p in sorted((tmp_path / "whole").glob("*.tar"))
        ]
    sets = [load_images(tmp_path / name, PIXELS) for name in ("folder", "whole", "cut")]
    for loaded in sets[1:]:
        assert loaded.prompts == sets[0].prompts
        assert torch.equal(loaded.features, sets[0].features)
    assert not list((tmp_path / "whole" / ".kspec").rglob("*.png"))


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_shards_hold_all_images_of_an_interrupted_epoch(tmp_path, pipe, kind):
    verdicts = iter([True] * 11 + [None])
    with pytest.raises(SynthesisError, match="returned nothing"):
        make(tmp_path, pipe, format=kind, shard_size=4, filter=lambda image, row: next(verdicts))
    with pytest.raises(SynthesisError, match=f"in format '{kind}'; choose another folder for format 'imagefolder'"):
        make(tmp_path, pipe, force=True)
    result = make(tmp_path, pipe, images_per_prompt=6, format=kind, shard_size=5, force=True)
    assert len(load_images(tmp_path, PIXELS)) == result.images == 30
    assert not list((tmp_path / ".kspec").rglob("*.png"))
    assert sum("rest" in path.name for path in tmp_path.glob("shard-00-*")) == 1
    make(tmp_path, pipe, images_per_prompt=6, format=kind, shard_size=5)
    assert len(load_images(tmp_path, PIXELS)) == 30


TEXTS = ["two\nlines", "tab\tand \x00 null", "\U0001f3a8 emoji", "\u202eright to left \u05d0", "q" * 10_000, '"a", b; <b>&']
TEXTS += ["../escape", "heart"]


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "parquet"])
def test_load_dataset_reads_every_format_also_with_odd_texts_and_missing_values(tmp_path, pipe, kind):
    import datasets

    prompts = [{"prompt": text, "score": None if k < 6 else 0.5, "id": k} for k, text in enumerate(TEXTS)]
    prompts[7] |= {"group": "g", "images": 2}
    out = tmp_path / "set"
    with pytest.warns(UserWarning, match=r"\d of 8 prompts are longer than the 16 tokens"):
        make(
            out,
            pipe,
            prompts,
            1,
            6,
            format=kind,
            shard_size=9 if kind == "webdataset" else 4,
            call={"num_inference_steps": 1},
        )
    assert not any("escape" in path.name or not path.name.isascii() for path in tmp_path.rglob("*"))
    files = None if kind == "imagefolder" else sorted(map(str, out.glob("shard-*")))
    loaded = datasets.load_dataset(
        kind, data_dir=str(out) if files is None else None, data_files=files, split="train", cache_dir=str(tmp_path / "c")
    )
    rows = loaded.to_list() if kind != "webdataset" else [row["json"] for row in loaded.select_columns("json").to_list()]
    rows.sort(key=lambda row: (row["id"], row["attempt"]))
    assert [row["prompt"] for row in rows] == [*TEXTS, TEXTS[7]]
    assert [row["score"] for row in rows] == [None] * 6 + [0.5] * 3
    assert [row["group"] for row in rows] == [None] * 7 + ["g"] * 2
    assert [row["nearest"] is None for row in rows] == [True] * 8 + [False]


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "parquet"])
def test_load_dataset_reads_a_folder_whose_first_shard_has_no_value_of_a_column(tmp_path, pipe, kind):
    import datasets

    prompts = [{"prompt": f"heart {k}", "score": None if k < 5 else 0.5, "note": None} for k in range(6)]
    make(tmp_path / "set", pipe, prompts, 1, 6, format=kind, shard_size=2, call={"num_inference_steps": 1})
    for streaming in (False, True):
        loaded = datasets.load_dataset(
            str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "c"), streaming=streaming
        )
        rows = [row["json"] if kind == "webdataset" else row for row in loaded]
        assert sorted((row["prompt"], row["score"], row["note"]) for row in rows) == [
            (f"heart {k}", None if k < 5 else 0.5, None) for k in range(6)
        ]


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_columns_that_do_not_fit_the_finished_images_are_refused(tmp_path, pipe, kind):
    settings = {"images_per_prompt": 1, "format": kind, "call": {"num_inference_steps": 1}}
    make(tmp_path, pipe, [{"prompt": "heart", "id": 1}], **settings)
    prompts = [{"prompt": "heart", "id": 1}, {"prompt": "runner", "id": 2}]
    with pytest.raises(SynthesisError, match=r"id: whole numbers before, now texts\).*give the columns as before"):
        make(tmp_path, pipe, [{**row, "id": "b7"} for row in prompts], **settings, force=True)
    assert make(tmp_path, pipe, [{"prompt": "heart", "id": 1}], **settings).made == 0  # nothing was begun
    if kind == "parquet":
        with pytest.raises(SynthesisError, match="licence: none before"):
            make(tmp_path, pipe, [{**row, "licence": "CC0"} for row in prompts], **settings, force=True)
    assert make(tmp_path, pipe, prompts, **settings, force=True).images == 2


def test_metadata_is_strict_json(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr("kspec_guidance.synthesis.worker.prompt_score", lambda *args: float("nan"))
    prompts = [{"prompt": "heart", "score": float("nan")}]
    make(tmp_path, pipe, prompts, 2, call={"num_inference_steps": 1})
    assert "NaN" not in (tmp_path / "metadata.jsonl").read_text()
    assert [(row["score"], row["vendi"]) for row in rows_of(tmp_path)] == [(None, None)] * 2
