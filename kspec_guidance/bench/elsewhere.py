"""Scores whose packages ask for other versions of torch and transformers: run this file in an environment of their own.

    python -m venv vqa && vqa/bin/pip install t2v-metrics
    vqa/bin/python kspec_guidance/bench/elsewhere.py OUT vqascore

It needs nothing of kspec_guidance. Values are appended to ``OUT/scores/elsewhere/NAME.jsonl``, one line an image, and a run
that was broken off goes on. ``kspec-guidance bench`` takes them from there.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["INSTALL", "SCORERS", "values_file"]

Scorer = Callable[[Sequence[str], str], list[float]]  # files of images and the prompt of all of them, to values

INSTALL = {"vqascore": "t2v-metrics", "image_reward": "image-reward", "hpsv3": "hpsv3"}


def vqascore(device: str) -> Scorer:
    """VQAScore by CLIP-FlanT5 (Lin et al. 2024, arXiv 2404.01291)."""
    model = import_module("t2v_metrics").VQAScore(model="clip-flant5-xxl", device=device)
    return lambda files, prompt: [row[0].item() for row in model(images=list(files), texts=[prompt])]


def image_reward(device: str) -> Scorer:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977)."""
    model = import_module("ImageReward").load("ImageReward-v1.0", device=device)

    def score(files: Sequence[str], prompt: str) -> list[float]:
        found = model.score(prompt, list(files))  # a number for one image
        return [float(v) for v in (found if isinstance(found, list) else [found])]

    return score


def hpsv3(device: str) -> Scorer:
    """HPSv3 (Ma et al. 2025, arXiv 2508.03789): the mean of its estimate, whose other column is the deviation."""
    model = import_module("hpsv3").HPSv3RewardInferencer(device=device)
    return lambda files, prompt: [
        row[0].item() for row in model.reward(image_paths=list(files), prompts=[prompt] * len(files))
    ]


SCORERS: dict[str, Callable[[str], Scorer]] = {"vqascore": vqascore, "image_reward": image_reward, "hpsv3": hpsv3}


def values_file(folder: Path, name: str) -> Path:
    """Where the values of a score lie."""
    return folder / "scores" / "elsewhere" / f"{name}.jsonl"


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; none if there is no file."""
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue  # the last line of a process that was killed
        if isinstance(found, dict):
            yield found


def score_run(folder: Path, name: str, device: str) -> int:
    """Score the images of a run that have no value yet, group by group.

    Returns:
        How many images were scored.
    """
    out = values_file(folder, name)
    prompts = {p["index"]: p["text"] for p in json.loads((folder / "settings.json").read_text(encoding="utf-8"))["prompts"]}
    done = {line["file"] for line in lines(out)}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path in sorted((folder / "records").glob("*.jsonl")):
        for r in lines(path):
            if r["file"] not in done and (folder / r["file"]).is_file():
                groups.setdefault((r["method"], r["strength"], r["prompt"]), []).append(r["file"])
    if not groups:
        return 0
    scorer, count = SCORERS[name](device), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    cut = out.is_file() and not out.read_bytes().endswith(b"\n")  # by the end of a process
    with out.open("a", encoding="utf-8") as file:
        file.write("\n" if cut else "")
        for (*_, prompt), files in groups.items():
            values = scorer([str(folder / f) for f in files], prompts[prompt])
            for f, value in zip(files, values, strict=True):
                file.write(json.dumps({"file": f, "bytes": (folder / f).stat().st_size, "value": value}) + "\n")
            file.flush()
            count += len(files)
            print(f"\r{count} images", end="", flush=True)
    print()
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("name", choices=SCORERS)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    print(f"{score_run(args.folder, args.name, args.device)} images scored, in {values_file(args.folder, args.name)}")


if __name__ == "__main__":
    main()
