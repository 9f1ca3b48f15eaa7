"""Pipeline subclasses that take a guide, the named classes, and the folders for ``custom_pipeline=``."""

import contextlib
import copy
import json
import pickle
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from packaging.version import Version

import kspec_guidance
from kspec_guidance import SPARKE, guided
from kspec_guidance import pipelines as P
from tests import tiny
from tests.emoji import sample_latents

CUSTOM = Path(__file__).parents[2] / "pipelines"
EMOJI = Path(kspec_guidance.__file__).parent / "demo" / "assets" / "emoji"
RECENT = Version(diffusers.__version__) >= Version("0.42")


def test_guided_classes_load_and_convert_as_their_parents_do(pipe):
    plain = sample_latents(pipe)
    cls = guided(diffusers.StableDiffusionPipeline)
    loaded = cls.from_pretrained(EMOJI).to(torch.float32)
    assert isinstance(loaded, cls)
    assert torch.equal(sample_latents(loaded), plain)
    assert not torch.equal(sample_latents(loaded, kspec_guidance=SPARKE()), plain)
    other = guided(diffusers.StableDiffusionImg2ImgPipeline).from_pipe(loaded)
    assert isinstance(other, diffusers.StableDiffusionImg2ImgPipeline)
    assert other.unet is loaded.unet
    assert type(other).__call__ is not diffusers.StableDiffusionImg2ImgPipeline.__call__


def test_automatic_classes_return_the_guided_form_of_what_they_find(pipe):
    auto = guided(diffusers.AutoPipelineForText2Image)
    loaded = auto.from_pretrained(EMOJI).to(torch.float32)
    assert type(loaded) is guided(diffusers.StableDiffusionPipeline)
    assert not torch.equal(sample_latents(loaded, kspec_guidance=SPARKE()), sample_latents(loaded))
    again = guided(diffusers.AutoPipelineForImage2Image).from_pipe(loaded)
    assert isinstance(again, diffusers.StableDiffusionImg2ImgPipeline)
    image = torch.zeros(1, 3, 64, 64)
    guide = SPARKE(scale=1.0, stop=1.0)
    out = again(
        "heart", image=image, num_images_per_prompt=2, num_inference_steps=6, output_type="np", kspec_guidance=guide
    )
    assert np.isfinite(out.images).all()
    assert guide.report().steps_guided > 0


def test_a_named_pipeline_keeps_a_guide_of_its_own(pipe, tmp_path):
    named = P.SPARKEStableDiffusionPipeline.from_pretrained(EMOJI).to(torch.float32)
    assert P.SPARKEStableDiffusionPipeline is type(named)
    plain = sample_latents(pipe)
    first = sample_latents(named)
    assert not torch.equal(first, plain)
    assert len(named.guide.memory) == 3
    assert torch.equal(sample_latents(named, kspec_guidance=None), plain)
    second = sample_latents(named)  # pushed away from the first call's images as well
    assert not torch.equal(second, first)
    assert len(named.guide.memory) == 6
    named.guide = SPARKE(0.0)
    assert torch.equal(sample_latents(named), plain)
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


