"""Train the exported denoiser and decoder on, for some minutes, on a CUDA device.

    python examples/train_emoji/continue_on_gpu.py pack          # pictures and entries, as a folder of WebP sheets
    python examples/train_emoji/continue_on_gpu.py denoiser --seconds 400
    python examples/train_emoji/continue_on_gpu.py decoder --seconds 200
    python examples/train_emoji/continue_on_gpu.py decoder --seconds 0 --device cpu    loss or PSNR of the exported weights

The text encoder and the encoder of the autoencoder stay as they are, so that prompts and latents keep their meaning. Each
step is one CUDA graph: data, loss, gradient, optimizer and average. The learning rate falls by the clock.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import data
import latents
import numpy as np
import text
import torch
from batches import DROP_CAPTION, balance
from captions import Entry
from diffusers import AutoencoderKL, UNet2DConditionModel
from loop import rate
from muon import MuonAdamW
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from train_unet import build_scheduler, weights_of_levels
from train_vae import fit, psnr, to_model
from transformers import CLIPTextModel, CLIPTokenizer

EXPORTED = Path(__file__).parents[2] / "kspec_guidance" / "demo" / "assets" / "emoji"
SHEET, COLUMNS = 512, 8  # pictures a sheet
DRAWS = 64  # captions drawn for each picture
BURST = 20  # steps between two looks at the clock


def pack(folder: Path, out: Path) -> None:
    """Write the pictures as lossless WebP sheets of 512, and their entries as JSON."""
    data.download(folder)
    images, entries = data.load(folder)
    out.mkdir(parents=True, exist_ok=True)
    for k, part in enumerate(images.split(SHEET)):
        blank = part.new_zeros(-len(part) % COLUMNS, *part.shape[1:])
        rows = torch.cat([part, blank]).view(-1, COLUMNS, 3, data.SIZE, data.SIZE).permute(0, 3, 1, 4, 2)
        sheet = rows.reshape(-1, COLUMNS * data.SIZE, 3).numpy()
        Image.fromarray(sheet).save(out / f"{k:03}.webp", lossless=True, quality=90, method=5)
    (out / "entries.json").write_text(json.dumps([e.as_dict() for e in entries]))


def unpack(folder: Path) -> tuple[Tensor, list[Entry]]:
    """Read what ``pack`` wrote: uint8 ``[n, 3, 64, 64]`` and entries."""
    entries = [Entry(**e | {"families": tuple(e["families"])}) for e in json.loads((folder / "entries.json").read_text())]
    sheets = []
    for path in sorted(folder.glob("*.webp")):
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        rows = pixels.view(-1, data.SIZE, COLUMNS, data.SIZE, 3).permute(0, 2, 4, 1, 3)
        sheets.append(rows.reshape(-1, 3, data.SIZE, data.SIZE))
    return torch.cat(sheets)[: len(entries)].contiguous(), entries


class Captions:
    """States of 64 captions drawn for each picture, ``[captions, 16, width]``, on the device."""

    def __init__(self, entries: list[Entry], device: str):
        tokenizer = CLIPTokenizer.from_pretrained(EXPORTED / "tokenizer")
        encoder = CLIPTextModel.from_pretrained(EXPORTED / "text_encoder", torch_dtype=torch.float32).to(device).eval()
        known = {"": 0}
        self.places = torch.empty(len(entries), DRAWS, dtype=torch.long)
        for i, entry in enumerate(entries):
            rng = random.Random(i)
            drawn = [entry.caption(rng) for _ in range(DRAWS)]
            self.places[i] = torch.tensor([known.setdefault(c, len(known)) for c in drawn])
        self.places = self.places.to(device)
        tokens = text.encode(tokenizer, list(known))
        with torch.no_grad():
            self.states = torch.cat([encoder(t.to(device)).last_hidden_state for t in tokens.split(1024)])

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return the states of one caption of each picture, a tenth of them the empty caption."""
        chances = torch.rand(2, len(pictures), device=pictures.device)
        places = self.places[pictures, (chances[0] * DRAWS).long()]
        return self.states[torch.where(chances[1] < DROP_CAPTION, 0, places)]


