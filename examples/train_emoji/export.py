"""Assemble the averaged weights into a Stable Diffusion pipeline in float16, and make its reference sets."""

import argparse
import json
import random
from pathlib import Path

import data
import text
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from loop import averaged
from PIL import Image
from train_unet import Denoiser, build_scheduler, build_unet

SCHEDULER = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False, "final_sigmas_type": "zero"}


def assemble(data_folder: Path, run_folder: Path) -> tuple[StableDiffusionPipeline, dict]:
    """Return the pipeline of a run, and the images and entries that it was trained on."""
    images, entries = data.load(data_folder)
    vae = AutoencoderKL.from_pretrained(run_folder / "vae")
    tokenizer = text.cached_tokenizer(run_folder / "tokenizer", entries)
    model = Denoiser(build_unet(vae.config.latent_channels), text.build_text_model(tokenizer))
    model.load_state_dict(averaged(run_folder))
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=model.unet,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler.from_config(build_scheduler().config, **SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"images": images, "entries": entries}


REFERENCES = {
    "twemoji": "twemoji style",
    "noto": "noto style",
    "dark-skin-tone": "dark skin tone",
    "light-skin-tone": "light skin tone",
}
TILES, COLUMNS = 96, 12


def save_references(folder: Path, images: torch.Tensor, entries: list) -> None:
    """Save sheets of 96 images each, chosen with a fixed seed, and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {}
    for name, attribute in REFERENCES.items():
        matches = [i for i, e in enumerate(entries) if attribute in e.attributes()]
        chosen = sorted(random.Random(name).sample(matches, TILES))
        tiles = images[chosen].view(TILES // COLUMNS, COLUMNS, 3, 64, 64).permute(0, 3, 1, 4, 2)
        Image.fromarray(tiles.reshape(TILES // COLUMNS * 64, COLUMNS * 64, 3).numpy()).save(
            folder / f"{name}.png", optimize=True
        )
        metadata[name] = {"count": TILES, "attribute": attribute, "captions": [entries[i].full_caption() for i in chosen]}
    (folder / "references.json").write_text(json.dumps(metadata, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--run", type=Path, default=Path("runs/unet"))
    parser.add_argument("--out", type=Path, default=Path("kspec_guidance/demo/assets/emoji"))
    args = parser.parse_args()
    pipe, training_set = assemble(args.data, args.run)
    pipe.to(torch.float16).save_pretrained(args.out, safe_serialization=True)
    path = args.out / "vae" / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # a path of the machine that trained it
    path.write_text(json.dumps(config, indent=2) + "\n")
    save_references(args.out.parent / "references", **training_set)
    size = sum(f.stat().st_size for f in args.out.rglob("*.safetensors"))
    print(json.dumps({"bytes": size, "parameters": {n: sum(p.numel() for p in getattr(pipe, n).parameters())
                                                    for n in ("unet", "vae", "text_encoder")}}))  # fmt: skip


if __name__ == "__main__":
    main()
