"""Every way to a guide: subclasses, automatic classes, custom pipelines, modular blocks, saved settings."""

import contextlib
import copy
import json
import pickle
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from emoji import draw
from packaging.version import Version
from tiny import making

import kspec_guidance
from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, NoveltyGuidance, guided
from kspec_guidance import pipelines as P
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel, PolynomialKernel
from kspec_guidance.modular import KernelGuidanceBlock, insert_guidance
from kspec_guidance.objectives import RKE, Vendi
from kspec_guidance.spaces import Activations, Embedder, Pixels, Pooled

ROOT = Path(__file__).parents[1]
RECENT = Version(diffusers.__version__) >= Version("0.42")
modular_interface = pytest.mark.skipif(not RECENT, reason="the modular interface is still moving; this one came with 0.42")
EMOJI = Path(kspec_guidance.__file__).parent / "assets" / "emoji"


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


# -- modular pipelines -------------------------------------------------------------------------------------------------


def modular(name, blocks=None):
    made = making.build_modular(name) if blocks is None else None
    if made is None:
        made = blocks.init_pipeline()
        made.update_components(**{k: v for k, v in making.build(making.MODULAR[name]).components.items() if v is not None
                                  and k in {s.name for s in blocks.expected_components}})  # fmt: skip
        made.set_progress_bar_config(disable=True)
    return made


def images(pipe, **more):
    state = pipe(**making.call_modular(pipe), **more)
    return np.asarray(state.get("images") if state.get("images") is not None else state.get("videos"))


@modular_interface
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("FluxModularPipeline", "FluxAutoBlocks"),
        ("StableDiffusionXLModularPipeline", "StableDiffusionXLAutoBlocks"),
        ("QwenImageModularPipeline", "QwenImageAutoBlocks"),
        ("LTXModularPipeline", "LTXAutoBlocks"),
        ("WanModularPipeline", "WanBlocks"),
    ],
)
def test_a_block_in_the_loop_guides_modular_pipelines(name, blocks):
    plain = images(modular(name))
    guide = SPARKE(1.0, stop=1.0)
    pipe = modular(name, insert_guidance(getattr(diffusers, blocks)(), guide))
    moved = images(pipe)
    assert np.isfinite(moved).all()
    assert not np.array_equal(moved, plain)
    assert len(guide.memory) == len(plain)
    assert guide.memory.prompts is not None
    assert "step" not in vars(pipe.scheduler)
    assert np.array_equal(images(modular(name)), plain)  # the classes' own blocks are as they were
    idle = SPARKE(0.0)
    assert np.array_equal(images(pipe, kspec_guidance=idle), plain)
    assert len(idle.memory) == len(plain)


@modular_interface
def test_attach_works_on_modular_pipelines_too():
    pipe = modular("FluxModularPipeline")
    plain = images(pipe)
    guide = SPARKE(1.0)
    with guide.attach(pipe):
        moved = images(pipe)
    assert not np.array_equal(moved, plain)
    assert guide.memory.prompts.shape == (4, 32)
    assert np.array_equal(images(pipe), plain)


@modular_interface
def test_a_block_is_saved_and_loaded_as_modular_blocks_are(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "block"
    KernelGuidanceBlock(SPARKE(0.42, every=3)).save_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.ModularPipelineBlocks.from_pretrained(str(folder), trust_remote_code=False)
    loaded = diffusers.ModularPipelineBlocks.from_pretrained(str(folder), trust_remote_code=True)
    assert isinstance(loaded, KernelGuidanceBlock)
    assert (loaded.guide.terms[0].scale, loaded.guide.terms[0].every) == (0.42, 3)
    with pytest.raises(ValueError, match="cannot be saved inside a block"):
        KernelGuidanceBlock(MMDGuidance(torch.randn(4, 3))).save_pretrained(folder)
    with pytest.raises(ValueError, match="no denoising loop"):
        insert_guidance(KernelGuidanceBlock())


# -- settings ----------------------------------------------------------------------------------------------------------

REFERENCE = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
GUIDES = {
    "sparke": lambda: SPARKE(0.4, kernel=GaussianKernel(0.7), start=0.1, stop=0.5, every=2, seed=7),
    "product kernel": lambda: KernelGuidance(RKE(GaussianKernel(0.5)), 0.2, sigma_interval=(0.1, 5.0)),
    "pooled, random features": lambda: SPARKE(
        space=Pooled(2),
        features=RandomFourierFeatures(GaussianKernel(1.2), 12, 64, seed=3),
        prompt_features=RandomFourierFeatures(GaussianKernel(0.5), 4, 32),
    ),
    "mmd": lambda: MMDGuidance(REFERENCE, kernel=PolynomialKernel(), reference_prompts=torch.randn(5, 4)),
    "novelty": lambda: NoveltyGuidance(REFERENCE, 0.3),
    "vendi": lambda: KernelGuidance(Vendi(CosineKernel(), order=float("inf")), 0.2, space=Activations("mid_block")),
    "sum": lambda: SPARKE(0.3) + MMDGuidance(REFERENCE),
}


@pytest.mark.parametrize("name", GUIDES)
def test_saved_settings_make_the_same_guide(name, tmp_path, g):
    guide = GUIDES[name]()
    guide.save_config(tmp_path)
    again = KernelGuidance.from_config(tmp_path)
    assert type(again) is type(guide)
    assert (again.seed, len(again.terms)) == (guide.seed, len(guide.terms))
    for a, b in zip(guide.terms, again.terms, strict=True):
        for k in ("scale", "space", "start", "stop", "every", "sigma_interval", "chain"):
            assert getattr(a, k) == getattr(b, k)
    x, t = torch.randn(4, 3, 2, 2, generator=g), torch.randn(4, 4, generator=g)
    assert torch.equal(guide.gradient(x, t), again.gradient(x, t))
    assert not [f for f in tmp_path.iterdir() if f.suffix not in (".json", ".safetensors")]


def test_settings_that_are_none_are_refused_with_what_was_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"guide.save_config\(folder\) writes them"):
        KernelGuidance.from_config(tmp_path)
    (tmp_path / "kspec_guidance.json").write_text("{oops")
    with pytest.raises(ValueError, match="no JSON"):
        KernelGuidance.from_config(tmp_path)
    with pytest.raises(ValueError, match="format None"):
        KernelGuidance.from_config({})
    config, _ = SPARKE().to_config()
    config["terms"][0]["objective"]["objective"] = "os.system"
    with pytest.raises(ValueError, match=r"unknown objective 'os.system'"):
        KernelGuidance.from_config(config)

    class Mine(Kernel):
        def vjp(self, x, y, weight):
            return x

    with pytest.raises(TypeError, match="Mine cannot be saved"):
        KernelGuidance(RKE(Mine())).save_config(tmp_path)
    for space in (Embedder(embedder=torch.nn.Flatten()), Pixels(vae=torch.nn.Flatten())):  # networks are not settings
        with pytest.raises(TypeError, match="cannot be saved as settings; build it in code"):
            SPARKE(space=space).save_config(tmp_path)
    shutil.rmtree(tmp_path)


# -- copies ------------------------------------------------------------------------------------------------------------


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
