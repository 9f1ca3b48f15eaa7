"""The embedded pipeline as the tests run it: few steps, seeded, latents out."""

import torch


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def draw(pipe, prompt="heart", n=3, steps=6, guide=None, **more):
    """Latents of ``n`` images for each prompt, with ``guide`` attached for the call."""
    count = n * (len(prompt) if isinstance(prompt, list) else 1)
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generators(count),
    }
    pipe.set_progress_bar_config(disable=True)
    if guide is None:
        return pipe(prompt, num_images_per_prompt=n, **(settings | more)).images
    with guide.attach(pipe):
        return pipe(prompt, num_images_per_prompt=n, **(settings | more)).images
