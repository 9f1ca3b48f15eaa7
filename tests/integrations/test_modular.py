import diffusers
import numpy as np
import pytest
import torch
from packaging.version import Version

from kspec_guidance import SPARKE, MMDGuidance
from kspec_guidance.integrations.modular import KernelGuidanceBlock, insert_guidance
from tests.tiny import making

RECENT = Version(diffusers.__version__) >= Version("0.42")


modular_interface = pytest.mark.skipif(not RECENT, reason="the modular interface is still moving; this one came with 0.42")


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
