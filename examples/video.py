"""Clips of one prompt, generated one at a time; the guide's memory keeps each away from the earlier ones.

    python examples/video.py "a dog runs on a beach" --clips 4

Writes OUT/0.mp4, OUT/1.mp4, ... and OUT/memory.safetensors. A later call with the same OUT continues from there.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

from kspec_guidance import SPARKE, MemoryBank


def generate_clips(pipe: Any, prompt: str, seeds: list[int], memory: MemoryBank, scale: float, call: dict) -> list[Any]:
    """Generate one clip for each seed and return the frames of each; ``memory`` grows by one row per clip."""
    guide, clips = SPARKE(scale, memory=memory), []
    for seed in seeds:
        with guide.attach(pipe):
            clips.append(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).frames[0])
        print(f"seed {seed}: {guide.report()}")
    return clips


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="a folder or hub id")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("outputs/video"))
    args = parser.parse_args(argv)

    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype, use_safetensors=True)
    pipe.to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "memory.safetensors"
    memory = MemoryBank.load(file) if file.exists() else MemoryBank()
    first = len(memory)
    call = {"num_frames": args.frames, "num_inference_steps": args.steps, "height": args.height, "width": args.width}
    seeds = [args.seed + first + k for k in range(args.clips)]
    for k, frames in enumerate(generate_clips(pipe, args.prompt, seeds, memory, args.scale, call)):
        export_to_video(frames, str(args.out / f"{first + k}.mp4"), fps=16)
    memory.save(file)


if __name__ == "__main__":
    main()
