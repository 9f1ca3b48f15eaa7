"""Overhead of guidance: time of a step, as a share of a denoiser's step on the same machine, and peak extra memory.

    python benchmarks/overhead.py            all of it, ten minutes on two cores; writes results/overhead.json
    python benchmarks/overhead.py spaces     the embedded pipeline and its feature spaces only
    python benchmarks/overhead.py steps      large denoisers only
    python benchmarks/overhead.py page       the tables of docs/pipelines.md from the results

Runs on CUDA where there is a device, timed with events. Denoisers have their true sizes and random weights; of Flux, one
block of each kind is timed and multiplied, since 48 GB of weights do not fit.
"""

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from pages import fill

from kspec_guidance import SPARKE, MemoryBank, load_demo_pipeline
from kspec_guidance.guidance.run import Run
from kspec_guidance.guidance.spaces import Activations, Embedder, Pixels, Pooled
from kspec_guidance.kernels import l2_normalize
from kspec_guidance.loop.context import CallContext
from kspec_guidance.loop.scheduler_hook import SchedulerHook

RESULTS = Path(__file__).parent / "results" / "overhead.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMORIES = (0, 100, 1_000, 10_000)
LARGEST = 12e9  # bytes of the largest memory that is measured
SIZES = {  # latents of one image, the prompt width, and whether the sampler is a flow
    "SD 1.5 (4 x 64 x 64)": ((1, 4, 64, 64), 768, False),
    "SDXL (4 x 128 x 128)": ((1, 4, 128, 128), 2048, False),
    "Flux (4096 x 64)": ((1, 4096, 64), 4096, True),
}


def seconds(f: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each call; by CUDA events on a GPU."""
    times = []
    for _ in range(repeats):
        if DEVICE == "cuda":
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            f()
            b.record()
            torch.cuda.synchronize()
            times.append(a.elapsed_time(b) / 1e3)
        else:
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
    return times


def peak(f: Callable[[], object]) -> float:
    """Peak megabytes of a call above those in use before it."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    before = status("VmRSS")
    f()
    return max(0.0, status("VmHWM") - before)


def status(name: str) -> float:
    line = next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith(name + ":"))
    return int(line.split()[1]) / 1e3


@contextmanager
def guided(scheduler: object, guide: SPARKE, prompt_features: torch.Tensor) -> Iterator[None]:
    """Guide a bare scheduler with known prompts, as a pipeline would."""
    context = CallContext(prompts=l2_normalize(prompt_features), encoder="benchmark")
    hook = SchedulerHook(scheduler, Run(guide), lambda: context, guide)
    hook.install()
    try:
        yield
    finally:
        hook.remove()


def step_cost(shape: tuple[int, ...], width: int, flow: bool, rows: int) -> tuple[float, float]:
    """Seconds that guidance adds to one scheduler step of one image, and its peak extra megabytes."""
    g = torch.Generator().manual_seed(0)
    bank, prompt = MemoryBank(), torch.randn(1, width, generator=g).to(DEVICE)
    for start in range(0, rows, 500):  # all rows are of the sample's prompt: those of other prompts would not be read
        n = min(500, rows - start)
        bank.add(torch.randn(n, *shape[1:], generator=g).to(DEVICE), prompt.expand(n, -1))
    x, m = (torch.randn(shape, generator=g).to(DEVICE) for _ in range(2))

    def steps(guide: SPARKE | None) -> list[float]:
        scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(20)
        times = iter(scheduler.timesteps)
        call = lambda: scheduler.step(m, next(times), x, return_dict=False)  # noqa: E731
        if guide is None:
            return seconds(call, 12)
        with guided(scheduler, guide, prompt):
            return seconds(call, 12)

    plain = statistics.median(steps(None)[2:])
    guide, times = SPARKE(stop=1.0, memory=bank), []
    extra = peak(lambda: times.extend(steps(guide)))
    return statistics.median(times[2:]) - plain, extra


