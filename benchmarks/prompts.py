"""Which prompts repel each other: the squared prompt kernel on the embedded pipeline.

python benchmarks/prompts.py
"""

import torch

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel

PROMPTS = ["heart", "red heart", "runner", "runner, dark skin tone", "man", "health worker", "cat face", "dog face", "flag"]


def main() -> None:
    pipe, guide = load_demo_pipeline(), SPARKE(0.0)
    pipe.set_progress_bar_config(disable=True)
    with guide.attach(pipe), torch.no_grad():
        pipe(PROMPTS, num_inference_steps=1, output_type="latent")
    weights = GaussianKernel(PROMPT_BANDWIDTH)(guide.memory.prompts).square()
    for name, row in zip(PROMPTS, weights.tolist(), strict=True):
        print(f"{name:24}" + "".join(f"{w:6.2f}" for w in row))


if __name__ == "__main__":
    main()
