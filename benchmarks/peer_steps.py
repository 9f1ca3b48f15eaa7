"""Latents of the authors' code of SPARKE and of MMD guidance, step by step, for tests/guidance/test_published.py.

    python benchmarks/peer_steps.py --peers FOLDER

FOLDER holds git checkouts of mjalali/sparke-diffusers and matinamehdizadeh/MMD-Guidance. Their functions run unchanged, in
loops of this file with the schedulers of diffusers: their pipelines need CUDA, CLIP and checkpoints. CLIP is a table of
prompt features here, and the denoiser a fixed linear map. All goes to tests/data/published/*.safetensors, with the commits.
"""

import argparse
import ast
import logging
import subprocess
import sys
import types
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import save_file

DATA = Path(__file__).parents[1] / "tests" / "data" / "published"
SD21 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}
PROMPTS = [0, 0, 1, 0, 1, 2, 0, 1, 0, 0, 1, 0, 0, 3]  # of each image; the last is unrelated to all earlier ones
SHAPE, IMAGES, STEPS = (1, 4, 4, 4), 104, 6  # of latents; images and steps of MMD guidance


def commit(folder: Path) -> str:
    """The commit of a checkout."""
    return subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def inputs(seed: int, images: int) -> dict[str, torch.Tensor]:
    """The denoiser, which gives ``0.3 x W``, and the start noise of each image."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(64, 64, generator=g))[0]
    return {"weight": 0.3 * weight, "noise": torch.randn(images, *SHAPE, generator=g)}


def prompt_table() -> torch.Tensor:
    """Features ``[4, 8]`` of norm 1: cosines with the first are 1, 0.8, 0.3 and 0."""
    rows = torch.zeros(4, 8)
    rows[0, 0] = rows[3, 7] = 1
    rows[1, :2] = torch.tensor([0.8, 0.6])
    rows[2, 0], rows[2, 2] = 0.3, (1 - 0.3**2) ** 0.5
    return rows


def sparke(folder: Path) -> dict[str, torch.Tensor]:
    """Latents after each step, as in the script: 51 steps of DPM-Solver, one image at a time, guided at every 10th step."""
    table, clip = prompt_table(), types.ModuleType("clip")
    clip.tokenize = lambda prompts: torch.tensor([int(p) for p in prompts])
    sys.modules["clip"] = clip  # in place of OpenAI's package, which their module imports
    module = types.ModuleType("theirs")
    source = folder / "src" / "diffusers" / "pipelines" / "rke_guidance_utils.py"
    exec(compile(source.read_text(), str(source), "exec"), module.__dict__)
    logging.disable(logging.WARNING)
    sampler = module.RKEGuidedSampling(
        algorithm="cond-rke", kernel="gaussian", sigma_image=0.6, sigma_text=0.3, max_bank_size=4000
    )
    encoder = types.SimpleNamespace(encode_text=lambda tokens: table[tokens])
    data, scheduler, found = inputs(0, len(PROMPTS)), DPMSolverMultistepScheduler(**SD21), []
    for number, latents in zip(PROMPTS, data["noise"], strict=True):
        scheduler.set_timesteps(51)
        for i, t in enumerate(scheduler.timesteps):
            output = (latents.flatten(1) @ data["weight"]).view(SHAPE)
            if i % 10 == 0:
                grads, _, _ = sampler.cond_fn(
                    latents=latents, timestep=t, index=i, noise_pred=output, extra_step_kwargs={},
                    criteria_guidance_scale=0.03, prompt=str(number), clip_for_guidance=encoder, regularize=False,
                    regularize_weight=0.0, F_M=None, F_T=None, F_M_real=None, F_T_real=None, beta=0,
                )  # fmt: skip
                latents = latents + grads
            latents = scheduler.step(output, t, latents, return_dict=False)[0]
            found.append(latents)
    return {**data, "prompts": table[PROMPTS], "latents": torch.stack(found).view(len(PROMPTS), 51, *SHAPE)}


def mmd(folder: Path) -> dict[str, torch.Tensor]:
    """Latents after each step of a DDPM sampler, one image at a time, over more images than the memory keeps."""
    source = folder / "Unconditional_MMD" / "latent-diffusion" / "ldm" / "models" / "diffusion" / "ddpm.py"
    wanted = ("_flatten_feats", "compute_kid_grad_poly3", "get_F_M", "cond_fn")
    body = [n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.FunctionDef) and n.name in wanted]
    names: dict = {"torch": torch}
    exec(compile(ast.Module(body, []), str(source), "exec"), names)
    model = type("theirs", (), {name: names[name] for name in wanted})()
    data, scheduler = inputs(1, IMAGES), DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    reference = torch.randn(20, *SHAPE[1:], generator=torch.Generator().manual_seed(2)) + 0.5
    memory, found = None, []
    for number, latents in enumerate(data["noise"]):
        if memory is not None and len(memory) == 100:  # as in run() of their script
            memory = memory[-1].unsqueeze(0)
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(number)
        for i, t in enumerate(scheduler.timesteps):
            output = (latents.flatten(1) @ data["weight"]).view(SHAPE)
            latents = scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
            move, memory = model.cond_fn(latents, memory, reference, t, STEPS - 1 - i, criteria_guidance_scale=2e-3)
            latents = latents - move
            found.append(latents)
    return {**data, "reference": reference, "latents": torch.stack(found).view(IMAGES, STEPS, *SHAPE)}


def main() -> None:
    """Run both, and write the tensors with the commit of each checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    peers = parser.parse_args().peers
    DATA.mkdir(parents=True, exist_ok=True)
    for name, folder, make in (("sparke", "sparke-diffusers", sparke), ("mmd", "MMD-Guidance", mmd)):
        tensors = {k: v.contiguous() for k, v in make(peers / folder).items()}
        save_file(tensors, DATA / f"{name}.safetensors", {"commit": commit(peers / folder)})
        print(name, commit(peers / folder), {k: list(v.shape) for k, v in tensors.items()})


if __name__ == "__main__":
    main()
