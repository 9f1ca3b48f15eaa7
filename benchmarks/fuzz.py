"""Fuzz every file reader: each damaged input must either load or raise an error that the reader documents.

    python benchmarks/fuzz.py --inputs 100000

Bytes of valid files are flipped, inserted, removed, doubled, or replaced by input that is hard for parsers; JSON is also
altered as JSON. An undocumented error, an input that takes over five seconds, or a file outside the reader's folder is a
failure. Prints a line for each reader.
"""

import argparse
import json
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kspec_guidance import SPARKE, CentroidMemory, KernelGuidance, MemoryBank, MMDGuidance, VendiGuidance
from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.evaluation.embedders.cache import FeatureCache
from kspec_guidance.evaluation.image_sets import SourceError, read_captions
from kspec_guidance.guidance.config import read_config
from kspec_guidance.memory import MemoryFileError
from kspec_guidance.synthesis import SynthesisError
from kspec_guidance.synthesis import prompts as synthesis_prompts

HOSTILE_BYTES = [
    b"\0", b"\xff\xfe", b"../../../etc/passwd", b"1e999", b"-1", b"9" * 400, b"{" * 5000, b"[" * 5000, b"x" * 140_000,
    b"NaN", b'"', b"\r\n", b"\xe2\x80\xa8", b"\\u0000", b"cos\nsystem\n",
    (2**63 - 1).to_bytes(8, "little"), b"\x80\x04\x95",
]  # fmt: skip
HOSTILE_VALUES: list[Any] = [None, True, -1, 2**70, 1e308, "", "\0", "../x", [], {}, [[]], "NaN", {"a": {}}, "x" * 3000]


@dataclass
class Reader:
    """A reader, valid inputs for it, and its documented errors."""

    name: str
    suffix: str
    valid: list[bytes]
    read: Callable[[Path], Any]
    errors: tuple[type[BaseException], ...]


def altered(value: Any, r: random.Random) -> Any:
    """JSON with one value replaced or left out."""
    if r.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return r.choice(HOSTILE_VALUES)
    if isinstance(value, dict):
        key = r.choice(list(value))
        if r.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: altered(value[key], r)}
    index = r.randrange(len(value))
    return [*value[:index], altered(value[index], r), *value[index + 1 :]]


def damaged(data: bytes, r: random.Random) -> bytes:
    """The data with one to four changes."""
    if r.random() < 0.3:
        try:
            lines = data.decode().splitlines()
            k = r.randrange(len(lines)) if data[:1] == b"{" and len(lines) > 1 else None
            text = data.decode() if k is None else lines[k]
            changed = json.dumps(altered(json.loads(text), r))
            return (changed if k is None else "\n".join([*lines[:k], changed, *lines[k + 1 :]])).encode()
        except (ValueError, UnicodeError, IndexError):
            pass
    out = bytearray(data)
    for _ in range(r.randint(1, 4)):
        a, b = sorted((r.randrange(len(out) + 1), r.randrange(len(out) + 1)))
        b = min(b, a + r.choice((1, 1, 2, 8, 64, 100_000)))
        match r.randrange(6):
            case 0 if out:
                out[min(a, len(out) - 1)] ^= 1 << r.randrange(8)
            case 1:
                out[a:b] = b""
            case 2:
                out[a:a] = r.choice(HOSTILE_BYTES)
            case 3:
                out[a:b] = out[a:b] * 2
            case 4:
                del out[a:]
            case _:
                out[a : a + 8] = r.randbytes(8)
    return bytes(out)