@torch.no_grad()
def unet_step(**config: object) -> float:
    """Seconds of one call of a UNet of these sizes, one image, no classifier-free guidance."""
    unet = UNet2DConditionModel(**config).eval().to(DEVICE)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    x, t = torch.randn(1, 4, size, size, device=DEVICE), torch.randn(1, 77, width, device=DEVICE)
    extra = {}
    if unet.config.addition_embed_type:
        extra = {
            "added_cond_kwargs": {
                "text_embeds": torch.randn(1, 1280, device=DEVICE),
                "time_ids": torch.randn(1, 6, device=DEVICE),
            }
        }
    unet(x, 500, t, **extra)
    return statistics.median(seconds(lambda: unet(x, 500, t, **extra), 3))


@torch.no_grad()
def flux_step() -> float:
    """One double and one single block at full width, times 19 and 38, 1024 x 1024 pixels."""

    def timed(double: int, single: int) -> float:
        net = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True).eval().to(DEVICE)
        arguments = {
            "hidden_states": torch.randn(1, 4096, 64, device=DEVICE),
            "encoder_hidden_states": torch.randn(1, 512, 4096, device=DEVICE),
            "pooled_projections": torch.randn(1, 768, device=DEVICE),
            "timestep": torch.ones(1, device=DEVICE), "guidance": torch.ones(1, device=DEVICE),
            "img_ids": torch.zeros(4096, 3, device=DEVICE), "txt_ids": torch.zeros(512, 3, device=DEVICE),
        }  # fmt: skip
        net(**arguments)
        return statistics.median(seconds(lambda: net(**arguments), 2))

    base, double, single = timed(1, 1), timed(2, 1), timed(1, 2)
    return base + 18 * (double - base) + 37 * (single - base)


DENOISERS = {
    "SD 1.5 (4 x 64 x 64)": lambda: unet_step(sample_size=64, cross_attention_dim=768),
    "SDXL (4 x 128 x 128)": lambda: unet_step(
        sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), addition_embed_type="text_time",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, use_linear_projection=True,
    ),
    "Flux (4096 x 64)": flux_step,
}  # fmt: skip


def large_models() -> list[dict]:
    out = []
    for name, (shape, width, flow) in SIZES.items():
        denoiser = DENOISERS[name]()
        gc.collect()
        for rows in MEMORIES:
            size = rows * 4.0 * torch.Size(shape).numel()
            record = {"latents": name, "memory": rows, "denoiser_seconds": denoiser, "memory_gigabytes": size / 1e9}
            if size > LARGEST:
                record["left_out"] = f"the rows are {size / 1e9:.0f} GB"
            else:
                added, extra = step_cost(shape, width, flow, rows)
                record |= {"added_seconds": added, "share": added / denoiser, "peak_megabytes": extra}
            out.append(record)
            text = (
                record.get("left_out")
                or f"+{added * 1e3:.2f} ms a step, {added / denoiser:.2%} of {denoiser:.2f} s, peak +{extra:.0f} MB"
            )
            print(f"{name:22s} memory {rows:6d}: {text}", flush=True)
            gc.collect()
    return out


def embedded() -> tuple[Callable[[object], float], dict[str, object]]:
    """A run of the embedded pipeline (16 images of one prompt, 20 steps, the first 65% guided), and the spaces to run."""
    pipe = load_demo_pipeline().to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    small = AutoencoderTiny(
        latent_channels=9, encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4
    ).eval()
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 8, 4), torch.nn.GELU(), torch.nn.Conv2d(32, 64, 4, 2), torch.nn.GELU(), torch.nn.Flatten(),
        torch.nn.LazyLinear(128),
    ).to(DEVICE)  # fmt: skip
    network(torch.zeros(1, 3, 64, 64, device=DEVICE))
    kinds: dict[str, object] = {
        "plain": None, "x0": "x0", "latents": "latents", "pooled": Pooled(),
        "pooled, projection to 128": Pooled(project=128),
        "pixels": Pixels(), "pixels, 16 at a time": Pixels(chunk=16),
        "pixels, tiny decoder": Pixels(vae=small.to(DEVICE), chunk=16),
        "embedder, small network": Embedder(embedder=network, size=64, chunk=16), "activations": Activations(),
    }  # fmt: skip

    def run(space: object) -> float:
        """Seconds of guidance for each guided step, the denoiser and the scheduler not counted."""
        settings = {
            "num_images_per_prompt": 16, "num_inference_steps": 20, "guidance_scale": 5.0, "output_type": "latent",
            "generator": [torch.Generator().manual_seed(k) for k in range(16)],
        }  # fmt: skip
        if space is None:
            pipe("heart", **settings)
            return 0.0
        guide = SPARKE(space=space)
        with guide.attach(pipe):
            pipe("heart", **settings)
        return guide.report().seconds / guide.report().steps_guided

    return run, kinds


