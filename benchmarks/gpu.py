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
from pathlib import Path
from typing import Any

import diffusers
import torch
from pages import fill, table

from kspec_guidance import SPARKE, MemoryBank, VendiGuidance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
STEPS, REPEATS, DTYPE = 8, 3, torch.bfloat16
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
        "negative_pooled_prompt_embeds": pooled * 0, "num_images_per_prompt": 4,
    }  # fmt: skip
    return pipe, arguments


def flux() -> tuple[Any, dict[str, Any]]:
    transformer = random_model(diffusers.FluxTransformer2DModel, guidance_embeds=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = random_model(diffusers.AutoencoderKL, latent_channels=16, **VAE)
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    arguments = {"prompt_embeds": embeddings(1, 512, 4096), "pooled_prompt_embeds": embeddings(1, 768)}
    return pipe, arguments | {"num_images_per_prompt": 2, "height": 1024, "width": 1024}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "transformer", None) or pipe.unet


def compiled(pipe: Any) -> None:
    denoiser(pipe).compile_repeated_blocks(fullgraph=True)


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {"SD 1.5": sd15, "SDXL": sdxl, "Flux": flux}
GUIDES: dict[str, Callable[[], Any]] = {
    "SPARKE()": SPARKE,
    "SPARKE(), 1,000 rows in memory": lambda: SPARKE(memory=MemoryBank()),
    "VendiGuidance()": VendiGuidance,
    'SPARKE(space="pooled")': lambda: SPARKE(space="pooled"),
    'SPARKE(space="pixels")': lambda: SPARKE(space="pixels"),
}
MODES: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {  # changes of the pipeline, and the guides to run
    "on the device": (lambda pipe: None, tuple(GUIDES)),
    "model offload": (lambda pipe: pipe.enable_model_cpu_offload(), ("SPARKE()", 'SPARKE(space="pixels")')),
    "compiled blocks": (compiled, ("SPARKE()",)),
}


def calls(pipe: Any, arguments: dict[str, Any], guide: Any) -> tuple[torch.Tensor, float]:
    """Latents of one call and its seconds per step."""
    generator = [torch.Generator().manual_seed(k) for k in range(arguments["num_images_per_prompt"])]
    settings = arguments | {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
    torch.cuda.synchronize()
    began = time.perf_counter()
    if guide is None:
        latents = pipe(**settings).images
    else:
        with guide.attach(pipe):
            latents = pipe(**settings).images
    torch.cuda.synchronize()
    return latents, (time.perf_counter() - began) / STEPS


def waits(f: Callable[[], object]) -> int:
    """Calls that waited for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            f()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def peak(f: Callable[[], object]) -> float:
    """Peak of allocated gigabytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    f()
    return torch.cuda.max_memory_allocated() / 1e9


def fill_memory(guide: Any, pipe: Any, arguments: dict[str, Any]) -> None:
    """Add 1,000 random rows of the prompt, in the shape and with the encoder of a call."""
    calls(pipe, arguments, guide)
    bank = guide.memory
    for _ in range(10):
        bank.add(torch.randn(100, *bank.shape, device="cuda"), bank.prompts[:1].to("cuda").expand(100, -1))


def measure(model: str, mode: str, pipe: Any, arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Plain and guided calls in turn."""
    guide = GUIDES[name]()
    if "1,000 rows" in name:
        fill_memory(guide, pipe, arguments)
    guide.remember = False  # all repeats have the same memory
    plain, moved = [], []
    calls(pipe, arguments, guide)
    for _ in range(REPEATS):
        latents, t = calls(pipe, arguments, None)
        plain.append(t)
        changed, t = calls(pipe, arguments, guide)
        moved.append(t)
    if not torch.isfinite(changed).all() or torch.equal(changed, latents):
        raise RuntimeError(f"{model}, {mode}, {name}: guidance gave no other finite latents")
    steps = guide.report().steps_guided
    extra = peak(lambda: calls(pipe, arguments, guide)) - peak(lambda: calls(pipe, arguments, None))
    waited = waits(lambda: calls(pipe, arguments, guide)) - waits(lambda: calls(pipe, arguments, None))
    base, added = statistics.median(plain), statistics.median(moved) - statistics.median(plain)
    row = {
        "model": model, "mode": mode, "guide": name, "images": len(latents), "step_ms": base * 1e3,
        "added_ms": added * STEPS / steps * 1e3, "share": added / base, "peak_extra_gb": extra,
        "reported_ms": guide.report().seconds / steps * 1e3, "waits_per_guided_step": waited / steps,
    }  # fmt: skip
    print(" | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    return row


def run(words: list[str]) -> dict[str, Any]:
    rows = []
    for model, make in PIPELINES.items():
        if words and not any(word in model for word in words):
            continue
        for mode, (change, names) in MODES.items():
            pipe, arguments = make()
            pipe.set_progress_bar_config(disable=True)
            change(pipe)
            for name in names:
                try:
                    rows.append(measure(model, mode, pipe, arguments, name))
                except Exception as error:
                    message = f"{type(error).__name__}: {error}"[:300]
                    print(f"{model} | {mode} | {name}: {message}", flush=True)
                    rows.append({"model": model, "mode": mode, "guide": name, "error": message})
            del pipe
            gc.collect()
            torch.cuda.empty_cache()
    versions = {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__}
    return {"device": torch.cuda.get_device_name(), "steps": STEPS, "dtype": "bfloat16"} | versions | {"rows": rows}


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
    record = run(words)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    page(record)


if __name__ == "__main__":
    main()
