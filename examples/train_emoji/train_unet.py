"""Train the denoiser and its text encoder on the latents of a trained autoencoder.  python train_unet.py --help"""

from pathlib import Path

import data
import latents
import text
import torch
from batches import Batch, Batches
from diffusers import DDPMScheduler, UNet2DConditionModel
from loop import Run, training_parser
from muon import MuonAdamW
from torch import nn
from transformers import CLIPTextModel

MAX_SNR = 5.0  # the weight falls above it, as in min-SNR (Hang et al. 2023, arXiv 2303.09556)


def build_unet(channels: int) -> UNet2DConditionModel:
    """Make a UNet of two resolutions: 8 x 8 with convolutions alone, 4 x 4 with cross-attention, where it is cheap."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=text.WIDTH,
        attention_head_dim=(4, 6),  # the number of heads, despite the name
        norm_num_groups=16,
    )


def build_scheduler() -> DDPMScheduler:
    """Make the noise schedule of Stable Diffusion, with v-prediction."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip


def weights_of_levels(alphas: torch.Tensor) -> torch.Tensor:
    """Return the weight of the v-prediction's squared error at each step of the schedule, ``[1000]``.

    Plain min-SNR for v, min(snr, 5) / (snr + 1), nearly ignores the noisiest steps, where the prompt determines the
    subject: after 2,500 steps with it, faces were good and "heart" was a brown blob. This weight is 1 there.
    """
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=MAX_SNR) + 1) / (snr + 1)


class Denoiser(nn.Module):
    """UNet and text encoder as one module, for one optimizer and one average of the weights."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy, t, tokens):
        return self.unet(noisy, t, self.text_encoder(tokens).last_hidden_state).sample


def main() -> None:
    parser = training_parser(__doc__, "runs/unet", steps=12000, batch=96, rate=1e-3)
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/ema"))
    parser.add_argument("--init", type=Path, help="start from the weights of this pipeline, its autoencoder included")
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors with bfloat16 matrix products")
    args = parser.parse_args()

    data.download(args.data)
    images, entries = data.load(args.data)
    vae = latents.cached_vae(args.run / "vae", args.vae if args.init is None else args.init / "vae", images)
    clean, _ = latents.posteriors(vae, images)
    tokenizer = text.cached_tokenizer(args.run / "tokenizer", entries, args.init)
    torch.manual_seed(args.seed)
    model = Denoiser(build_unet(clean.shape[1]), text.build_text_model(tokenizer)).to(memory_format=torch.channels_last)
    if args.init is not None:
        # from_pretrained also reads weights that another version of transformers named differently
        unet = UNet2DConditionModel.from_pretrained(args.init / "unet")
        text_encoder = CLIPTextModel.from_pretrained(args.init / "text_encoder")
        model.load_state_dict(Denoiser(unet, text_encoder).float().state_dict())
    optimizer = MuonAdamW(model, lr=args.rate)
    run = Run(model, args.run, args.steps, args.rate, decay=0.999, seed=args.seed, falling=0.4, optimizer=optimizer)
    scheduler = build_scheduler()
    weight = weights_of_levels(scheduler.alphas_cumprod)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(images)} images", flush=True)

    def loss(batch: Batch) -> torch.Tensor:
        t = (batch.levels * 1000).long()
        noisy = scheduler.add_noise(batch.clean, batch.noise, t).contiguous(memory_format=torch.channels_last)
        target = scheduler.get_velocity(batch.clean, batch.noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            predicted = model(noisy, t, text.encode(tokenizer, batch.captions)).float()
        return (weight[t] * (predicted - target).square().mean(dim=(1, 2, 3))).mean()

    run.train(loss, Batches(clean, entries, args.batch, args.seed))


if __name__ == "__main__":
    main()