def readers(work: Path) -> list[Reader]:
    """All readers of files that may be untrusted."""
    g = torch.Generator().manual_seed(0)
    bank, centroids = MemoryBank("x0", "words"), CentroidMemory(4)
    for memory in (bank, centroids):
        memory.add(torch.randn(6, 5, generator=g), torch.randn(6, 3, generator=g))
        memory.save(work / f"{type(memory).__name__}.safetensors")
    guides = [SPARKE(), VendiGuidance(order=0.5) + MMDGuidance(torch.randn(5, 4, 2, 2, generator=g))]
    configs, tensors = [], b""
    for k, guide in enumerate(guides):
        guide.save_config(work / f"guide{k}")
        configs.append((work / f"guide{k}" / "kspec_guidance.json").read_bytes())
        found = list((work / f"guide{k}").glob("*.safetensors"))
        tensors = found[0].read_bytes() if found else tensors
    embedder = ImageEmbedder(lambda x: x.flatten(1)[:, :7], 8, "fuzz", fingerprint="0" * 64)
    cache = FeatureCache(work / "cache", embedder)
    cache.rows["a" * 64] = torch.randn(7, generator=g)
    cache.save()
    cached = [p for p in (work / "cache").rglob("*") if p.is_file()]
    lines = b'{"file_name": "a.png", "prompt": "heart"}\n{"file_name": "b.png", "text": "runner"}\n'
    synthesis_lines = b'{"prompt": "heart", "group": "things", "images": 2}\n{"prompt": "runner"}\n'

    def guide_of(path: Path) -> Any:
        folder = work / "guide1"
        (folder / "kspec_guidance.json").write_bytes(path.read_bytes())
        return KernelGuidance.from_config(folder)

    def tensors_of(path: Path) -> Any:
        folder = work / "guide1b"
        folder.mkdir(exist_ok=True)
        (folder / "kspec_guidance.json").write_bytes(configs[1])
        (folder / "kspec_guidance.safetensors").write_bytes(path.read_bytes())
        return read_config(folder)

    def cache_of(path: Path) -> Any:
        cached[0].write_bytes(path.read_bytes())
        return FeatureCache(work / "cache", embedder)

    bad = (ValueError, TypeError)
    return [
        Reader("MemoryBank.load", ".safetensors", [(work / "MemoryBank.safetensors").read_bytes()], MemoryBank.load,
               (MemoryFileError,)),
        Reader("CentroidMemory.load", ".safetensors", [(work / "CentroidMemory.safetensors").read_bytes()],
               CentroidMemory.load, (MemoryFileError,)),
        Reader("KernelGuidance.from_config", ".json", configs, guide_of, bad),
        Reader("references of a config", ".safetensors", [tensors], tensors_of, bad),
        Reader("FeatureCache", ".safetensors", [cached[0].read_bytes()], cache_of, bad),
        Reader("captions, jsonl", ".jsonl", [lines], read_captions, (SourceError,)),
        Reader("captions, csv", ".csv", [b"file_name,prompt\na.png,heart\nb.png,\"run, ner\"\n"], read_captions,
               (SourceError,)),
        Reader("synthesis prompts, jsonl", ".jsonl", [synthesis_lines], synthesis_prompts.read_prompts, (SynthesisError,)),
        Reader("synthesis prompts, csv", ".csv", [b"prompt,group\nheart,things\nrunner,people\n"],
               synthesis_prompts.read_prompts, (SynthesisError,)),
        Reader("synthesis prompts, json", ".json", [b'[{"prompt": "heart", "images": 2}, "runner"]'],
               synthesis_prompts.read_prompts, (SynthesisError,)),
    ]  # fmt: skip


def fuzz(inputs: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Counts of ``inputs`` damaged files, divided among the readers, and the failures with their bytes."""
    r, found = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        all_readers = readers(work)
        given = work / "given"
        given.mkdir()
        for reader in all_readers:
            counts: dict[str, Any] = {"inputs": 0, "loaded": 0, "refused": 0, "failures": []}
            for _ in range(inputs // len(all_readers)):
                data = damaged(r.choice(reader.valid), r)
                path = given / f"file{reader.suffix}"
                path.write_bytes(data)
                began = time.perf_counter()
                counts["inputs"] += 1
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        reader.read(path)
                    counts["loaded"] += 1
                except reader.errors:
                    counts["refused"] += 1
                except Exception as error:
                    counts["failures"].append((f"{type(error).__name__}: {error}"[:200], data[:400].hex()))
                if time.perf_counter() - began > 5:
                    counts["failures"].append(("took over five seconds", data[:400].hex()))
            outside = [p.name for p in Path(folder).iterdir() if p.name != "work"] + [
                p.name for p in given.iterdir() if p.stem != "file"
            ]
            if outside:
                counts["failures"].append((f"wrote {outside}", ""))
            found[reader.name] = counts
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = fuzz(args.inputs, args.seed)
    for name, c in found.items():
        print(
            f"{name:32}{c['inputs']:8} inputs{c['loaded']:8} loaded{c['refused']:8} refused{len(c['failures']):6} failures"
        )
        for what in sorted({f[0] for f in c["failures"]})[:8]:
            print(f"    {what}   e.g. {next(d for w, d in c['failures'] if w == what)[:160]}")
    raise SystemExit(any(c["failures"] for c in found.values()))


if __name__ == "__main__":
    main()
