import contextlib
import copy
import json
import pickle
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from packaging.version import Version

import kspec_guidance
from kspec_guidance import SPARKE, guided
from kspec_guidance import pipelines as P
from tests.emoji import draw

ROOT = Path(__file__).parents[2]


RECENT = Version(diffusers.__version__) >= Version("0.42")


EMOJI = Path(kspec_guidance.__file__).parent / "demo" / "assets" / "emoji"


def test_guided_classes_load_and_convert_as_their_parents_do(pipe):
    plain = draw(pipe)
    cls = guided(diffusers.StableDiffusionPipeline)
    loaded = cls.from_pretrained(EMOJI).to(torch.float32)
    assert isinstance(loaded, cls)
    assert torch.equal(draw(loaded), plain)
    assert not torch.equal(draw(loaded, kspec_guidance=SPARKE()), plain)
    other = guided(diffusers.StableDiffusionImg2ImgPipeline).from_pipe(loaded)
    assert isinstance(other, diffusers.StableDiffusionImg2ImgPipeline)
    assert other.unet is loaded.unet
    assert type(other).__call__ is not diffusers.StableDiffusionImg2ImgPipeline.__call__


def test_automatic_classes_return_the_guided_form_of_what_they_find(pipe):
    auto = guided(diffusers.AutoPipelineForText2Image)
    loaded = auto.from_pretrained(EMOJI).to(torch.float32)
    assert type(loaded) is guided(diffusers.StableDiffusionPipeline)
    assert not torch.equal(draw(loaded, kspec_guidance=SPARKE()), draw(loaded))
    again = guided(diffusers.AutoPipelineForImage2Image).from_pipe(loaded)
    assert isinstance(again, diffusers.StableDiffusionImg2ImgPipeline)
    picture = torch.zeros(1, 3, 64, 64)
    guide = SPARKE(scale=1.0, stop=1.0)
    out = again(
        "heart", image=picture, num_images_per_prompt=2, num_inference_steps=6, output_type="np", kspec_guidance=guide
    )
    assert np.isfinite(out.images).all()
    assert guide.report().steps_guided > 0


def test_a_named_pipeline_keeps_a_guide_of_its_own(pipe, tmp_path):
    named = P.SPARKEStableDiffusionPipeline.from_pretrained(EMOJI).to(torch.float32)
    assert P.SPARKEStableDiffusionPipeline is type(named)
    plain = draw(pipe)
    first = draw(named)
    assert not torch.equal(first, plain)
    assert len(named.guide.memory) == 3
    assert torch.equal(draw(named, kspec_guidance=None), plain)
    second = draw(named)  # pushed away from the first call's images as well
    assert not torch.equal(second, first)
    assert len(named.guide.memory) == 6
    named.guide = SPARKE(0.0)
    assert torch.equal(draw(named), plain)
    with pytest.raises(TypeError, match="must be a guide"):
        named.guide = 0.3
    named.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    back = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(back) is diffusers.StableDiffusionPipeline


def test_named_pipelines_exist_for_every_class_and_no_other():
    for cls in P.FAMILIES.values():
        if hasattr(diffusers, cls):
            assert issubclass(getattr(P, f"SPARKE{cls}"), getattr(diffusers, cls))
    assert issubclass(P.SPARKEMochiPipeline, diffusers.MochiPipeline)
    with pytest.raises(AttributeError, match="no pipeline class 'NoSuchPipeline'"):
        P.SPARKENoSuchPipeline
    assert "SPARKEFluxPipeline" in dir(P)


@pytest.mark.parametrize("folder", P.FAMILIES)
def test_custom_pipelines_are_a_few_lines_on_the_factory(folder):
    source = (ROOT / "pipelines" / folder / "pipeline.py").read_text()
    assert len(source.splitlines()) < 10
    assert f'sparke_pipeline("{P.FAMILIES[folder]}"' in source


def test_a_custom_pipeline_is_loaded_by_diffusers(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = str(ROOT / "pipelines" / "stable_diffusion")
    with pytest.raises(ValueError, match="trust_remote_code") if RECENT else contextlib.nullcontext():
        diffusers.DiffusionPipeline.from_pretrained(EMOJI, custom_pipeline=folder, trust_remote_code=False)
    loaded = diffusers.DiffusionPipeline.from_pretrained(EMOJI, custom_pipeline=folder, trust_remote_code=True)
    loaded.to(torch.float32)
    assert type(loaded).__name__ == "SPARKEStableDiffusionPipeline"
    assert not torch.equal(draw(loaded), draw(pipe))
    assert len(loaded.guide.memory) == 3


def test_guided_and_named_pipelines_are_pickled_and_copied_as_what_they_are(pipe):
    plain = draw(pipe)
    for cls in (guided(diffusers.StableDiffusionPipeline), P.SPARKEStableDiffusionPipeline):
        made = cls(**pipe.components, requires_safety_checker=False)
        for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert type(again) is cls
            assert torch.equal(draw(again, kspec_guidance=None), plain)
            assert not torch.equal(draw(again, kspec_guidance=SPARKE()), plain)


def test_copies_and_pickles_of_an_attached_pipeline_are_plain(pipe):
    plain = draw(pipe)
    with SPARKE(1.0).attach(pipe):
        copied = copy.deepcopy(pipe)
        again = pickle.loads(pickle.dumps(pipe))
        guided_ = draw(pipe)
    assert again.scheduler.step.__self__ is again.scheduler
    assert torch.equal(draw(again), plain)
    assert copied.scheduler.step.__self__ is copied.scheduler
    assert torch.equal(draw(copied), plain)
    assert not torch.equal(guided_, plain)
    assert torch.equal(draw(pipe), plain)
