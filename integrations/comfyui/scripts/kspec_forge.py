"""The Diversity node as a script of Stable Diffusion WebUI Forge: link the folder above into ``extensions``."""

import sys
from pathlib import Path
from typing import Any

import gradio as gr
from modules import scripts

from kspec_guidance.integrations.denoised import MemoryBySize

sys.path.append(str(Path(__file__).resolve().parents[1]))
from guide_model import diverse

MEMORY = MemoryBySize()


class KSpecForge(scripts.Script):
    """Makes the images of a batch, and of earlier runs, differ."""

    def title(self) -> str:
        """The name of the panel."""
        return "Diversity (kspec)"

    def show(self, is_img2img: bool) -> Any:
        """Show the panel in all tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The panel."""
        with gr.Accordion(open=False, label=self.title()):
            enabled = gr.Checkbox(label="Enabled", value=False)
            variety = gr.Slider(label="Variety", minimum=0, maximum=100, step=1, value=50)
            remember = gr.Checkbox(label="Also differ from earlier images", value=False)
            gr.Button("Forget earlier images").click(MEMORY.clear)
        return [enabled, variety, remember]

    def process_before_every_sampling(
        self, p: Any, enabled: bool, variety: float, remember: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Guide the model of the sampling that begins; the high-resolution pass is another one."""
        if not enabled:
            return
        steps = getattr(p, "hr_second_pass_steps", 0) if getattr(p, "is_hr_pass", False) else 0
        sigmas = p.sampler.get_sigmas(p, steps or p.steps)
        objects, memory = p.sd_model.forge_objects, MEMORY if remember else None
        objects.unet = diverse(objects.unet, variety, seed=0, memory=memory, sigmas=sigmas)
        p.extra_generation_params.update({"kspec variety": variety, "kspec memory": remember})
