"""A dataset on all GPUs of a machine, prompts from a file or from a dataset on the Hub.

    accelerate launch examples/many_gpus.py --prompts prompts.txt --model stabilityai/stable-diffusion-xl-base-1.0
    accelerate launch examples/many_gpus.py --dataset poloclub/diffusiondb --config 2m_text_only --max-prompts 1000

Each process generates its share of the prompts, and the processes exchange their memories. A killed run resumes when it is
started again. `kspec-guidance generate` does the same from the command line; this script is a starting point for changes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.synthesis import synthesize


def read_prompts(args: argparse.Namespace) -> Any:
    """Return the prompts in a form that ``synthesize`` takes: the path of a file, or a list without duplicates."""
    if args.prompts is not None:
        return args.prompts
    from datasets import load_dataset

    rows = load_dataset(args.dataset, args.config, split=args.split, streaming=True)
    prompts: dict[str, None] = {}  # an ordered set
    for row in rows:
        prompts.setdefault(str(row[args.column]).strip())
        if len(prompts) == args.max_prompts:
            break
    return [prompt for prompt in prompts if prompt]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", help="txt, csv, jsonl or parquet")
    source.add_argument("--dataset", help="id or folder of a dataset")
    parser.add_argument("--config")
    parser.add_argument("--split", default="train")
    parser.add_argument("--column", default="prompt")
    parser.add_argument("--max-prompts", type=int, default=1000, help="number of prompts to take from the dataset")
    parser.add_argument("--model", default="demo", help="a folder or hub id, or 'demo' for the embedded pipeline")
    parser.add_argument("--images-per-prompt", "--images", type=int, default=8)
    parser.add_argument("--batch-size", "--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--variety", type=float, default=50.0)
    parser.add_argument("--out", type=Path, default=Path("outputs/many_gpus"))
    args = parser.parse_args(argv)

    state = PartialState()
    if args.model == "demo":
        pipe: Any = load_demo_pipeline()
    else:
        from diffusers import DiffusionPipeline

        dtype = torch.float16 if state.device.type == "cuda" else torch.float32
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype, use_safetensors=True)
    pipe.to(state.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.cfg}
    result = synthesize(
        read_prompts(args), args.out, pipe, SPARKE(variety=args.variety), args.images_per_prompt, args.batch_size, call=call
    )
    state.print(result)


if __name__ == "__main__":
    main()