def child(name: str) -> None:
    """Print the peak megabytes of a run above a plain one; in a fresh process, since freed memory counts as used."""
    run, kinds = embedded()
    run(None)
    if DEVICE == "cuda":
        floor, top = peak(lambda: run(None)), peak(lambda: run(kinds[name]))
    else:
        floor = status("VmHWM")
        run(kinds[name])
        top = status("VmHWM")
    print(max(0.0, top - floor))


def spaces() -> list[dict]:
    run, kinds = embedded()
    for space in kinds.values():
        run(space)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    own: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(7):  # interleaved, so that a slow period of the machine affects all of them
        for name, space in kinds.items():
            times[name] += seconds(lambda s=space, n=name: own[n].append(run(s)), 1)
    base, out = statistics.median(times["plain"]), []
    for name in kinds:
        t = statistics.median(times[name])
        made = subprocess.run([sys.executable, __file__, "peak", name], capture_output=True, text=True, check=True)
        record = {
            "space": name,
            "seconds": t,
            "added_share": t / base - 1,
            "own_ms_per_guided_step": statistics.median(own[name]) * 1e3,
            "peak_megabytes": float(made.stdout.split()[-1]),
        }
        out.append(record)
        print(
            f"{name:26s} {t:.3f} s a run ({t / base - 1:+.1%}), {record['own_ms_per_guided_step']:.1f} ms a guided step, "
            f"peak +{record['peak_megabytes']:.0f} MB",
            flush=True,
        )
    return out


def page(record: dict) -> None:
    """Write the tables into docs/pipelines.md, between their markers."""
    rows = [
        f"| {r['space']} | {r['own_ms_per_guided_step']:.1f} ms | {r['seconds']:.2f} s | {r['peak_megabytes']:.0f} MB |"
        for r in record["spaces"]
    ]
    head = "| space | guidance, a guided step | a run | peak extra memory |\n|---|---|---|---|\n"
    plain = next(r["seconds"] for r in record["spaces"] if r["space"] == "plain")
    spaces_table = (
        f"Measured on the embedded pipeline, 16 images, 20 steps of which 13 are guided ({record['device']}; "
        f"`python benchmarks/overhead.py`; a plain run takes {plain:.2f} s, and runs vary by a few percent):\n\n"
        + head
        + "\n".join(rows)
    )
    steps = []
    for r in record.get("steps", []):
        cost = r.get("left_out") or f"{r['added_seconds'] * 1e3:.1f} ms | {r['share']:.2%} | {r['peak_megabytes']:.0f} MB"
        cells = f"not measured: {cost} | | " if "left_out" in r else cost
        steps.append(f"| {r['latents']} | {r['memory']:,} | {r['denoiser_seconds']:.1f} s | {cells} |")
    step_table = (
        f"One image, float32, {record['device']}; a denoiser's step is one call without classifier-free guidance: with it "
        "a step takes twice as long, and the share is half of this. All rows of the memory are of the image's prompt: of a "
        "memory of many prompts only the rows that matter are read. The peak is that of the process, which does not count "
        "freed memory that is reused.\n\n"
        "| latents | memory | denoiser's step | guidance adds | share | peak extra memory |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(steps)
    )
    path = Path(__file__).parents[1] / "docs" / "pipelines.md"
    fill(path, {"spaces": spaces_table, "overhead": step_table})


def main() -> None:
    if sys.argv[1:2] == ["page"]:
        page(json.loads(RESULTS.read_text()))
        return
    if sys.argv[1:2] == ["peak"]:
        child(sys.argv[2])
        return
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    record |= {"device": name, "torch": torch.__version__.partition("+")[0]}
    for part, measure in (("spaces", spaces), ("steps", large_models)):
        if part in sys.argv[1:] or not sys.argv[1:]:
            record[part] = measure()
            RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    page(record)


if __name__ == "__main__":
    main()
