"""Save the averaged weights of a run of a transformer in float16, for the arena.  python export_transformer.py --help"""

import argparse
from pathlib import Path

from loop import averaged
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/arena/weights/emoji_transformer.safetensors"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half() for k, v in averaged(args.run).items()}, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
