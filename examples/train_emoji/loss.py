"""Weighted loss of the averaged weights on full captions of 512 images, at even noise levels.  python loss.py --help"""

import argparse
from pathlib import Path

import data
import latents
import text
import torch
from batches import balance
from loop import averaged
from train_unet import Denoiser, build_scheduler, build_unet, weights_of_levels

COUNT = 512


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--run", type=Path, default=Path("runs/unet"))
    args = parser.parse_args()
    images, entries = data.load(args.data)
    g = torch.Generator().manual_seed(5)
    chosen = torch.multinomial(balance(entries), COUNT, generator=g)
    clean, _ = latents.posteriors(latents.cached_vae(args.run / "vae", args.run, images), images[chosen])
    tokenizer = text.cached_tokenizer(args.run / "tokenizer", entries)
    model = Denoiser(build_unet(clean.shape[1]), text.build_text_model(tokenizer)).eval()
    model.load_state_dict(averaged(args.run))
    scheduler = build_scheduler()
    weight = weights_of_levels(scheduler.alphas_cumprod)
    t, noise = torch.arange(COUNT) * 1000 // COUNT, torch.randn(clean.shape, generator=g)
    noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
    tokens = text.encode(tokenizer, [entries[i].full_caption() for i in chosen.tolist()])
    predicted = torch.cat([model(*part) for part in zip(noisy.split(64), t.split(64), tokens.split(64), strict=True)])
    error = weight[t] * (predicted - target).square().mean(dim=(1, 2, 3))
    quarters = [round(float(q.mean()), 3) for q in error.chunk(4)]
    print(f"loss {float(error.mean()):.4f}; by quarters of the noise range {quarters}")


if __name__ == "__main__":
    main()
