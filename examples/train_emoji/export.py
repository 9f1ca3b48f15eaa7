"""Put the averaged weights together as a Stable Diffusion pipeline in float16, with its reference sets.

The autoencoder's latents are normalised per channel by folding shift and scale into its two 1 x 1 convolutions, so the
pipeline's ``scaling_factor`` is 1 and nothing downstream has to know.
"""

import argparse
import json
import random
from pathlib import Path

import data
import text
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from train_unet import Denoiser, build_scheduler, build_unet, posteriors

SCHEDULER = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False, "final_sigmas_type": "zero"}


@torch.no_grad()
def normalise(vae: AutoencoderKL, shift: torch.Tensor, scale: torch.Tensor) -> AutoencoderKL:
    """The same autoencoder with latents ``(z - shift) / scale``; exact up to rounding."""
    shift, scale = shift.flatten(), scale.flatten()
    channels = len(scale)
    conv = vae.quant_conv  # outputs mean and log variance
    conv.weight[:channels] /= scale[:, None, None, None]
    conv.bias[:channels] = (conv.bias[:channels] - shift) / scale
    conv.bias[channels:] -= 2 * scale.log()
    conv = vae.post_quant_conv
    conv.bias += (conv.weight[:, :, 0, 0] @ shift[:, None])[:, 0]
    conv.weight *= scale[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
    return vae


def assemble(data_folder: Path, vae_folder: Path, run_folder: Path) -> tuple[StableDiffusionPipeline, dict]:
    images, entries = data.load(data_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    _, _, shift, scale = posteriors(vae, images)
    tokenizer = text.build_tokenizer(entries)
    model = Denoiser(build_unet(len(shift.flatten())), text.build_text_model(tokenizer))
    saved = load_file(run_folder / "checkpoint.safetensors")
    model.load_state_dict({k.removeprefix("ema."): v for k, v in saved.items() if k.startswith("ema.")})
    pipe = StableDiffusionPipeline(
        vae=normalise(vae, shift, scale),
        unet=model.unet,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler.from_config(build_scheduler().config, **SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"images": images, "entries": entries}


REFERENCES = {"twemoji": "twemoji style", "noto": "noto style", "dark-skin-tone": "dark skin tone", "light-skin-tone": "light skin tone"}
TILES, COLUMNS = 96, 12


def save_references(folder: Path, images: torch.Tensor, entries: list) -> None:
    """Sheets of 96 pictures each, drawn with a fixed seed, and what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {}
    for name, attribute in REFERENCES.items():
        having = [i for i, e in enumerate(entries) if attribute in e.attributes()]
        chosen = sorted(random.Random(name).sample(having, TILES))
        tiles = images[chosen].view(TILES // COLUMNS, COLUMNS, 3, 64, 64).permute(0, 3, 1, 4, 2)
        Image.fromarray(tiles.reshape(TILES // COLUMNS * 64, COLUMNS * 64, 3).numpy()).save(folder / f"{name}.png", optimize=True)
        about[name] = {"count": TILES, "attribute": attribute, "captions": [entries[i].full_caption() for i in chosen]}
    (folder / "references.json").write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/ema"))
    parser.add_argument("--run", type=Path, default=Path("runs/unet"))
    parser.add_argument("--out", type=Path, default=Path("kspec_guidance/assets/emoji"))
    args = parser.parse_args()
    pipe, art = assemble(args.data, args.vae, args.run)
    pipe.to(torch.float16).save_pretrained(args.out, safe_serialization=True)
    save_references(args.out.parent / "references", **art)
    size = sum(f.stat().st_size for f in args.out.rglob("*.safetensors"))
    print(json.dumps({"bytes": size, "parameters": {n: sum(p.numel() for p in getattr(pipe, n).parameters())
                                                    for n in ("unet", "vae", "text_encoder")}}))  # fmt: skip


if __name__ == "__main__":
    main()
