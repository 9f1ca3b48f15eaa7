"""What guidance costs on a CUDA device: SD 1.5-, SDXL- and Flux-sized pipelines with random weights in bfloat16.

    python benchmarks/gpu.py                 all rows; writes results/gpu.json, docs/gpu.md, docs/speed.md
    python benchmarks/gpu.py --seconds 150   no row is begun later than this; what is left out is listed
    python benchmarks/gpu.py SDXL            the rows whose model contains the word; ``arithmetic`` for those without one
    python benchmarks/gpu.py --repeats 1     fewer pairs of calls
    python benchmarks/gpu.py page            the tables of docs/gpu.md and docs/speed.md from the results

Whole pipelines run from given prompt embeddings to latents. Plain and guided calls alternate; a row has the medians of
their times per step, the time between CUDA events around the guidance, the peak of allocated memory, and how often a call
waited for the device, as CUDA reports it. A second table has the arithmetic of a step without a pipeline: queued as usual,
and as a replayed CUDA graph. Rows of memories are random, of the prompt of the call, so that all of them count.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from pages import fill, table

from kspec_guidance import SPARKE, MemoryBank, VendiGuidance
from kspec_guidance.memory import selection
from tests.gpu.steps import Step, captured, waits

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
STEPS, DTYPE = 8, torch.bfloat16
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
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **NOISE)
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


def compiled(pipe: Any) -> None:
    (getattr(pipe, "transformer", None) or pipe.unet).compile_repeated_blocks(fullgraph=True)


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {"SDXL": sdxl, "Flux": flux, "SD 1.5": sd15}
GUIDES: dict[str, Callable[[], Any]] = {
    "SPARKE()": SPARKE,
    "SPARKE(), 1,000 rows": SPARKE,
    "SPARKE(), 10,000 rows": SPARKE,
    "SPARKE(), 10,000 rows on the host": lambda: SPARKE(memory=MemoryBank(device="cpu")),
    "VendiGuidance()": VendiGuidance,
    "VendiGuidance(), 1,000 rows": VendiGuidance,
    'SPARKE(space="pooled")': lambda: SPARKE(space="pooled"),
    'SPARKE(space="pixels")': lambda: SPARKE(space="pixels"),
}
ALL = tuple(GUIDES)
SIZES = ALL[:3]
PLAN: list[tuple[str, str, tuple[str, ...]]] = [  # the most important rows first
    ("SDXL", "on the device", (*SIZES, ALL[4], ALL[6], ALL[3])),
    ("Flux", "on the device", SIZES),
    ("SD 1.5", "on the device", (*SIZES, *ALL[4:])),
    ("SDXL", "model offload", ALL[:1]),
    ("SD 1.5", "compiled blocks", ALL[:1]),
    ("Flux", "compiled blocks", ALL[:1]),
]
CHANGES: dict[str, Callable[[Any], None]] = {
    "on the device": lambda pipe: None,
    "compiled blocks": compiled,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(),
}
SAMPLES = {"SDXL": (2, 4, 128, 128), "Flux": (1, 4096, 64), "SD 1.5": (4, 4, 64, 64)}  # of the pipelines above
BLOCKS_MB = (8, 16, 32, 64, 128, 256)
PICTURES = {model: f"{model}, {n} image{'s' * (n > 1)}" for model, (n, *_) in SAMPLES.items()}


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


def number_of_rows(name: str) -> int:
    """The rows of memory in the name of a guide; 0 for what an earlier call left."""
    return int(name.split(", ")[1].split()[0].replace(",", "")) if "rows" in name else 0


def fill_memory(bank: MemoryBank, rows: int, prompt: torch.Tensor) -> None:
    """Add random rows of one prompt."""
    part = max(1, min(rows, (256 << 20) // (4 * torch.Size(bank.shape).numel())))
    while len(bank) < rows:
        n = min(part, rows - len(bank))
        bank.add(torch.randn(n, *bank.shape, device="cuda"), prompt.expand(n, -1))


def filled(name: str, pipe: Any, arguments: dict[str, Any]) -> Any:
    """A guide of this name that remembers one earlier call, and random rows of its prompt if the name says so."""
    guide = GUIDES[name]()
    Call(pipe, arguments, guide)
    if number_of_rows(name):
        fill_memory(guide.memory, number_of_rows(name), guide.memory.prompts[:1].to("cuda"))
    guide.remember = False  # all repeats have the same memory
    return guide


def place(memory: Any) -> str:
    """Where the rows of a memory are, and their size."""
    store = memory._store
    return f"{store.device.type}, {store.nbytes / 1e6:.0f} MB"


def prepared(model: str, mode: str) -> tuple[Any, dict[str, Any], Any]:
    """A pipeline that has been called, its arguments, and how often a plain call waits."""
    clean()
    pipe, arguments = PIPELINES[model]()
    pipe.set_progress_bar_config(disable=True)
    CHANGES[mode](pipe)
    Call(pipe, arguments)  # compiles, and chooses algorithms
    return pipe, arguments, waits(lambda: Call(pipe, arguments))


def measure(pipeline: Callable[[], tuple[Any, dict[str, Any], Any]], name: str, repeats: int) -> dict[str, Any]:
    """Plain and guided calls in turn."""
    pipe, arguments, plain_waits = pipeline()
    guide = filled(name, pipe, arguments)
    found = waits(lambda: Call(pipe, arguments, guide)) - plain_waits
    pairs = [(Call(pipe, arguments), Call(pipe, arguments, guide)) for _ in range(repeats)]
    plain, moved = pairs[-1]
    if not torch.isfinite(moved.latents).all() or torch.equal(moved.latents, plain.latents):
        raise RuntimeError("guidance gave no other finite latents")
    steps = guide.report().steps_guided
    base = statistics.median(p.seconds for p, _ in pairs)
    added = [(m.seconds - p.seconds) * STEPS / steps for p, m in pairs]
    events = guide.report().seconds / steps
    return {
        "images": len(moved.latents),
        "rows": len(guide.memory),
        "memory": place(guide.memory),
        "guided_steps": steps,
        "step_ms": base * 1e3,
        "added_ms": statistics.median(added) * 1e3,
        "added_ms_range": [min(added) * 1e3, max(added) * 1e3],
        "share": statistics.median(added) / base,
        "events_ms": events * 1e3,
        "events_share": events / base,
        "peak_extra_gb": moved.peak - plain.peak,
        "waits_per_guided_step": sum(found.values()) / steps,
        "waits": dict(found.most_common(12)),
    }


def milliseconds(call: Callable[[], Any], seconds: float = 0.15) -> float:
    """The time of a call, from many that are queued together."""
    call()
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - began < seconds:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        count += 3
    return (time.perf_counter() - began) / count * 1e3


@torch.no_grad()
def arithmetic(model: str, rows: int) -> dict[str, Any]:
    """One step of the default guide at this size: as in a run, without its read, and as a CUDA graph."""
    shape = SAMPLES[model]
    x, prompt = torch.randn(shape, device="cuda"), torch.nn.functional.normalize(torch.randn(1, 768, device="cuda"))
    guide = SPARKE(memory=MemoryBank(device="cuda"))
    guide.memory.bind(shape[1:], "x0", "e")
    if rows:
        fill_memory(guide.memory, rows, prompt)
    prompts = prompt.expand(len(x), -1).clone()
    step, reading = Step(guide, x, prompts), Step(guide, x, prompts, reading=True)
    expected = step().clone()
    graph, result = captured(step)
    graph.replay()
    found: dict[str, Any] = {
        "step_ms": milliseconds(reading),
        "queued_ms": milliseconds(step),
        "graph_ms": milliseconds(graph.replay),
        "difference": float((result - expected).norm() / expected.norm().clamp_min(1e-12)),
        "waits": dict(waits(reading)),
    }
    for size in BLOCKS_MB if rows else ():
        with patch.object(selection, "BLOCK_BYTES_GPU", size << 20):
            replay = captured(Step(guide, x, prompts))[0].replay
            found.setdefault("graph_ms_by_block_mb", {})[str(size)] = milliseconds(replay, 0.05)
    return found


def clean() -> None:
    """Free the memory of what is no longer used."""
    gc.collect()
    torch.cuda.empty_cache()


def measured(row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with its figures, or with the error."""
    began = time.perf_counter()
    try:
        row |= work()
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    row["seconds"] = time.perf_counter() - began
    print(" | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    clean()
    return row


def run(words: list[str], seconds: float, repeats: int) -> dict[str, Any]:
    """All rows, written after each."""
    began = time.perf_counter()
    versions = {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__}
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "steps": STEPS, "repeats": repeats} | versions
    record |= {"arithmetic": [], "rows": [], "left_out": []}

    def add(part: str, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() - began > seconds:
            record["left_out"].append(list(row.values()))
        else:
            record[part].append(measured(row, work))
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")

    for model, rows in product(SAMPLES if not words or "arithmetic" in words else (), (0, 1000, 10_000)):
        add("arithmetic", {"model": model, "rows": rows}, partial(arithmetic, model, rows))
    for model, mode, names in PLAN:
        if not words or any(word in model for word in words):
            pipeline = cache(partial(prepared, model, mode))
            for name in names:
                add("rows", {"model": model, "mode": mode, "guide": name}, partial(measure, pipeline, name, repeats))
    return record


PIPELINE_HEAD = [
    "pipeline", "guide", "rows in memory", "plain step", "guidance, by events", "share of a step",
    "guided less plain (range)", "waits",
]  # fmt: skip
ARITHMETIC_HEAD = ["model", "rows on the device", "a step", "without its read", "the device's part: a CUDA graph"]
SHARE_HEAD = ["model", "earlier images of the prompt", "a plain step", "device", "share", "host and device", "share"]


def page(record: dict[str, Any]) -> None:
    """Write the tables into docs/gpu.md and docs/speed.md."""
    versions = f"{record['device']}, torch {record['torch']}, diffusers {record['diffusers']}"
    bare = [r for r in record["arithmetic"] if "error" not in r]
    blocks = [r for r in bare if "graph_ms_by_block_mb" in r]
    sizes = list(blocks[0]["graph_ms_by_block_mb"]) if blocks else []
    times = [cells(r, *(f"{r[name]:.2f}" for name in ("step_ms", "queued_ms", "graph_ms"))) for r in bare]
    by_block = [cells(r, *(f"{r['graph_ms_by_block_mb'][size]:.2f}" for size in sizes)) for r in blocks]
    whole = f"{versions}, bfloat16, {record['steps']} steps, medians of {record['repeats']} pairs of calls; ms:\n\n"
    parts = {
        "gpu": whole + table(PIPELINE_HEAD, [pipeline_cells(r) for r in record["rows"]]),
        "gpu-arithmetic": f"{versions}, float32; ms:\n\n" + table(ARITHMETIC_HEAD, times),
        "gpu-blocks": f"{versions}; ms of a graph, against the MB of rows in a block:\n\n"
        + table(["model", "rows", *sizes], by_block),
    }
    fill(ROOT / "docs" / "gpu.md", parts)
    shares = table(SHARE_HEAD, share_cells(record["rows"], bare))
    fill(ROOT / "docs" / "speed.md", {"gpu-share": f"{versions}:\n\n{shares}"})


def cells(row: dict[str, Any], *figures: str) -> list[str]:
    """Model and rows of memory of a bare step, and figures."""
    return [PICTURES[row["model"]], f"{row['rows']:,}", *figures]


def pipeline_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table of whole pipelines."""
    name = PICTURES[row["model"]] + ("" if row["mode"] == "on the device" else f", {row['mode']}")
    guide = f"`{row['guide'].partition(', ')[0]}`"
    if "error" in row:
        return [name, guide, "", "", "", "", row["error"].partition("\n")[0], ""]
    place, size = row["memory"].split(", ")
    where = {"cuda": "device", "cpu": "host"}[place]
    low, high = row["added_ms_range"]
    return [
        name, guide, f"{row['rows']:,} on the {where}, {size}", f"{row['step_ms']:.1f}", f"{row['events_ms']:.2f}",
        f"{row['events_share']:.1%}", f"{row['added_ms']:.1f} ({low:.1f} to {high:.1f})",
        f"{row['waits_per_guided_step']:.1f}",
    ]  # fmt: skip


def share_cells(rows: list[dict[str, Any]], bare: list[dict[str, Any]]) -> list[list[str]]:
    """Shares of a guided step of a plain one, for the sizes that were run as pipelines: the fastest plain step counts."""
    found = []
    for r in bare:
        plain = [row["step_ms"] for row in rows if row["model"] == r["model"] and "step_ms" in row]
        if plain:
            block, step = str(selection.BLOCK_BYTES_GPU >> 20), min(plain)
            parts = r.get("graph_ms_by_block_mb", {}).get(block, r["graph_ms"]), r["step_ms"]
            found.append(cells(r, f"{step:.0f} ms", *(s for ms in parts for s in (f"{ms:.2f} ms", f"{ms / step:.1%}"))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.words == ["page"]:
        page(json.loads(RESULTS.read_text()))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing is measured")
    page(run(given.words, given.seconds, given.repeats))


if __name__ == "__main__":
    main()
