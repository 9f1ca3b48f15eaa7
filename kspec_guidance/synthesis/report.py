"""report.html at the end of a run: the page of `evaluate`, with what the run dropped and why it stopped."""

from pathlib import Path
from typing import Any

from kspec_guidance.evaluation.embedders.base import ImageEmbedder

__all__ = ["write_report"]

MOST = 5000  # images that are scored


def write_report(out: Path, rows: list[dict[str, Any]], said: dict[str, Any], embedder: ImageEmbedder | None) -> Path:
    """Score the set, or 5,000 evenly spaced images of it, by ``embedder`` or the embedded autoencoder."""
    from kspec_guidance.evaluation import evaluate_set
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.evaluation.image_sets import load_images
    from kspec_guidance.evaluation.page import write_page

    names = [row["file_name"] for row in rows]
    some = names if len(names) <= MOST else names[:: -(-len(names) // MOST)]
    only = set(some) | {name.rpartition("/")[2] for name in some}
    embed = embedder or image_embedder("demo")
    found = load_images(out, embed, only=only)
    notes = [f"{said['images']} images"] if len(some) == len(names) else [f"{len(some)} of {said['images']} images scored"]
    for name, words in (("rejected", "dropped"), ("stopped", "prompts ended"), ("attributes", "attributes")):
        if said[name]:
            notes.append(f"{words}: " + ", ".join(f"{k} {v}" for k, v in sorted(said[name].items())))
    path = out / "report.html"
    write_page(evaluate_set(found, embed), path, notes)
    return path
