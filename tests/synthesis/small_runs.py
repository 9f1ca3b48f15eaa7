"""Small runs of `synthesize` for the tests: the embedded pipeline with few steps, and digests of what a run writes."""

import hashlib
import json
from pathlib import Path

from kspec_guidance import load_demo_pipeline
from kspec_guidance.memory.io import read_tensors
from kspec_guidance.synthesis import synthesize

PROMPTS = ["heart", "red heart", "runner", "cat face", "man"]
CALL = {"num_inference_steps": 2, "guidance_scale": 4.0}


def quiet_pipeline():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(out, pipe=None, prompts=PROMPTS, images_per_prompt=5, batch_size=3, **kwargs):
    settings = {"call": CALL, "report": False, "sign": None, **kwargs}
    return synthesize(
        prompts, out, pipe or quiet_pipeline(), images_per_prompt=images_per_prompt, batch_size=batch_size, **settings
    )


def rows_of(out):
    return [json.loads(line) for line in Path(out, "metadata.jsonl").read_text().splitlines()]


def contents(out):
    """Digests of all files of a run, without times; of records those of their contents, since headers vary."""
    digests = {}
    for path in sorted(Path(out).rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or path.name in ("lock", "report.html", "report.json", "times.jsonl"):
            continue
        if path.suffix == ".safetensors":
            tensors, about = read_tensors(path, "prompts" if path.stem == "prompts" else "batch")
            about.pop("time", None)
            data = json.dumps(about).encode() + b"".join(tensors[k].contiguous().numpy().tobytes() for k in sorted(tensors))
        else:
            data = path.read_bytes()
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests
