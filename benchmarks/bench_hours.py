"""Hours and gigabytes of `kspec-guidance bench` on one GPU, computed before one was at hand.

    python benchmarks/bench_hours.py        # writes the tables of docs/bench.md; a minute, no GPU

Operations of a denoiser are counted by PyTorch on networks of the published sizes, on the meta device. Their rate is the
share of the peak that one published time comes to: Stable Diffusion 1.5, 50 steps, 1.62 s an image on an RTX 4090 (arXiv
2506.10173). What a method adds is its share in benchmarks/results/arena/cost.json, or its own extra denoiser calls.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from pages import fill, table
from torch.utils.flop_counter import FlopCounterMode

from kspec_guidance.bench.methods import CODES
from kspec_guidance.bench.models import RECIPES, Recipe
from kspec_guidance.bench.plan import SUITES, choose_methods, unfit

ROOT = Path(__file__).parents[1]
PEAKS = {"H100": 989e12, "RTX 4090": 165e12}  # dense operations a second in bfloat16, from the maker's data sheets
MEMORY = {"H100": 80e9, "RTX 4090": 24e9}
ANCHOR = ("sd-1.5", "RTX 4090", 1.62)  # recipe, GPU, seconds an image
UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
CALLS = {  # denoiser calls that methods add to an image, where the arena's results have no share
    "group-inference": lambda steps: 8 / steps, "cno": lambda steps: 3 / steps,
    "contextual": lambda steps: 0.25, "block-self-guidance": lambda steps: 0.07,  # as their papers report
}  # fmt: skip
IMAGES_JUDGED = 10.0  # images a second that all scores together take; a guess


def networks() -> Iterator[tuple[str, Any, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Recipe, class and settings of each denoiser, and the inputs of a call for one image."""
    r = torch.empty
    yield (
        "sd-1.5", diffusers.UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768},
        lambda: {"sample": r(1, 4, 64, 64), "timestep": r(1), "encoder_hidden_states": r(1, 77, 768)},
    )  # fmt: skip
    yield (
        "sdxl", diffusers.UNet2DConditionModel,
        {
            "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True, **UNET,
        },
        lambda: {
            "sample": r(1, 4, 128, 128), "timestep": r(1), "encoder_hidden_states": r(1, 77, 2048),
            "added_cond_kwargs": {"text_embeds": r(1, 1280), "time_ids": r(1, 6)},
        },
    )  # fmt: skip
    for name, depth, dual, size in (("medium", 24, range(13), 384), ("large", 38, (), 192)):
        yield (
            f"sd-3.5-{name}", diffusers.SD3Transformer2DModel,
            {
                "num_layers": depth, "num_attention_heads": depth, "caption_projection_dim": 64 * depth, "sample_size": 128,
                "dual_attention_layers": tuple(dual), "pos_embed_max_size": size, "in_channels": 16, "out_channels": 16,
                "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
            },
            lambda: {
                "hidden_states": r(1, 16, 128, 128), "timestep": r(1), "encoder_hidden_states": r(1, 333, 4096),
                "pooled_projections": r(1, 2048),
            },
        )  # fmt: skip
    yield (
        "flux-dev", diffusers.FluxTransformer2DModel, {"guidance_embeds": True},
        lambda: {
            "hidden_states": r(1, 4096, 64), "timestep": r(1), "guidance": r(1), "encoder_hidden_states": r(1, 512, 4096),
            "pooled_projections": r(1, 768), "img_ids": r(4096, 3), "txt_ids": r(512, 3),
        },
    )  # fmt: skip
    yield (
        "sana", diffusers.SanaTransformer2DModel, {},
        lambda: {"hidden_states": r(1, 32, 32, 32), "timestep": r(1), "encoder_hidden_states": r(1, 300, 2304)},
    )  # fmt: skip
    yield (
        "pixart-sigma", diffusers.PixArtTransformer2DModel,
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False, "interpolation_scale": 2},
        lambda: {
            "hidden_states": r(1, 4, 128, 128), "timestep": r(1), "encoder_hidden_states": r(1, 300, 4096),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )  # fmt: skip
    yield (
        "qwen-image", diffusers.QwenImageTransformer2DModel, {},
        lambda: {
            "hidden_states": r(1, 4096, 64), "timestep": r(1), "encoder_hidden_states": r(1, 100, 3584),
            "encoder_hidden_states_mask": None, "img_shapes": [[(1, 64, 64)]],
        },
    )  # fmt: skip
    yield (
        "z-image-turbo", diffusers.ZImageTransformer2DModel, {},
        lambda: {"x": [r(16, 1, 128, 128)], "t": r(1), "cap_feats": [r(100, 2560)]},
    )  # fmt: skip
    yield (
        "wan", diffusers.WanTransformer3DModel, {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        lambda: {"hidden_states": r(1, 16, 1, 60, 104), "timestep": r(1), "encoder_hidden_states": r(1, 512, 4096)},
    )  # fmt: skip


def operations() -> dict[str, float]:
    """Operations of one denoiser call for one image, by recipe; networks must have the recipes' numbers of parameters."""
    found = {}
    for name, cls, settings, inputs in networks():
        with torch.device("meta"):
            network = cls(**settings).eval()
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network(**inputs())
        parameters = sum(p.numel() for p in network.parameters()) / 1e9
        stated = next(v for k, v in RECIPES[name].billions.items() if k in ("unet", "transformer"))
        assert abs(parameters - stated) < 6e-4, name
        found[name] = float(counter.get_total_flops())
    return found | {
        "sdxl-turbo": found["sdxl"] / 4, "sd-3.5-large-turbo": found["sd-3.5-large"], "flux-schnell": found["flux-dev"]
    }  # fmt: skip


def of_image(recipe: Recipe, flops: float) -> float:
    """Operations of a plain image: all steps, twice with classifier-free guidance."""
    return flops * recipe.steps * (1 if recipe.guidance is None else 2)


def added(code: str, steps: int, costs: dict[str, Any]) -> float:
    """What a method adds to the time of plain sampling, as a share."""
    if code in CALLS:
        return CALLS[code](steps)
    return max(0.0, costs.get(CODES[code].name, {"added": 0.0})["added"])


def hours(recipe: Recipe, suite: str, seconds: float, costs: dict[str, Any]) -> float:
    """Hours that the images of a suite and their scores take at so many seconds a plain image."""
    settings = SUITES[suite]
    names = ",".join(c for c in settings["methods"].split(",") if unfit(CODES[c], recipe) is None)
    chosen = choose_methods(names, recipe, settings["sweep"])
    prompts = int(settings["prompts"].partition(":")[2])
    each = prompts * settings["images"]
    images = each * sum(len(c.values) for c in chosen)
    sampled = sum(each * len(c.values) * (1 + added(c.code, recipe.steps, costs)) for c in chosen) * seconds
    return (sampled + images / IMAGES_JUDGED) / 3600


def fits(recipe: Recipe, gpu: str, images: int) -> str:
    """How a model lies on a GPU: whole, by parts, or not."""
    need = {mode: recipe.bytes_needed(images, mode) for mode in ("none", "model")}
    return next((m for m in need if need[m] <= MEMORY[gpu]), "sequential")


def main() -> None:
    costs = json.loads((ROOT / "benchmarks" / "results" / "arena" / "cost.json").read_text())
    flops = operations()
    name, gpu, measured = ANCHOR
    rate = of_image(RECIPES[name], flops[name]) / measured / PEAKS[gpu]
    rows = []
    for name, recipe in RECIPES.items():
        if name == "demo":
            continue
        cost = costs[next(k for k in costs if k.startswith("SDXL" if "images" in recipe.has else "Flux"))]["methods"]
        cells = [f"`{name}`", recipe.model, str(recipe.steps)]
        for card in PEAKS:
            seconds = of_image(recipe, flops[name]) / PEAKS[card] / rate
            mode = fits(recipe, card, 1)
            quick, paper = (hours(recipe, suite, seconds, cost) for suite in ("quick", "paper"))
            whole = "" if mode == "none" else f" ({mode})"
            cells += [f"{seconds:.3g}{whole}", f"{quick:.2g}", f"{paper:.0f}"]
        rows.append([*cells, f"{recipe.bytes_needed(0) / 1e9:.1f}", f"{recipe.bytes_needed(0, 'model') / 1e9:.1f}"])
    head = ["name", "model", "steps"]
    for card in PEAKS:
        head += [f"{card}: s an image", "quick, h", "paper, h"]
    text = (
        f"Computed by `python benchmarks/bench_hours.py`, not measured: operations of the denoiser at {rate:.0%} of the "
        f"card's peak,\nas in the time of {measured} s for Stable Diffusion 1.5 at 50 steps on an RTX 4090 "
        "(arXiv 2506.10173). Text encoders, autoencoder and offloading are\nleft out. In brackets: how the weights come "
        "where they do not fit. A dry run on your card replaces all of it.\n\n"
    )
    fill(ROOT / "docs" / "bench.md", {"hours": text + table([*head, "weights, GB", "largest part, GB"], rows)})


if __name__ == "__main__":
    main()
