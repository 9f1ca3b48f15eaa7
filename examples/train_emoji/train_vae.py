"""Train the autoencoder: 64 x 64 x 3 pixels to 8 x 8 x 12 latents and back.  python train_vae.py --help"""

import math
import time

import data
import torch
from diffusers import AutoencoderKL
from loop import Run, training_parser
from torch.nn import functional as F


def build() -> AutoencoderKL:
    """Make an autoencoder with random weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=12,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )


def to_model(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 in 0..255 to float in -1..1."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def edges(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the L1 loss of finite differences, which keeps outlines sharp; L1 of pixels alone blurs them."""
    return sum(F.l1_loss(x.diff(dim=d), y.diff(dim=d)) for d in (2, 3))


def fit(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the loss of reconstructions ``y`` of ``x``: L1, mean square and edges."""
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges(y, x)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB, with reconstructions clipped to -1..1."""
    total = 0.0
    for chunk in images.split(64):
        x = to_model(chunk)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((x - y) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        total += float((-10 * mse.log10()).sum())
    return total / len(images)


def main() -> None:
    parser = training_parser(__doc__, "runs/vae", steps=4200, batch=32, rate=2e-3)
    parser.add_argument("--kl", type=float, default=3e-6)
    args = parser.parse_args()

    data.download(args.data)
    images, entries = data.load(args.data)
    held_out = data.held_out(entries)
    train, test = images[~held_out], images[held_out]
    torch.manual_seed(args.seed)
    vae = build().to(memory_format=torch.channels_last)
    run = Run(vae, args.run, args.steps, args.rate, decay=0.995, seed=args.seed)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {len(train)} images, {len(test)} held out")

    while run.step < args.steps:
        start = time.perf_counter()
        g = run.generator(run.step)
        torch.manual_seed(run.seed + run.step)  # for the sample of the posterior
        x = to_model(train[torch.randint(len(train), (args.batch,), generator=g)])
        flip = torch.rand(args.batch, 1, 1, 1, generator=g) < 0.5
        x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        error = fit(y, x)
        norm = run.update(error + args.kl * posterior.kl().mean())
        run.seconds += time.perf_counter() - start
        if run.step % 100 == 0:
            print(f"step {run.step} fit {float(error):.4f} kl {float(posterior.kl().mean()):.0f} norm {norm:.2f} "
                  f"{args.batch * run.step / run.seconds:.0f}/s", flush=True)  # fmt: skip
        if run.step % 500 == 0 or run.step == args.steps:
            run.save()
            print(f"step {run.step} held-out PSNR {psnr(run.ema, test):.2f} dB", flush=True)
        if not math.isfinite(norm):
            raise SystemExit(f"gradient not finite at step {run.step}; resume with a lower --rate")
    run.ema.save_pretrained(args.run / "ema")


if __name__ == "__main__":
    main()
