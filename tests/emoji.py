"""Seeded calls of the embedded pipeline with few steps."""

import torch


def generators(n, seed=0):
    """``n`` generators with consecutive seeds."""
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def sample_latents(pipe, prompt="heart", n=3, steps=6, guide=None, **kwargs):
    """Latents of ``n`` images per prompt, with ``guide`` attached during the call."""
    total = n * (len(prompt) if isinstance(prompt, list) else 1)
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generators(total),
    }
    pipe.set_progress_bar_config(disable=True)
    if guide is None:
        return pipe(prompt, num_images_per_prompt=n, **(settings | kwargs)).images
    with guide.attach(pipe):
        return pipe(prompt, num_images_per_prompt=n, **(settings | kwargs)).images
