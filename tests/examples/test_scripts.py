"""The scripts people copy: on the embedded pipeline by their own command line, and on tiny models of each class."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kspec_guidance import SPARKE
from tests import tiny

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))


def test_plain_and_guided_images_by_the_script(tmp_path):
    import text_to_image

    text_to_image.main(["heart", "runner", "--images", "3", "--steps", "4", "--out", str(tmp_path)])
    assert (tmp_path / "grid.png").stat().st_size > 5000
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"heart", "runner"}


def test_toward_a_folder_of_pictures_by_the_script(tmp_path):
    import text_to_image

    (tmp_path / "few").mkdir()
    for k in range(6):
        Image.new("RGB", (70, 64), (40 * k, 200, 90)).save(tmp_path / "few" / f"{k}.png")
    line = ["heart", "cat face", "--images", "3", "--steps", "4", "--reference", str(tmp_path / "few"), "--out"]
    text_to_image.main([*line, str(tmp_path / "toward")])
    said = json.loads((tmp_path / "toward" / "scores.json").read_text())
    assert all(report["steps_guided"] for report in said.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline",
     "QwenImagePipeline"],
)  # fmt: skip
def test_every_class_of_the_recipes_runs_from_tiny_weights(name):
    import text_to_image

    pipe = tiny.build(name)
    pipe.set_progress_bar_config(disable=True)
    said = tiny.call(pipe)
    prompt = said.pop("prompt", "a dog")
    for key in ("generator", "num_images_per_prompt", "output_type", "num_inference_steps"):
        said.pop(key, None)
    call = {**said, "num_inference_steps": 4, "output_type": "latent"}
    prompt = prompt[0] if isinstance(prompt, list) else prompt
    guide = SPARKE.preset("few-step")
    plain = text_to_image.generate(pipe, [prompt], 2, 0, None, call)
    guided = text_to_image.generate(pipe, [prompt], 2, 0, guide, call)
    assert guide.report().steps_guided >= 2
    assert not all(bool((a == b).all()) for a, b in zip(plain[0], guided[0], strict=True))
    assert len(guide.memory) == 2


@pytest.mark.slow
def test_clips_keep_away_from_earlier_ones():
    import video

    from kspec_guidance import MemoryBank

    pipe = tiny.build("WanPipeline")
    pipe.set_progress_bar_config(disable=True)
    said = tiny.call(pipe)
    prompt = "a dog"
    for key in ("generator", "prompt", "negative_prompt"):
        said.pop(key, None)
    memory = MemoryBank()
    made = video.clips(pipe, prompt, [0, 0, 0], memory, 1.0, {**said, "num_inference_steps": 4, "output_type": "latent"})
    assert len(memory) == 3
    assert not bool((made[0] == made[1]).all())  # the same seed, another clip


@pytest.mark.slow
def test_many_processes_by_accelerate_launch(tmp_path):
    (tmp_path / "prompts.txt").write_text("heart\nrunner\nflag\ncat face\n")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    line += [str(ROOT / "examples" / "many_gpus.py"), "--prompts", str(tmp_path / "prompts.txt")]
    line += ["--images", "2", "--batch", "2", "--steps", "3", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "out" / "metadata.jsonl").read_text().splitlines()) == 8


def test_prompts_of_a_hub_dataset(tmp_path, monkeypatch):
    import argparse

    import many_gpus

    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b ", "a", "", "c", "d"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: rows)
    given = argparse.Namespace(prompts=None, dataset="x", config=None, split="train", column="text", most=4)
    assert many_gpus.read(given) == ["a", "b", "c"]


@pytest.mark.slow
def test_the_downstream_experiment_in_small(tmp_path, monkeypatch):
    import downstream
    import torch

    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(downstream, "CLASSES", ["heart", "runner"])
    monkeypatch.setattr(
        downstream, "truth", lambda folder: (torch.rand(6, 3, 64, 64, generator=g), torch.tensor([0, 1] * 3))
    )
    downstream.main(["--images", "4", "--batch", "4", "--inference-steps", "3", "--trainings", "1", "--training-steps", "5",
                     "--out", str(tmp_path)])  # fmt: skip
    found = json.loads((tmp_path / "downstream.json").read_text())
    assert list(found) == ["plain", "SPARKE", "SPARKE, order 0.5"]
    assert all(0 <= a <= 1 for accuracies in found.values() for a in accuracies)
