"""Train a small transformer of Stable Diffusion 3's class on the emoji latents.  python train_transformer.py --help

Its autoencoder, tokenizer and text encoder are the embedded pipeline's, and stay as they are.
"""

import sys
from pathlib import Path

import data
import latents
import torch
from batches import Batch, Batches
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging
from loop import Run, training_parser
from muon import MuonAdamW
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.arena.networks import emoji_transformer, emoji_transformer_pipeline

ENDS = ("pos_embed", "context_embedder", "timestep_embedder", "text_embedder.linear_1", "proj_out")  # trained by AdamW
SHIFT = 1.5  # of the pipeline's scheduler


class TextStates:
    """States of the text that the pipeline gives its transformer, each caption encoded once."""

    def __init__(self, pipe: StableDiffusion3Pipeline):
        logging.set_verbosity_error()  # the longest captions are cut, as in the training of the text encoder
        self.pipe = pipe
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the transformer's arguments for n captions."""
        new = [c for c in dict.fromkeys(captions) if c not in self.known]
        if new:
            states, _, pooled, _ = self.pipe.encode_prompt(
                new, None, None, do_classifier_free_guidance=False, max_sequence_length=0
            )
            self.known.update(zip(new, zip(states.half(), pooled.half(), strict=True), strict=True))
        states, pooled = zip(*(self.known[c] for c in captions), strict=True)
        return {"encoder_hidden_states": torch.stack(states).float(), "pooled_projections": torch.stack(pooled).float()}


def shifted(s: Tensor) -> Tensor:
    """Shift noise levels in 0..1 toward noise, as the pipeline's scheduler does."""
    return SHIFT * s / (1 + (SHIFT - 1) * s)


def noise_levels(u: Tensor) -> Tensor:
    """Map uniform ``[n]`` to noise levels in 0..1: logit-normal, shifted toward noise (Esser et al., arXiv 2403.03206)."""
    return shifted(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).sigmoid())


def flow_loss(transformer: torch.nn.Module, batch: Batch, text: dict[str, Tensor]) -> Tensor:
    """Return the mean squared error of velocities, noise minus latent."""
    s = noise_levels(batch.levels)
    noisy = torch.lerp(batch.clean, batch.noise, s[:, None, None, None])
    predicted = transformer(noisy, timestep=1000 * s, return_dict=False, **text)[0].float()
    return (predicted - (batch.noise - batch.clean)).square().mean()


def main() -> None:
    parser = training_parser(__doc__, "runs/transformer", steps=5500, batch=128, rate=1.5e-3)
    parser.add_argument("--bfloat16", action="store_true", help="faster on processors with bfloat16 matrix products")
    args = parser.parse_args()

    data.download(args.data)
    images, entries = data.load(args.data)
    torch.manual_seed(args.seed)
    transformer = emoji_transformer()
    pipe = emoji_transformer_pipeline(transformer)
    text = TextStates(pipe)
    clean = latents.cached_posteriors(args.run / "latents.safetensors", pipe.vae, images)
    optimizer = MuonAdamW(transformer, lr=args.rate, ends=ENDS)
    run = Run(transformer, args.run, args.steps, args.rate, decay=0.999, seed=args.seed, falling=0.4, optimizer=optimizer)
    print(f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M parameters, {len(images)} images", flush=True)

    def loss(batch: Batch) -> Tensor:
        states = text(batch.captions)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            return flow_loss(transformer, batch, states)

    run.train(loss, Batches(clean, entries, args.batch, args.seed), save_every=50)


if __name__ == "__main__":
    main()
