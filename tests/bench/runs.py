"""Folders of comparisons, made of small images of one colour each."""

import json
from pathlib import Path

from PIL import Image

from kspec_guidance.bench.store import Run

METHODS = {"plain": [None], "sparke": ["25", "50"], "cads": [None]}


def make_run(folder: Path, prompts=5, images=3, methods=METHODS, model="tiny", left_out=(), truth=None, names=None) -> Run:
    """A run whose image i of prompt k of the s-th strength of the m-th method has the colour (100 m + 10 s, 10 k, 20 i).

    ``left_out``: groups (method, strength, prompt) that are not finished. ``names``: texts of the prompts.
    """
    texts = names or [f"prompt {k}" for k in range(prompts)]
    settings = {
        "model": {"name": model}, "images": images, "steps": 2, "seed": 0, "device": "cpu",
        "prompts": [{"index": k, "text": text, **({"truth": truth} if truth else {})} for k, text in enumerate(texts)],
        "methods": [{"name": m, "strengths": s, "chosen": None} for m, s in methods.items()],
    }  # fmt: skip
    lines = []
    for m, (method, strengths) in enumerate(methods.items()):
        for s, strength in enumerate(strengths):
            for k in range(len(texts)):
                for number in range(images):
                    file = f"images/{method}/{strength or 'plain'}/{k:06d}-{number:03d}.png"
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (100 * m + 10 * s, 10 * k, 20 * number)).save(folder / file)
                    added = None if method == "plain" else float(m)
                    lines.append({
                        "method": method, "strength": strength, "prompt": k, "number": number, "seed": number, "file": file,
                        "seconds": 1.0 + m, "added_seconds": added, "peak_bytes": 2**20,
                    })  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "records").mkdir()
    done = [line for line in lines if (line["method"], line["strength"], line["prompt"]) not in left_out]
    (folder / "records" / "rank-0000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in done))
    return Run(folder)
