"""The emoji bed with a transformer and flow matching: Stable Diffusion 3's own classes, in small."""

from typing import ClassVar

from torch import Tensor

from kspec_guidance.demo.judge import load_demo_judge

from ..networks import emoji_transformer, emoji_transformer_pipeline
from ..stored import weights
from .base import Case
from .emoji import Emoji


class EmojiTransformer(Emoji):
    """Prompts, latents and judge of the emoji bed; made by ``examples/train_emoji/train_transformer.py``.

    Args:
        steps: of the sampler.
    """

    name = "emoji, transformer"
    steps, guidance_scale = 8, 4.0
    model: ClassVar[str] = "emoji_transformer"
    has = Emoji.has | {"blocks"}

    def __init__(self, steps: int | None = None):
        if steps is not None and steps != self.steps:
            self.steps, self.name = steps, f"{self.name}, {steps} steps"
        transformer = emoji_transformer()
        transformer.load_state_dict(weights(self.model))
        self.pipe = emoji_transformer_pipeline(transformer.eval())
        self.judge_ = load_demo_judge()

    def run(self, case: Case, n: int, latents: Tensor | None = None) -> Tensor:
        start = {"generator": self.noise(case, n)} if latents is None else {"latents": latents}
        # evenly spaced down to 0: the scheduler's own levels end with one of nearly no noise, a step for nothing
        levels = [1 - k / self.steps for k in range(self.steps)]
        return self.pipe(
            case.prompt, num_images_per_prompt=n, sigmas=levels, num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale, max_sequence_length=0, output_type="latent", **start,
        ).images  # fmt: skip


class DistilledEmojiTransformer(EmojiTransformer):
    """The same, distilled to four steps without classifier-free guidance."""

    name = "emoji, transformer, distilled"
    steps, guidance_scale = 4, 1.0
    model = "emoji_transformer_distilled"
    has = EmojiTransformer.has - {"guidance"}
