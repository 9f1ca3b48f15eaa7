"""Time of every method at the size of SDXL and Flux latents.

    python -m benchmarks.arena.cost

The denoisers' times, with random weights, are those that ``benchmarks/overhead.py`` measured on an idle machine. What a
method does itself is timed on latents of that size, four images; its extra denoiser calls are counted on the digits'
pipeline. A backward pass through the denoiser counts as two calls; half a denoiser with its backward as one.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from kspec_guidance.bench.methods import METHODS
from kspec_guidance.bench.methods.base import Moment
from kspec_guidance.bench.methods.guides import Guided
from kspec_guidance.bench.methods.starts import Start
from kspec_guidance.guidance.run import Run
from kspec_guidance.loop.context import CallContext, StepContext
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction

from .beds import BEDS
from .beds.base import Case

ROOT = Path(__file__).parents[2]
SIZES = {"SDXL, 4 x 128 x 128": (4, 4, 128, 128), "Flux, 4096 x 64": (4, 4096, 64)}
# A call and its backward pass; half a denoiser with its backward is about one call. One of four calls is without.
BACKWARD = {"DiverseFlow": 3.0, "noise optimisation": 2.5}


def calls(name: str) -> float:
    """Extra denoiser calls of a run, relative to those of plain sampling."""
    bed = BEDS["digits"]()
    case, count = Case("digit 3", 0), [0]
    bed.radius_unit()  # computed before calls are counted

    def run(method: str) -> int:
        count[0] = 0
        original = bed.pipe.unet.forward

        @functools.wraps(original)  # some methods call the denoiser again, with its arguments by name
        def counted(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            count[0] += len(sample)
            return original(sample, *args, **kwargs)

        bed.pipe.unet.forward = counted
        try:
            bed.sample(METHODS[method](), case)
        finally:
            del bed.pipe.unet.forward
        return count[0]

    return run(name) / run("plain") - 1


def own_seconds(name: str, shape: tuple[int, ...]) -> float | None:
    """Median seconds of a method's own work at one step, without denoiser calls; None where it cannot be measured."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    alpha, sigma, times = 0.8, 0.6, []
    x = alpha * x0 + sigma * noise
    if issubclass(METHODS[name], Guided):
        if name == "c-VSG":
            return None  # needs a decoder of that size
        prompts = torch.ones(len(x0), 8) / 8**0.5
        context = StepContext(CallContext(), DDIMScheduler(), None, Layout.of(x0), x0.shape, 10, prompts)
        run, prediction = Run(METHODS[name]().guide(None)), Prediction(x0, x, alpha, sigma, -sigma / alpha)
        run.begin(context, x)
        for _ in range(6):
            began = time.perf_counter()
            run.step(prediction, context)
            run.before_step(x, prediction, context)
            run.after_step(x, prediction, context)
            times.append(time.perf_counter() - began)
    else:
        method = METHODS[name]()
        method.begin()
        moment = Moment(x0, x, alpha, sigma, 1, 10, None, None, None, None)  # type: ignore[arg-type]
        moment.denoise = lambda y: y  # type: ignore[method-assign]  # its calls are counted separately
        if isinstance(method, Start) or name == "feature self-guidance":
            return 0.0  # its work is before the first step, or in the denoiser
        for _ in range(6):
            began = time.perf_counter()
            method.move(moment)
            method.after(moment, x)
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "cost.json")
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="measure these; figures of others are kept")
    args = parser.parse_args()
    known = json.loads((ROOT / "benchmarks" / "results" / "overhead.json").read_text())["steps"]
    torch.set_grad_enabled(False)
    fits = BEDS["digits"]().fits
    wanted = [name for name, method in METHODS.items() if name != "plain" and fits(method)]
    kept: dict[str, Any] = json.loads(args.out.read_text()) if args.methods and args.out.exists() else {}
    extra = {name: calls(name) for name in wanted if not args.methods or name in args.methods}
    found: dict[str, Any] = {}
    for label, shape in SIZES.items():
        denoiser = next(r["denoiser_seconds"] for r in known if r["latents"].startswith(label.split(",")[0]))
        step = 8 * denoiser  # four images, each with its negative
        methods = kept.get(label, {}).get("methods", {})
        for name in extra:
            own, calls_added = own_seconds(name, shape), extra[name] * BACKWARD.get(name, 1.0)
            if own is not None:
                methods[name] = {"own_seconds": own, "calls": calls_added, "added": own / step + calls_added}
                print(f"{label:22}{name:33}own {own * 1e3:8.1f} ms, calls {calls_added:+.2f}: "
                      f"{own / step + calls_added:+.2%}", flush=True)  # fmt: skip
        found[label] = {
            "denoiser_seconds_per_image": denoiser,
            "step_seconds": step,
            "methods": {name: methods[name] for name in wanted if name in methods},
        }
        args.out.write_text(json.dumps(kept | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
