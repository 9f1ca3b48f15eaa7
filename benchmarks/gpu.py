"""What guidance costs on a CUDA device: SD 1.5-, SDXL- and Flux-sized pipelines with random weights in bfloat16.

    python benchmarks/gpu.py             all rows, five minutes on an H100; writes results/gpu.json and docs/gpu.md
    python benchmarks/gpu.py SDXL        the rows of models whose name contains the word
    python benchmarks/gpu.py page        the table of docs/gpu.md from the results

Whole pipelines run from given prompt embeddings to latents. Plain and guided calls alternate; a row has the medians of
their times per step, the peak of allocated memory, and the number of calls that waited for the device, as CUDA reports it.
"""

import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from pages import fill, table

from kspec_guidance import SPARKE, MemoryBank, VendiGuidance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
STEPS, REPEATS, DTYPE = 8, 2, torch.bfloat16
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def random_model(cls: Any, **config: Any) -> Any:
    """A model with random weights, made on the device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("cuda"):
            torch.manual_seed(0)
            return cls(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def embeddings(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to("cuda", DTYPE)


def sd15() -> tuple[Any, dict[str, Any]]:
    unet = random_model(diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768)
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    vae = random_model(diffusers.AutoencoderKL, **VAE)
    pipe = diffusers.StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    arguments = {"prompt_embeds": embeddings(1, 77, 768), "negative_prompt_embeds": embeddings(1, 77, 768) * 0}
    return pipe, arguments | {"num_images_per_prompt": 4}


def sdxl() -> tuple[Any, dict[str, Any]]:
    unet = random_model(
        diffusers.UNet2DConditionModel,
        sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
        addition_embed_type="text_time", transformer_layers_per_block=(1, 2, 10), addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, use_linear_projection=True, **BLOCKS,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE)
    vae = random_model(diffusers.AutoencoderKL, **VAE)
    pipe = diffusers.StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler)
    prompt, pooled = embeddings(1, 77, 2048), embeddings(1, 1280)
    arguments = {
        "prompt_embeds": prompt, "negative_prompt_embeds": prompt * 0, "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": pooled * 0, "num_images_per_prompt": 2,
    }  # fmt: skip
    return pipe, arguments


def flux() -> tuple[Any, dict[str, Any]]:
    transformer = random_model(diffusers.FluxTransformer2DModel, guidance_embeds=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = random_model(diffusers.AutoencoderKL, latent_channels=16, **VAE)
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    arguments = {"prompt_embeds": embeddings(1, 512, 4096), "pooled_prompt_embeds": embeddings(1, 768)}
    return pipe, arguments | {"num_images_per_prompt": 1, "height": 1024, "width": 1024}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def compiled(pipe: Any) -> None:
    denoiser(pipe).compile_repeated_blocks(fullgraph=True)


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {"SD 1.5": sd15, "Flux": flux, "SDXL": sdxl}
GUIDES: dict[str, Callable[[], Any]] = {
    "SPARKE()": SPARKE,
    "SPARKE(), 1,000 rows in memory": lambda: SPARKE(memory=MemoryBank()),
    "VendiGuidance()": VendiGuidance,
    'SPARKE(space="pooled")': lambda: SPARKE(space="pooled"),
    'SPARKE(space="pixels")': lambda: SPARKE(space="pixels"),
}
ALL = tuple(GUIDES)
MODES: dict[str, tuple[Callable[[Any], None], dict[str, tuple[str, ...]]]] = {  # change, guides
    "on the device": (lambda pipe: None, {"SD 1.5": ALL, "Flux": ALL[:2], "SDXL": (*ALL[:2], ALL[-1])}),
    "compiled blocks": (compiled, {"SD 1.5": ALL[:1], "Flux": ALL[:1]}),
    "model offload": (lambda pipe: pipe.enable_model_cpu_offload(), {"SDXL": ALL[:1]}),
}


class Call:
    """One call of a pipeline, to latents: its seconds per step and its peak of allocated gigabytes."""

    def __init__(self, pipe: Any, arguments: dict[str, Any], guide: Any = None):
        generator = [torch.Generator().manual_seed(k) for k in range(arguments["num_images_per_prompt"])]
        settings = arguments | {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        with guide.attach(pipe) if guide is not None else nullcontext():
            self.latents = pipe(**settings).images
        torch.cuda.synchronize()
        self.seconds = (time.perf_counter() - began) / STEPS
        self.peak = torch.cuda.max_memory_allocated() / 1e9


def waits(pipe: Any, arguments: dict[str, Any], guide: Any = None) -> int:
    """How often a call waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            Call(pipe, arguments, guide)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def filled(name: str, pipe: Any, arguments: dict[str, Any]) -> Any:
    """A guide of this name that remembers one earlier call, and 1,000 random rows of its prompt if the name says so."""
    guide = GUIDES[name]()
    Call(pipe, arguments, guide)
    if "1,000 rows" in name:
        bank = guide.memory
        for _ in range(10):
            bank.add(torch.randn(100, *bank.shape, device="cuda"), bank.prompts[:1].to("cuda").expand(100, -1))
    guide.remember = False  # all repeats have the same memory
    return guide


