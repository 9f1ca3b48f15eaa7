"""The example scripts: by their command line on the embedded pipeline, and on tiny models of other classes."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from kspec_guidance import SPARKE
from tests import tiny
from tests.processes import launch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))


def test_plain_and_guided_images_by_the_script(tmp_path):
    import text_to_image

    text_to_image.main(["heart", "runner", "--images-per-prompt", "3", "--steps", "4", "--out", str(tmp_path)])
    assert (tmp_path / "grid.png").stat().st_size > 5000
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"heart", "runner"}


def test_toward_a_folder_of_images_by_the_script(tmp_path):
    import text_to_image

    (tmp_path / "reference").mkdir()
    for k in range(6):
        Image.new("RGB", (70, 64), (40 * k, 200, 90)).save(tmp_path / "reference" / f"{k}.png")
    arguments = [
        "heart",
        "cat face",
        "--images-per-prompt",
        "3",
        "--steps",
        "4",
        "--reference",
        str(tmp_path / "reference"),
        "--out",
    ]
    text_to_image.main([*arguments, str(tmp_path / "toward")])
    reports = json.loads((tmp_path / "toward" / "scores.json").read_text())
    assert all(report["steps_guided"] for report in reports.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline",
     "QwenImagePipeline"],
)  # fmt: skip
def test_all_classes_of_the_recipes_run_with_tiny_weights(name):

    pipe = tiny.build(name)
    pipe.set_progress_bar_config(disable=True)
    arguments = tiny.call_kwargs(pipe)
    prompt = arguments.pop("prompt", "a dog")
    for key in ("generator", "num_images_per_prompt"):
        arguments.pop(key, None)
    call = arguments | {"num_inference_steps": 4, "output_type": "latent"}
    prompt = prompt[0] if isinstance(prompt, list) else prompt
    guide = SPARKE.preset("few-step")
    found = guide.compare(pipe, prompt, num_images_per_prompt=2, **call)
    assert found.report.steps_guided >= 2
    assert not all(bool((a == b).all()) for a, b in zip(found.plain, found.guided, strict=True))
    assert len(guide.memory) == 2


@pytest.mark.slow
def test_clips_differ_from_earlier_ones_of_the_same_seed():
    import video

    from kspec_guidance import MemoryBank

    pipe = tiny.build("WanPipeline")
    pipe.set_progress_bar_config(disable=True)
    arguments = tiny.call_kwargs(pipe)
    for key in ("generator", "prompt", "negative_prompt"):
        arguments.pop(key, None)
    memory = MemoryBank()
    call = arguments | {"num_inference_steps": 4, "output_type": "latent"}
    clips = video.generate_clips(pipe, "a dog", [0, 0, 0], memory, 1.0, call)
    assert len(memory) == 3
    assert not bool((clips[0] == clips[1]).all())  # of the same seed


@pytest.mark.slow
def test_many_processes_by_accelerate_launch(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("heart\nrunner\nflag\ncat face\n")
    command = ["accelerate", "launch", "--num_processes", "2", "--cpu"]
    command += [str(ROOT / "examples" / "many_gpus.py"), "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--images-per-prompt", "2", "--batch-size", "2", "--steps", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launch(command)
    assert len((tmp_path / "out" / "metadata.jsonl").read_text().splitlines()) == 8


def test_prompts_of_a_hub_dataset(tmp_path, monkeypatch):
    import argparse

    import many_gpus

    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b ", "a", "", "c", "d"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: rows)
    arguments = argparse.Namespace(prompts=None, dataset="x", config=None, split="train", column="text", max_prompts=4)
    assert many_gpus.read_prompts(arguments) == ["a", "b", "c"]


@pytest.mark.slow
def test_the_downstream_experiment_at_a_small_scale(tmp_path, monkeypatch):
    import downstream
    import torch

    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(downstream, "CLASSES", ["heart", "runner"])
    monkeypatch.setattr(
        downstream, "load_drawings", lambda folder: (torch.rand(6, 3, 64, 64, generator=g), torch.tensor([0, 1] * 3))
    )
    arguments = ["--images-per-class", "4", "--batch-size", "4", "--inference-steps", "3", "--trainings", "1"]
    downstream.main([*arguments, "--training-steps", "5", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "downstream.json").read_text())
    assert list(results) == ["plain", "SPARKE", "SPARKE, order 0.5"]
    assert all(0 <= a <= 1 for accuracies in results.values() for a in accuracies)
