import os
import sys

import pytest

from kspec_guidance.synthesis import FolderError, SynthesisError
from kspec_guidance.synthesis.adapters import curator_stage, set_builder
from tests.synthesis.small_runs import make
from tests.synthesis.small_workers import without_model


@pytest.fixture
def fast(monkeypatch):
    without_model(monkeypatch)


@pytest.mark.usefixtures("fast")
def test_a_builder_reads_a_set_with_the_type_of_each_column(tmp_path, pipe):
    pytest.importorskip("datasets")
    out = tmp_path / "set"
    make(out, pipe, prompts=["heart", "runner"], images_per_prompt=2)
    builder = set_builder(out, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    found = builder.as_dataset(split="train")
    assert len(found) == 4
    assert found.features["licence"].dtype == "string"  # although no image has one
    assert found[0]["image"].size == (4, 4)
    assert [row["prompt"] for row in found] == ["heart", "heart", "runner", "runner"]
    (out / found[0]["file_name"]).write_bytes(b"other")
    with pytest.raises(Exception, match="occurred") as error:
        set_builder(out, cache_dir=str(tmp_path / "other")).download_and_prepare()
    assert "is not the image" in str(error.value.__cause__)
    with pytest.raises(FolderError, match="no finished folder of images"):
        set_builder(tmp_path)


@pytest.mark.usefixtures("fast")
def test_a_stage_of_nemo_curator_makes_images_of_each_batch_of_prompts(tmp_path):
    if "KSPEC_NEMO" in os.environ:  # a folder with NeMo Curator that is installed beside
        sys.path.append(os.environ["KSPEC_NEMO"])
    tasks = pytest.importorskip("nemo_curator.tasks.document")
    import pandas as pd

    stage = curator_stage(tmp_path, images_per_prompt=2, batch_size=2, call={"num_inference_steps": 1}, licence="MIT")
    batch = tasks.DocumentBatch(dataset_name="mine", data=pd.DataFrame({"prompt": ["heart", "runner"], "n": [1, 2]}))
    assert stage.validate_input(batch)
    made = stage.process(batch)
    assert (made.dataset_name, len(made.data)) == ("mine", 4)
    assert all(os.path.isfile(one.image_path) and one.metadata["licence"] == "MIT" for one in made.data)
    again = stage.process(batch)
    assert [one.image_id for one in again.data] == [one.image_id for one in made.data]
    assert len(list(tmp_path.iterdir())) == 1


def test_nemo_curator_is_named_if_it_is_missing(tmp_path, monkeypatch):
    from kspec_guidance.synthesis import adapters

    monkeypatch.setitem(sys.modules, "nemo_curator.stages.base", None)
    adapters._stage_class.cache_clear()
    with pytest.raises(SynthesisError, match="pip install nemo-curator"):
        curator_stage(tmp_path)