def measure(pipe: Any, arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Plain and guided calls in turn."""
    guide = filled(name, pipe, arguments)
    Call(pipe, arguments)
    pairs = [(Call(pipe, arguments), Call(pipe, arguments, guide)) for _ in range(REPEATS)]
    plain, moved = pairs[-1]
    if not torch.isfinite(moved.latents).all() or torch.equal(moved.latents, plain.latents):
        raise RuntimeError("guidance gave no other finite latents")
    steps = guide.report().steps_guided
    base = statistics.median(p.seconds for p, _ in pairs)
    added = statistics.median(m.seconds - p.seconds for p, m in pairs)
    return {
        "images": len(moved.latents),
        "step_ms": base * 1e3,
        "added_ms": added * STEPS / steps * 1e3,
        "share": added / base,
        "peak_extra_gb": moved.peak - plain.peak,
        "reported_ms": guide.report().seconds / steps * 1e3,
        "waits_per_guided_step": (waits(pipe, arguments, guide) - waits(pipe, arguments)) / steps,
    }


def run(words: list[str]) -> dict[str, Any]:
    """All rows, written after each."""
    versions = {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__}
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "steps": STEPS} | versions | {"rows": []}
    for model, make in PIPELINES.items():
        if words and not any(word in model for word in words):
            continue
        for mode, (change, guides) in MODES.items():
            if model not in guides:
                continue
            pipe, arguments = make()
            pipe.set_progress_bar_config(disable=True)
            change(pipe)
            for name in guides[model]:
                row: dict[str, Any] = {"model": model, "mode": mode, "guide": name}
                try:
                    row |= measure(pipe, arguments, name)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                print(" | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
                record["rows"].append(row)
                RESULTS.write_text(json.dumps(record, indent=1) + "\n")
            del pipe
            gc.collect()
            torch.cuda.empty_cache()
    return record


def page(record: dict[str, Any]) -> None:
    """Write the table into docs/gpu.md."""
    cells = [
        [
            r["model"], r["mode"], f"`{r['guide'].partition(', ')[0]}`" + r["guide"].partition("()")[2], str(r["images"]),
            f"{r['step_ms']:.1f} ms", f"{r['added_ms']:.2f} ms", f"{r['share']:.1%}", f"{r['peak_extra_gb'] * 1e3:.0f} MB",
            f"{r['waits_per_guided_step']:.1f}",
        ]
        if "error" not in r
        else [r["model"], r["mode"], f"`{r['guide']}`", "", r["error"], "", "", "", ""]
        for r in record["rows"]
    ]  # fmt: skip
    head = "model, mode, guide, images, plain step, added to a guided step, share, extra memory, waits a guided step"
    versions = f"torch {record['torch']}, diffusers {record['diffusers']}"
    about = f"{record['device']}, {versions}, bfloat16, {record['steps']} steps:\n\n"
    fill(ROOT / "docs" / "gpu.md", {"gpu": about + table(head.split(", "), cells)})


def main() -> None:
    words = sys.argv[1:]
    if words == ["page"]:
        page(json.loads(RESULTS.read_text()))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing is measured")
    page(run(words))


if __name__ == "__main__":
    main()
