import diffusers
import numpy as np
import pytest
import torch

from kspec_guidance import SPARKE, MMDGuidance
from kspec_guidance.integrations.modular import KernelGuidanceBlock, insert_guidance
from tests import tiny
from tests.tiny import requires_modular


def build_modular(name, blocks=None):
    pipe = tiny.build_modular(name) if blocks is None else None
    if pipe is None:
        pipe = blocks.init_pipeline()
        pipe.update_components(**{k: v for k, v in tiny.build(tiny.MODULAR[name]).components.items() if v is not None
                                  and k in {s.name for s in blocks.expected_components}})  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, **kwargs):
    state = pipe(**tiny.modular_call_kwargs(pipe), **kwargs)
    return np.asarray(state.get("images") if state.get("images") is not None else state.get("videos"))


@requires_modular
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
def test_guidance_block_guides_modular_pipeline(name, blocks):
    plain = generate(build_modular(name))
    guide = SPARKE(1.0, stop=1.0)
    pipe = build_modular(name, insert_guidance(getattr(diffusers, blocks)(), guide))
    moved = generate(pipe)
    assert np.isfinite(moved).all()
    assert not np.array_equal(moved, plain)
    assert len(guide.memory) == len(plain)
    assert guide.memory.prompts is not None
    assert "step" not in vars(pipe.scheduler)
    assert np.array_equal(generate(build_modular(name)), plain)  # the default blocks are unchanged
    idle = SPARKE(0.0)
    assert np.array_equal(generate(pipe, kspec_guidance=idle), plain)
    assert len(idle.memory) == len(plain)


@requires_modular
def test_attach_to_modular_pipeline():
    pipe = build_modular("FluxModularPipeline")
    plain = generate(pipe)
    guide = SPARKE(1.0)
    with guide.attach(pipe):
        moved = generate(pipe)
    assert not np.array_equal(moved, plain)
    assert guide.memory.prompts.shape == (4, 32)
    assert np.array_equal(generate(pipe), plain)


@requires_modular
@pytest.mark.parametrize("name", ["ZImageModularPipeline", "ErnieImageModularPipeline"])
def test_prompts_that_denoisers_take_by_other_names_are_read(name):
    pipe, attached, inserted = build_modular(name), SPARKE(0.0), SPARKE(0.0)
    call = tiny.modular_call_kwargs(pipe, prompt=["a red heart", "two green cats"], num_images_per_prompt=2)
    with attached.attach(pipe):
        pipe(**call)
    build_modular(name, insert_guidance(pipe.blocks, inserted))(**call | {"generator": torch.Generator().manual_seed(0)})
    for prompts in (attached.memory.prompts, inserted.memory.prompts):
        assert torch.equal(prompts[0], prompts[1])
        assert float(prompts[0] @ prompts[2]) < 1 - 1e-4


@requires_modular
def test_ease_cfg_needs_attach():
    name, guide = "StableDiffusionXLModularPipeline", SPARKE(0.5, ease_cfg=1.0)
    pipe = build_modular(name)
    with guide.attach(pipe):
        generate(pipe)
    assert guide.report().eased_cfg is not None
    pipe = build_modular(name, insert_guidance(diffusers.StableDiffusionXLAutoBlocks(), SPARKE(0.5, ease_cfg=1.0)))
    with pytest.raises(ValueError, match=r"with guide\.attach"):  # the block comes after the denoiser
        generate(pipe)


@requires_modular
def test_block_save_load_round_trip(tmp_path, monkeypatch):
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


@requires_modular
@pytest.mark.parametrize("name", ["HeliosModularPipeline", "WanAnimate2ModularPipeline", "EchoModularPipeline"])
def test_a_block_is_refused_where_steps_are_taken_inside_a_block(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with pytest.raises(ValueError, match=r"takes its steps inside a block, .* use guide.attach\(pipe\), or a KernelGuider"):
        insert_guidance(getattr(diffusers, name)().blocks)


@requires_modular
def test_modular_pipeline_remembers_the_positive_prompts():
    pipe, features = build_modular("QwenImageModularPipeline"), []
    for negative in ("dull", "an ugly green cat"):
        guide = SPARKE(0.0)
        with guide.attach(pipe):
            for _ in range(2):
                generate(pipe, negative_prompt=negative)
        features.append(guide.memory.prompts)
    assert all(torch.equal(found, features[0]) for found in features)
    assert torch.equal(features[0], features[0][:1].expand_as(features[0]))
