"""Train the denoiser and its text encoder together on the latents of a finished autoencoder.  --help for settings"""

import argparse
import math
import random
import time
from collections import Counter
from pathlib import Path

import data
import latents
import text
import torch
from captions import Entry
from diffusers import DDPMScheduler, UNet2DConditionModel
from loop import Run
from muon import MuonAdamW
from safetensors.torch import load_file
from torch import nn

DROP_CAPTION = 0.1  # the share trained without a caption, for classifier-free guidance
MAX_SNR = 5.0  # beyond it the weight falls, as in min-SNR (Hang et al. 2023, arXiv 2303.09556)


def build_unet(channels: int) -> UNet2DConditionModel:
    """Two resolutions, 8 x 8 by convolution and 4 x 4 with attention to the text, where weights are cheap."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=text.WIDTH,
        attention_head_dim=(4, 6),  # the number of heads, whatever diffusers calls it
        norm_num_groups=16,
    )


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip


class Denoiser(nn.Module):
    """UNet and text encoder as one module, so that one optimizer and one average hold both."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy, t, tokens):
        return self.unet(noisy, t, self.text_encoder(tokens).last_hidden_state).sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/ema"))
    parser.add_argument("--run", type=Path, default=Path("runs/unet"))
    parser.add_argument("--init", type=Path, help="start from the weights of this pipeline, its autoencoder included")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--bfloat16", action="store_true", help="faster where the processor has such products")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data.download(args.data)
    images, entries = data.load(args.data)
    vae = latents.kept_vae(args.run / "vae", args.vae if args.init is None else args.init / "vae", images)
    clean, _ = latents.posteriors(vae, images)
    tokenizer = text.kept_tokenizer(args.run / "tokenizer", entries, args.init)
    torch.manual_seed(args.seed)
    model = Denoiser(build_unet(clean.shape[1]), text.build_text_model(tokenizer)).to(memory_format=torch.channels_last)
    if args.init is not None:
        for part in ("unet", "text_encoder"):
            [weights] = (args.init / part).glob("*.safetensors")
            getattr(model, part).load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    optimizer = MuonAdamW(model, lr=args.rate)
    run = Run(model, args.run, args.steps, args.rate, decay=0.999, seed=args.seed, falling=0.4, optimizer=optimizer)
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    # Plain min-SNR for v, min(snr, 5) / (snr + 1), all but ignores the noisiest steps, where the prompt decides the
    # subject: trained with it for 2,500 steps, faces were good and "heart" was a brown blob. This one is 1 there.
    weight = (snr.clamp(max=MAX_SNR) + 1) / (snr + 1)
    chance = balance(entries)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(images)} images", flush=True)

    total = 0.0
    while run.step < args.steps:
        began = time.perf_counter()
        g, rng = run.generator(run.step), random.Random(args.seed * 1_000_003 + run.step)
        order = torch.multinomial(chance, args.batch, generator=g)
        z = clean[order]
        captions = ["" if rng.random() < DROP_CAPTION else entries[i].caption(rng) for i in order.tolist()]
        # one noise level from each of `batch` equal parts of the range: less variance than independent draws
        t = ((torch.randperm(args.batch, generator=g) + torch.rand(args.batch, generator=g)) / args.batch * 1000).long()
        noise = torch.randn(z.shape, generator=g)
        noisy = scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(z, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            predicted = model(noisy, t, text.encode(tokenizer, captions)).float()
        error = (predicted - target).square().mean(dim=(1, 2, 3))
        loss = (weight[t] * error).mean()
        norm = run.update(loss)
        total += loss.detach().item()
        run.seconds += time.perf_counter() - began
        if run.step % 100 == 0:
            print(f"step {run.step} loss {total / 100:.4f} norm {norm:.2f} "
                  f"{args.batch * run.step / run.seconds:.0f}/s", flush=True)  # fmt: skip
            total = 0.0
        if run.step % 250 == 0 or run.step == args.steps:
            run.save()
        if not math.isfinite(norm):
            raise SystemExit(f"gradient not finite at step {run.step}; resume with a lower --rate")


def balance(entries: list[Entry]) -> torch.Tensor:
    """Chance of each image ``[n]``: 1 / sqrt(images of its subject), or people in every tone would be two thirds."""
    subjects = Counter(e.subject for e in entries)
    return torch.tensor([subjects[e.subject] ** -0.5 for e in entries])


if __name__ == "__main__":
    main()
