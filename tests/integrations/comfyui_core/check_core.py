"""Samples with ComfyUI's own sampler, model patcher and model classes, and prints what the nodes' functions did, as JSON.

Run by tests/integrations/test_comfyui_core.py: ``python check_core.py COMFYUI_FOLDER BASE_FOLDER``.
"""

import json
import os
import sys
import warnings
from pathlib import Path

COMFYUI, BASE = sys.argv[1:3]
HERE = Path(__file__).resolve()
sys.argv = ["main.py", "--cpu", "--base-directory", BASE]
sys.path[:0] = [COMFYUI, str(HERE.parent), str(HERE.parents[3] / "integrations" / "comfyui")]
os.chdir(COMFYUI)
warnings.simplefilter("ignore")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sample  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from comfy.nested_tensor import NestedTensor  # noqa: E402
from guide_model import diverse, matching  # noqa: E402

from kspec_guidance.integrations.denoised import MemoryBySize  # noqa: E402

SAMPLERS = (
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpmpp_2m",
    "dpmpp_sde",
    "uni_pc",
    "res_multistep",
    "lcm",
    "ddim",
    "sa_solver",
)


def sample(model, kind, sampler="euler", cfg=3.0, n=3, seed=0, prompt="a red heart", size=None, **kwargs):
    latent = torch.zeros(n, *(size or tiny_models.KINDS[kind][2]))
    return comfy.sample.sample(
        model, comfy.sample.prepare_noise(latent, seed), 6, cfg, sampler, "simple", tiny_models.conditioning(prompt),
        tiny_models.conditioning("dull"), latent, disable_pbar=True, seed=seed, **kwargs,
    )  # fmt: skip


def relative(a, b):
    return float((a - b).norm() / b.norm())


def check(kind, sampler="euler"):
    model, memory = tiny_models.build_model(kind), MemoryBySize()
    plain, guided = sample(model, kind, sampler), sample(diverse(model, 60.0, memory=memory), kind, sampler)
    kept = memory.of(plain).x
    return {
        "kind": kind,
        "sampler": sampler,
        "identical": torch.equal(sample(diverse(model, 0.0), kind, sampler), plain),
        "repeatable": torch.equal(sample(diverse(model, 60.0), kind, sampler), guided),
        "moved": relative(guided, plain),
        "remembered": len(memory),
        "as returned": relative(kept, model.model.process_latent_in(guided).flatten(1)) if len(kept) else None,
        "restored": torch.equal(sample(model, kind, sampler), plain),
    }


def special_cases():
    kind, size = "SD15 v", (4, 16, 8)
    model, memory = tiny_models.build_model(kind), MemoryBySize()
    one = diverse(model, 60.0, memory=memory)
    found = {
        "cfg 1": relative(sample(diverse(model, 60.0), kind, cfg=1.0), sample(model, kind, cfg=1.0)),
        "first of one": relative(sample(one, kind, n=1), sample(model, kind, n=1)),
        "second of one": relative(sample(one, kind, n=1, seed=1), sample(model, kind, n=1, seed=1)),
        "another prompt": relative(
            sample(one, kind, n=1, seed=2, prompt="two cats"), sample(model, kind, n=1, seed=2, prompt="two cats")
        ),
    }
    sample(one, kind, n=2, size=size)
    found["sizes"] = [list(s) for s in memory.banks]
    count = len(memory)
    sample(one, kind, n=2, start_step=0, last_step=3)  # stops at a level above 0
    found["cut short"] = len(memory) - count
    try:
        sample(one, kind, callback=lambda *_: 1 / 0)
    except ZeroDivisionError:
        found["interrupted"] = len(memory) - count
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    found["matching"] = relative(
        sample(matching(model, latents, 0.7, 0.6), kind, size=size), sample(model, kind, size=size)
    )
    baseline = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(10))
    found["matching, baseline"] = relative(
        sample(matching(model, latents, 1.0, 0.6, baseline), kind, n=1, size=size), sample(model, kind, n=1, size=size)
    )
    found["matching at 0"] = relative(sample(matching(model, latents, 0.0, 0.6), kind), sample(model, kind))
    both = sample(diverse(matching(model, latents, 0.7, 0.6), 60.0), kind)
    found["two guides"] = bool(torch.isfinite(both).all())
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:, :] = 1
    masked = sample(diverse(model, 60.0), kind, noise_mask=mask)
    found["outside of the mask"] = float((masked - sample(model, kind, noise_mask=mask))[..., :3, :].abs().max())
    return found


def several_latents():
    """Video with sound: a nested latent, which the sampler packs."""
    model, memory = tiny_models.build_model_of_two_latents(), MemoryBySize()

    def run(model):
        latent = NestedTensor([torch.zeros(3, 4, 8, 8), torch.zeros(3, 2, 20)])
        return comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, 0), 6, 3.0, "euler", "simple", tiny_models.conditioning("a"),
            tiny_models.conditioning("b"), latent, disable_pbar=True, seed=0,
        ).unbind()  # fmt: skip

    plain, idle, guided = run(model), run(diverse(model, 0.0)), run(diverse(model, 60.0, memory=memory))
    return {
        "identical": all(torch.equal(a, b) for a, b in zip(plain, idle, strict=True)),
        "moved": [relative(a, b) for a, b in zip(guided, plain, strict=True)],
        "sizes": [list(s) for s in memory.banks],
        "remembered": len(memory),
    }


rows = [check(kind) for kind in tiny_models.KINDS] + [check("SD15 v", name) for name in SAMPLERS]
print("\nRESULT " + json.dumps({"rows": rows, "special": special_cases(), "several": several_latents()}))
