import json

import numpy as np
import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.synthesis import SettingsChangedError
from kspec_guidance.synthesis.settings import as_json, differences
from tests.synthesis.small_runs import CALL, make, rows_of
from tests.synthesis.small_workers import without_model


def test_changed_settings_are_listed_and_refused_and_force_continues(tmp_path, pipe):
    make(tmp_path, pipe, ["heart", "man"], images_per_prompt=3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}
    with pytest.raises(SettingsChangedError) as error:
        make(tmp_path, pipe, ["heart", "man"], guide=SPARKE(0.3), call={**CALL, "num_inference_steps": 4})
    message = str(error.value)
    changed = (
        "images_per_prompt: 3 before, now 5",
        "num_inference_steps: 2 before, now 4",
        "terms[0].scale: 1.25 before, now 0.3",
    )
    for text in ("6 images", *changed, "--force"):
        assert text in message
    prompts = ["man", "runner", "heart"]
    result = make(tmp_path, pipe, prompts, guide=SPARKE(0.3), force=True)
    assert (result.images, result.made) == (15, 9)
    rows = rows_of(tmp_path)
    assert len({r["file_name"] for r in rows}) == 15
    assert [sum(r["prompt"] == p for r in rows) for p in prompts] == [5, 5, 5]
    assert all(p.read_bytes() == data for p, data in before.items())
    assert {(r["variety"], r["scale"]) for r in rows} == {(50.0, None), (None, 0.3)}
    assert make(tmp_path, pipe, prompts, guide=SPARKE(0.3)).made == 0


def test_another_lora_of_the_same_shapes_is_another_setting(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    without_model(monkeypatch)

    def adapted(seed, strength=1.0):
        pipe = load_demo_pipeline()
        torch.manual_seed(seed)
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
        pipe.unet.set_adapters("style", strength)
        return pipe

    make(tmp_path, adapted(1), ["heart"], images_per_prompt=1)
    for other in (adapted(2), adapted(1, 0.5)):
        with pytest.raises(SettingsChangedError, match=r"pipeline\.adapters\.unet: \S+ before, now \S+"):
            make(tmp_path, other, ["heart"], images_per_prompt=2)
    with pytest.raises(SettingsChangedError, match=r"pipeline\.adapters: .* before, now none"):
        make(tmp_path, load_demo_pipeline(), ["heart"], images_per_prompt=2)
    assert make(tmp_path, adapted(1), ["heart"], images_per_prompt=1).made == 0


def test_weights_with_a_merged_lora_are_another_setting(tmp_path, monkeypatch):
    """A small change, to which the fingerprint is blind; runs of earlier versions have no digest."""
    without_model(monkeypatch)
    make(tmp_path, load_demo_pipeline(), ["heart"], images_per_prompt=1)
    merged = load_demo_pipeline()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, w in merged.unet.named_parameters():
            if "to_q" in name:
                w += 1e-3 * torch.randn(len(w), 2) @ torch.randn(2, w.shape[1])
    with pytest.raises(SettingsChangedError, match=r"merged into them \(fuse_lora\): \S+ before, now \S+"):
        make(tmp_path, merged, ["heart"], images_per_prompt=1)
    compiled = load_demo_pipeline()
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    assert make(tmp_path, compiled, ["heart"], images_per_prompt=1).made == 0
    [path] = tmp_path.glob(".kspec/*/settings.json")
    settings = json.loads(path.read_text())
    assert len(settings["pipeline"].pop("weights")) == 12
    path.write_text(json.dumps(settings))
    assert make(tmp_path, load_demo_pipeline(), ["heart"], images_per_prompt=1).made == 0


def test_after_a_change_of_space_or_embedder_old_images_count_and_their_tensors_are_left_out(tmp_path, pipe):
    make(tmp_path, pipe, ["heart", "man"], images_per_prompt=3)
    result = make(tmp_path, pipe, ["heart", "man"], guide=SPARKE(space="pooled"), force=True)
    assert (result.images, result.made) == (10, 4)
    settings = {"images_per_prompt": 9, "embedder": ImageEmbedder(torch.nn.Flatten(), 8, "pixels"), "duplicates": 1.0}
    result = make(tmp_path, pipe, ["heart", "man"], force=True, **settings)
    assert (result.images, result.made) == (18, 8)
    assert len({row["file_name"] for row in rows_of(tmp_path)}) == 18
    assert make(tmp_path, pipe, ["heart", "man"], **settings).made == 0


def test_differences_name_the_setting_also_inside_of_lists():
    old = {"processes": 1, "memory": ["auto", "all", 0], "guide": {"terms": [{"scale": 1.0, "start": 0.0}]}}
    new = {"processes": 2, "memory": ["auto", "group", 0], "guide": {"terms": [{"scale": 0.5, "start": 0.0}]}}
    assert differences(old, new) == [
        "guide.terms[0].scale: 1.0 before, now 0.5",
        "memory_by: all before, now group",
        "number of processes: 1 before, now 2",
    ]


def test_settings_without_a_form_in_json_are_the_same_in_each_run():
    def value(fill):
        return {
            "image": Image.new("RGB", (4, 4), fill), "tensor": torch.full((2,), float(len(fill))), "number": np.float32(2),
            "callback": lambda: None, "steps": (1, 2), "nan": float("nan"), "dtype": torch.float16,
        }  # fmt: skip

    one, same, other = as_json(value("red")), as_json(value("red")), as_json(value("green"))
    assert one == same == json.loads(json.dumps(one, allow_nan=False))
    assert (one["image"] != other["image"], one["tensor"] != other["tensor"]) == (True, True)
    assert (one["number"], one["steps"], one["dtype"]) == (2.0, [1, 2], "torch.float16")


def test_a_folder_without_images_takes_other_settings(tmp_path, pipe):
    assert make(tmp_path, pipe, ["heart"], 0).images == 0
    assert make(tmp_path, pipe, ["heart"], 2, format="parquet").images == 2
