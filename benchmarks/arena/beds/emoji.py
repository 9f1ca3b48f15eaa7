"""The embedded latent text-to-image pipeline of 1.0.0rc1 with classifier-free guidance, and a judge of its images."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.demo.judge import load_demo_judge
from kspec_guidance.loop.components import denoiser_of

from ..networks import emoji_pipeline
from ..stored import weights
from .base import Bed, Case, common_scores

# prompts that may describe several training images; chosen before any method was run, split at random
TUNE = ["runner", "cat face", "heart", "health worker", "clock face", "police officer", "bird", "teacher", "surfer", "book"]
REPORT = ["person", "firefighter", "swimmer", "farmer", "cook", "student", "flower", "building", "smiling face", "vehicle"]
# all other families of at least 20 training images, and as many subjects of as many images, drawn at random
FRESH = [
    "aircraft", "arrow", "bug", "clothing", "drink", "flag", "fruit", "keycap", "mammal", "musical instrument", "plant",
    "religious symbol", "sea animal", "sick face", "sport", "sweet", "tool", "vegetable", "worried face", "zodiac",
    "supervillain", "man", "rowboat", "man with turban", "bearded person", "haircut", "person bouncing ball", "pedestrian",
    "man in tuxedo", "information desk person", "office worker", "kneeling person", "person frowning", "factory worker",
    "standing person", "elf", "happy person raising one hand", "person lifting weights", "deaf person",
    "person in lotus position",
]  # fmt: skip


class Emoji(Bed):
    """``modes`` counts the training images that the judge assigns a batch to and that the prompt may describe.

    The fidelity of an image is the judge's probability of the likeliest training image that the prompt may describe:
    ``p(emoji) p(skin tone) p(art style)``; ``valid`` is its mean, so a wrong subject and an unclear image both count.
    ``on_data`` is the mean probability of the likeliest training image whatever the prompt, so only an unclear image
    counts; ``agreement`` is the share of images whose likeliest one is the prompt's.

    Args:
        steps: of the sampler.
        pipe: a pipeline of the same latents and prompts in place of that of 1.0.0rc1.
    """

    name = "emoji"
    images, steps, guidance_scale = 8, 8, 5.0

    def __init__(self, steps: int = 8, pipe: Any = None):
        self.steps = steps
        if steps != 8:
            self.name = f"emoji, {steps} steps"
        self.pipe = emoji_pipeline() if pipe is None else pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.judge_ = load_demo_judge()

    def prompts(self, half: str) -> list[str]:
        if half == "tune":
            return TUNE
        return FRESH if self.fresh else REPORT

    def shape(self) -> tuple[int, ...]:
        config = denoiser_of(self.pipe).config
        return config.in_channels, config.sample_size, config.sample_size

    def run(self, case: Case, n: int, latents: Tensor | None = None) -> Tensor:
        start = {"generator": self.noise(case, n)} if latents is None else {"latents": latents}
        return self.pipe(
            case.prompt, num_images_per_prompt=n, num_inference_steps=self.steps, guidance_scale=self.guidance_scale,
            output_type="latent", **start,
        ).images  # fmt: skip

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Images ``[n, 3, 64, 64]`` in -1..1."""
        return self.pipe.vae.decode(samples / self.pipe.vae.config.scaling_factor).sample.clamp(-1, 1)

    @torch.no_grad()
    def rows(self, samples: Tensor) -> Tensor:
        return self.judge_.network.features(self.decode(samples))

    def truth(self, prompt: str) -> Tensor:
        kept = weights("emoji_truth")
        return kept["rows"][self.judge_.described(prompt)[kept["modes"].long()]]

    @torch.no_grad()
    def figures(self, rows: Tensor, case: Case) -> dict[str, float]:
        joint = self.judge_.probabilities(rows)  # [n, training images]
        described = self.judge_.described(case.prompt)
        best, which = torch.where(described, joint, 0).max(1)
        agrees = described[joint.argmax(1)]
        return {
            "modes": float(len(set(which[agrees].tolist()))),
            "of": float(described.sum()),
            "valid": float(best.mean()),
            "on_data": float(joint.amax(1).mean()),
            "agreement": float(agrees.float().mean()),
            **common_scores(rows),
        }