class Steps:
    """Training steps of a module as one CUDA graph, on a processor one by one; ``average`` has the averaged weights."""

    def __init__(self, trained: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, decay: float):
        self.trained, self.loss, self.optimizer, self.decay = trained, loss, optimizer, decay
        self.average = copy.deepcopy(trained).requires_grad_(False)
        self.device = next(trained.parameters()).device
        self.lr = torch.zeros((), device=self.device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        self.graph: torch.cuda.CUDAGraph | None = None
        self.value = torch.zeros((), device=self.device)

    def _step(self) -> None:
        value = self.loss()
        value.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.trained.parameters()), 1 - self.decay)
            self.value.lerp_(value.detach(), 0.01)

    def _eager(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._step()

    def capture(self) -> None:
        """Warm up with three steps of learning rate 0, then record one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def train(self, seconds: float, peak: float, checked: Callable[[], str], each: float = 60.0) -> int:
        """Take steps for ``seconds``: warm-up over 3%, constant, falling by half a cosine over the last 60%."""
        if self.device.type == "cuda":
            self.capture()
        began, steps, told = time.perf_counter(), 0, each
        while (elapsed := time.perf_counter() - began) < seconds:
            self.lr.fill_(rate(int(1000 * elapsed / seconds), 1000, peak, falling=0.6, warmup=30))
            for _ in range(BURST):
                self.graph.replay() if self.graph is not None else self._eager()
            steps += BURST
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if elapsed > told or steps == BURST:
                told = max(told, elapsed) + (each if steps > BURST else 0)
                print(f"{elapsed:.0f} s, step {steps}, loss {float(self.value):.4f}, {checked()}", flush=True)
                if not math.isfinite(float(self.value)):
                    raise SystemExit("the loss is not finite: lower --rate")
        print(f"end: step {steps}, loss {float(self.value):.4f}, {checked()}", flush=True)
        return steps


def train_denoiser(images: Tensor, entries: list[Entry], args: argparse.Namespace) -> nn.Module:
    """Train the UNet as ``train_unet.py`` does, and return it with averaged weights."""
    device = args.device
    vae = AutoencoderKL.from_pretrained(EXPORTED / "vae", torch_dtype=torch.float32).to(device)
    clean = torch.cat([latents.posteriors(vae, part.to(device))[0] for part in images.split(256)])
    captions = Captions(entries, device)
    unet = UNet2DConditionModel.from_pretrained(EXPORTED / "unet", torch_dtype=torch.float32).to(device)
    if args.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    scheduler = build_scheduler()
    weight = weights_of_levels(scheduler.alphas_cumprod.to(device))
    mass = balance(entries).to(device).double().cumsum(0)
    mass = (mass / mass[-1]).float()
    part = torch.arange(args.batch, device=device)

    def error(pictures: Tensor, t: Tensor, noise: Tensor, states: Tensor, model: nn.Module) -> Tensor:
        noisy, target = (f(clean[pictures], noise, t) for f in (scheduler.add_noise, scheduler.get_velocity))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            predicted = model(noisy, t, states).sample.float()
        return weight[t] * (predicted - target).square().mean(dim=(1, 2, 3))

    def loss() -> Tensor:
        pictures = torch.searchsorted(mass, torch.rand(args.batch, device=device)).clamp_(max=len(clean) - 1)
        t = ((part + torch.rand(args.batch, device=device)) / args.batch * 1000).long().clamp_(max=999)
        noise = torch.randn(args.batch, *clean.shape[1:], device=device)
        return error(pictures, t, noise, captions(pictures), unet).mean()

    generator = torch.Generator().manual_seed(5)
    chosen = torch.multinomial(balance(entries), 512, generator=generator).to(device)
    noise = torch.randn(512, *clean.shape[1:], generator=generator).to(device)
    states = captions.states[captions.places[chosen, 0]]

    @torch.no_grad()
    def checked() -> str:
        errors = error(chosen, torch.arange(512, device=device) * 1000 // 512, noise, states, steps.average)
        quarters = [round(float(q.mean()), 3) for q in errors.chunk(4)]
        return f"averaged weights {float(errors.mean()):.4f}, by quarters {quarters}"

    steps = Steps(unet, loss, MuonAdamW(unet, lr=args.rate), args.decay)
    steps.train(args.seconds, args.rate, checked)
    return steps.average


def train_decoder(images: Tensor, entries: list[Entry], args: argparse.Namespace) -> nn.Module:
    """Train the decoder on fixed latents as ``train_vae.py`` does, and return the autoencoder with averaged weights."""
    device = args.device
    vae = AutoencoderKL.from_pretrained(EXPORTED / "vae", torch_dtype=torch.float32).to(device)
    held_out = data.held_out(entries)
    test = images[held_out].to(device)
    pictures = images[~held_out].to(device)
    pictures = torch.cat([pictures, pictures.flip(3)])
    means, spreads = (torch.cat(z) for z in zip(*(latents.posteriors(vae, p) for p in pictures.split(256)), strict=True))
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]

    def loss() -> Tensor:
        chosen = torch.randint(len(pictures), (args.batch,), device=device)
        x = to_model(pictures[chosen])
        y = vae.decode(means[chosen] + spreads[chosen] * torch.randn_like(means[chosen])).sample
        return fit(y, x)

    steps = Steps(vae, loss, MuonAdamW(vae, lr=args.rate), args.decay)
    print(f"{sum(p.numel() for p in trained) / 1e6:.2f} M parameters", flush=True)
    steps.train(args.seconds, args.rate, lambda: f"held-out PSNR {psnr(steps.average, test):.2f} dB")
    return steps.average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["pack", "denoiser", "decoder"])
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--packed", type=Path, default=Path("runs/packed"))
    parser.add_argument("--out", type=Path, help="file of the averaged weights (default: runs/<work>.safetensors)")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.999, help="of the averaged weights, a step")
    parser.add_argument("--channels-last", action="store_true", help="of the denoiser's weights")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.work == "pack":
        pack(args.data, args.packed)
        return
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images, entries = unpack(args.packed)
    average = (train_denoiser if args.work == "denoiser" else train_decoder)(images, entries, args)
    out = args.out or Path(f"runs/{args.work}.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in average.state_dict().items()}, out)


if __name__ == "__main__":
    main()
