"""Images by kind, and trackers of experiments."""

import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.evaluation.exports import copy_by_kind, tracker
from kspec_guidance.evaluation.image_sets import SourceError, load_images
from kspec_guidance.evaluation.sets import evaluate_set

PIXELS = ImageEmbedder(lambda x: torch.nn.functional.avg_pool2d(x, 8).flatten(1), 16, "pixels", fit="squash")


def test_images_are_copied_by_kind(tmp_path):
    source = tmp_path / "set"
    (source / "sub").mkdir(parents=True)
    for name, colour in (("0.png", "red"), ("sub/1.png", "red"), ("2.png", "blue"), ("sub/3.png", "lime")):
        Image.new("RGB", (16, 16), colour).save(source / name)
    result = evaluate_set(load_images(source, PIXELS), PIXELS)
    folder = copy_by_kind(result, tmp_path / "kinds")
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert found == [
        "kind-001-2-images/0.png",
        "kind-001-2-images/sub/1.png",
        "single-images/2.png",
        "single-images/sub/3.png",
    ]
    with pytest.raises(SourceError, match="not an empty folder"):
        copy_by_kind(result, folder)
    (source / "2.png").unlink()
    with pytest.raises(SourceError, match=r"has no file 2\.png"):
        copy_by_kind(result, tmp_path / "again")


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_figures_are_logged_as_one_run(monkeypatch, kind):
    calls = []
    stub = SimpleNamespace(
        init=lambda **kwargs: calls.append(kwargs), log=calls.append, finish=lambda: calls.append("finished")
    )
    monkeypatch.setitem(sys.modules, kind, stub)
    tracker(f"{kind}:varied")({"different": 3.5}, "set")
    assert calls == [{"project": "varied", "name": "set"}, {"different": 3.5}, "finished"]


def test_trackers_that_cannot_be_used_are_named(monkeypatch):
    for target in ("mlflow:x", "wandb", "wandb:"):
        with pytest.raises(ValueError, match="give one of trackio:PROJECT"):
            tracker(target)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        tracker("wandb:x")
