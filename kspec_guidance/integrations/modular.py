"""Guidance in modular pipelines: a block for the denoising loop.

This file relies on two facts of diffusers: blocks in a loop are called with ``(components, block_state, i=, t=)``, and
``inputs`` lists the arguments of a block.
"""

import copy
import json
from pathlib import Path
from typing import Any

from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.loop.prompts import PROMPT_INPUTS
from kspec_guidance.loop.starts import denoising_loops

__all__ = ["KernelGuidanceBlock", "insert_guidance"]

MODULE = '''"""A kernel guidance block with its settings, written by save_pretrained."""

import json

from kspec_guidance import KernelGuidance
from kspec_guidance.modular import KernelGuidanceBlock as Block

SETTINGS = json.loads({settings!r})


class KernelGuidanceBlock(Block):
    def __init__(self, guide=None):
        super().__init__(KernelGuidance.from_config(SETTINGS) if guide is None else guide)
'''


class KernelGuidanceBlock(ModularPipelineBlocks):
    """Guides every step of a modular denoising loop; its place is before the block that calls the scheduler.

    ``insert_guidance(blocks, guide)`` inserts it into the blocks of any modular pipeline. A call can use another guide:
    ``pipe(prompt=..., kspec_guidance=guide)``.

    Args:
        guide: SPARKE() by default.
    """

    model_name = None

    def __init__(self, guide: KernelGuidance | None = None):
        super().__init__()
        self.guide = SPARKE() if guide is None else guide

    def __deepcopy__(self, memo: dict[int, Any]) -> "KernelGuidanceBlock":
        # diffusers copies blocks when it builds a pipeline; the guide and its memory are shared, not copied
        made = type(self)(self.guide)
        memo[id(self)] = made
        return made

    @property
    def description(self) -> str:
        return "Adds a kernel guidance gradient to the predicted clean sample before the scheduler's step (kspec-guidance)"

    @property
    def inputs(self) -> list[Any]:
        return [
            InputParam(
                "kspec_guidance", type_hint=KernelGuidance, description="Guide for this call, instead of the block's."
            ),
            InputParam("prompt_embeds", type_hint=Tensor, description="Prompt embeddings from the text encoder's block."),
        ]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        guide = getattr(block_state, "kspec_guidance", None) or self.guide
        if not isinstance(guide, KernelGuidance):
            raise TypeError(f"kspec_guidance must be a guide such as SPARKE(), got {type(guide).__name__}")
        tensors = {name: getattr(block_state, name, None) for name in ("latents", *PROMPT_INPUTS)}
        guide.before_step(components, i, len(block_state.timesteps), tensors)
        return components, block_state

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the settings, and a module that imports this one and contains them; called by ``save_pretrained``.

        ``ModularPipelineBlocks.from_pretrained(folder, trust_remote_code=True)`` loads it.

        Raises:
            ValueError: for a guide with reference tensors, which a module cannot contain.
        """
        config, tensors = self.guide.to_config()
        if tensors:
            raise ValueError(
                "a guide with reference tensors cannot be saved inside a block; call guide.save_config(folder), and "
                "set it on the loaded block: block.guide = KernelGuidance.from_config(folder)"
            )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        name = type(self).__module__.rpartition(".")[2].replace("__dynamic__", "")
        Path(save_directory, f"{name}.py").write_text(MODULE.format(settings=json.dumps(config)), encoding="utf-8")


def insert_guidance(blocks: Any, guide: KernelGuidance | None = None) -> Any:
    """A copy of modular blocks with a :class:`KernelGuidanceBlock` in every denoising loop.

    ``insert_guidance(FluxAutoBlocks(), guide).init_pipeline(repo)`` is a guided pipeline. The given blocks are not changed.

    Args:
        blocks: such as ``FluxAutoBlocks()``, or ``pipe.blocks``.
        guide: SPARKE() by default; all loops share it.

    Raises:
        ValueError: if there is no denoising loop, or one whose steps are inside a block.
    """
    blocks = copy.deepcopy(blocks)
    found, loops = denoising_loops(blocks)
    if not loops:
        why = "takes its steps inside a block, where no other block can be inserted" if found else "has no denoising loop"
        raise ValueError(f"{type(blocks).__name__} {why}; use guide.attach(pipe), or a KernelGuider")
    guide = SPARKE() if guide is None else guide
    for loop in loops:
        names = list(loop.sub_blocks)
        place = next((k for k, name in enumerate(names) if name.startswith("after_denoiser")), len(names) - 1)
        loop.sub_blocks.insert("kernel_guidance", KernelGuidanceBlock(guide), place)
    return blocks