@pytest.fixture
def custom_modules(monkeypatch, tmp_path):
    """An empty folder for the modules that diffusers copies; none of them is imported yet."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as users have it: stale bytecode would be found
    monkeypatch.delitem(sys.modules, "diffusers_modules.local.pipeline", raising=False)
    yield
    sys.modules.pop("diffusers_modules.local.pipeline", None)


def load_custom(folder, custom_pipeline):
    loaded = diffusers.DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(custom_pipeline), trust_remote_code=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded.to(torch.float32)


@pytest.mark.parametrize("family", P.FAMILIES)
def test_each_custom_pipeline_imports_one_class_under_the_common_name(family):
    lines = (CUSTOM / family / "pipeline.py").read_text().splitlines()
    assert lines[2] == f'For ``custom_pipeline="pipelines/{family}"``.'
    assert f"from kspec_guidance.pipelines import SPARKE{P.FAMILIES[family]} as GuidedPipeline" in lines
    assert len(lines) < 12


def test_there_is_a_folder_for_each_family_and_no_other():
    assert {path.parent.name for path in CUSTOM.glob("*/pipeline.py")} == set(P.FAMILIES)


def test_the_files_differ_in_size():
    """diffusers copies them to one path, and CPython identifies cached bytecode by path, size and modification second."""
    sizes = {family: (CUSTOM / family / "pipeline.py").stat().st_size for family in P.FAMILIES}
    assert len(set(sizes.values())) == len(sizes), f"give one of those of equal size another docstring: {sizes}"


def test_all_families_are_loaded_one_right_after_the_other(custom_modules):
    trust = {"trust_remote_code": True} if RECENT else {}
    families = [name for name, cls in P.FAMILIES.items() if hasattr(diffusers, cls)]
    for family in [*families, *reversed(families)]:
        found = get_class_from_dynamic_module(str(CUSTOM / family), "pipeline.py", **trust)
        assert found is getattr(P, f"SPARKE{P.FAMILIES[family]}")


def test_a_custom_pipeline_is_loaded_by_diffusers(pipe, custom_modules):
    folder = CUSTOM / "stable_diffusion"
    with pytest.raises(ValueError, match="trust_remote_code") if RECENT else contextlib.nullcontext():
        diffusers.DiffusionPipeline.from_pretrained(EMOJI, custom_pipeline=str(folder), trust_remote_code=False)
    plain = sample_latents(pipe)
    for path in (folder, folder / "pipeline.py"):
        loaded = load_custom(EMOJI, path)
        assert type(loaded) is P.SPARKEStableDiffusionPipeline
        assert not torch.equal(sample_latents(loaded), plain)
        assert len(loaded.guide.memory) == 3


@pytest.mark.parametrize("suffix", ["", "pipeline.py"], ids=["folder", "file"])
@pytest.mark.parametrize("families", [("stable_diffusion_xl", "flux"), ("flux", "stable_diffusion_xl")], ids="-".join)
def test_two_families_are_loaded_in_one_process(families, suffix, custom_modules, tmp_path):
    for family in families:
        tiny.build(P.FAMILIES[family]).save_pretrained(tmp_path / family)
    loaded = {family: load_custom(tmp_path / family, CUSTOM / family / suffix) for family in families}
    for family, pipe in loaded.items():
        assert type(pipe) is getattr(P, f"SPARKE{P.FAMILIES[family]}")
        again = pickle.loads(pickle.dumps(pipe))
        assert type(again) is type(pipe)
        for guided_pipe in (pipe, again):
            arguments = tiny.call_kwargs(guided_pipe) | {"output_type": "latent"}
            images = guided_pipe(**arguments).images
            assert guided_pipe.guide.report().steps_guided > 0
            assert len(guided_pipe.guide.memory) == len(images)


def test_guided_and_named_pipelines_are_pickled_and_copied_as_what_they_are(pipe):
    plain = sample_latents(pipe)
    for cls in (guided(diffusers.StableDiffusionPipeline), P.SPARKEStableDiffusionPipeline):
        made = cls(**pipe.components, requires_safety_checker=False)
        for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert type(again) is cls
            assert torch.equal(sample_latents(again, kspec_guidance=None), plain)
            assert not torch.equal(sample_latents(again, kspec_guidance=SPARKE()), plain)


def test_copies_and_pickles_of_an_attached_pipeline_are_plain(pipe):
    plain = sample_latents(pipe)
    with SPARKE(1.0).attach(pipe):
        copied = copy.deepcopy(pipe)
        again = pickle.loads(pickle.dumps(pipe))
        guided_ = sample_latents(pipe)
    assert again.scheduler.step.__self__ is again.scheduler
    assert torch.equal(sample_latents(again), plain)
    assert copied.scheduler.step.__self__ is copied.scheduler
    assert torch.equal(sample_latents(copied), plain)
    assert not torch.equal(guided_, plain)
    assert torch.equal(sample_latents(pipe), plain)
