"""A dataset on all GPUs of a machine, prompts from a file or from a dataset on the Hub.

    accelerate launch examples/many_gpus.py --prompts prompts.txt --model stabilityai/stable-diffusion-xl-base-1.0
    accelerate launch examples/many_gpus.py --dataset poloclub/diffusiondb --config 2m_text_only --column prompt --most 1000

Each process takes its share of the prompts; their memories are exchanged as they go. Killed, it goes on when run again.
`kspec-guidance generate` does the same from the command line; this is for those who want to change something.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.synthesis import synthesize


def read(args: argparse.Namespace) -> Any:
    """Prompts as synthesize takes them."""
    if args.prompts is not None:
        return args.prompts
    from datasets import load_dataset

    rows = load_dataset(args.dataset, args.config, split=args.split, streaming=True)
    found: dict[str, None] = {}  # in order, each once
    for row in rows:
        found.setdefault(str(row[args.column]).strip())
        if len(found) == args.most:
            break
    return [prompt for prompt in found if prompt]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", help="txt, csv, jsonl or parquet")
    source.add_argument("--dataset", help="id or folder of a dataset")
    parser.add_argument("--config")
    parser.add_argument("--split", default="train")
    parser.add_argument("--column", default="prompt")
    parser.add_argument("--most", type=int, default=1000, help="prompts taken from the dataset")
    parser.add_argument("--model", default="demo", help="a folder or hub id; 'demo' is the embedded pipeline")
    parser.add_argument("--images", type=int, default=8, help="of each prompt")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("outputs/many_gpus"))
    args = parser.parse_args(argv)

    state = PartialState()
    if args.model == "demo":
        pipe: Any = load_demo_pipeline()
    else:
        from diffusers import DiffusionPipeline

        dtype = torch.float16 if state.device.type == "cuda" else torch.float32
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype, use_safetensors=True)
    pipe.to(state.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.cfg}
    result = synthesize(read(args), args.out, pipe, SPARKE(args.scale), args.images, args.batch, call=call)
    state.print(result)


if __name__ == "__main__":
    main()
