"""The commands ``kspec-guidance evaluate`` and ``kspec-guidance compare``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kspec_guidance.cli.console import console, errors, fail, progress_bars
from kspec_guidance.evaluation.embedders.names import IMAGE_NAMES, TEXT_NAMES

__all__ = ["compare", "evaluate"]

EMBEDDER_HELP = f"Image features: {IMAGE_NAMES}."
TEXT_HELP = f"Prompt features: {TEXT_NAMES}; with none, prompts are either equal or unrelated."
OUT_HELP = "Page to write, with a JSON file of the same name."
CACHE_HELP = "Folder of cached features."


def _load(folder: Path, embedder: Any, prompts: Path | None, cache: Path | None) -> Any:
    """Load an image set, with a progress bar; what was left out is listed on the error stream."""
    from kspec_guidance.evaluation import load_images

    with progress_bars() as bars:
        task = bars.add_task(f"reading {folder.name or folder}", total=None)
        found = load_images(folder, embedder, prompts, cache, lambda n: bars.advance(task, n))
        bars.update(task, total=len(found))
    for line in found.summary():
        errors().print(f"[yellow]{escape(f'{folder.name or folder}: {line}')}[/]", highlight=False, soft_wrap=True)
    return found


def _scores(records: list, title: str, embedder: str) -> Table:
    table = Table(title=escape(title), caption=f"features: {escape(embedder)}; intervals 95%, jackknife")
    for column in ("score", "value", "interval", "kernel"):
        table.add_column(column, justify="right" if column in ("value", "interval") else "left")
    for r in records:
        bounds = f"{r.interval[0]:.3g} to {r.interval[1]:.3g}" if r.interval else ""
        kernels = [k.partition("Kernel")[0] for k in r.kernel.split(" x ")]
        table.add_row(r.score, f"{r.value:.3f}", bounds, " x ".join(dict.fromkeys(kernels)))
    return table


def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of images, .tar shards (WebDataset) or .parquet files.")],
    reference: Annotated[Path | None, typer.Option(help="A second set, for fidelity and novelty.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Captions (.jsonl, .csv, .parquet); by default those in the folder.")
    ] = None,
    embedder: Annotated[str, typer.Option(help=EMBEDDER_HELP)] = "demo",
    text_embedder: Annotated[str, typer.Option(help=TEXT_HELP)] = "none",
    out: Annotated[Path, typer.Option(help=OUT_HELP)] = Path("report.html"),
    cache: Annotated[Path | None, typer.Option(help=CACHE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, and write no page.")] = False,
) -> None:
    """Score the diversity of an image set, also given its prompts. Prints a table, and writes a page with images."""
    from kspec_guidance.evaluation import evaluate_set, write_page
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.evaluation.embedders import text_embedder as named_text_embedder

    try:
        embed, embed_text = image_embedder(embedder), named_text_embedder(text_embedder)
        images = _load(folder, embed, prompts, cache)
        other = None if reference is None else _load(reference, embed, None, cache)
        result = evaluate_set(images, embed, embed_text, other)
        if as_json:
            typer.echo(json.dumps(result.as_dict(), indent=1, default=list))
            return
        write_page(result, out)
    except (ValueError, OSError, ImportError) as error:
        raise fail(str(error)) from error
    console.print(_scores(result.scores, f"{folder}: {len(images)} images", embed.name))
    console.print(f"wrote {out} and {out.with_suffix('.json')}", highlight=False, soft_wrap=True, markup=False)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of images, .tar shards or .parquet files.")],
    second: Annotated[Path, typer.Argument(help="The second set.")],
    embedder: Annotated[str, typer.Option(help=EMBEDDER_HELP)] = "demo",
    text_embedder: Annotated[str, typer.Option(help=TEXT_HELP)] = "none",
    out: Annotated[Path, typer.Option(help=OUT_HELP)] = Path("compare.html"),
    cache: Annotated[Path | None, typer.Option(help=CACHE_HELP)] = None,
) -> None:
    """Compare the diversity of two image sets, and find modes that are more frequent in one of them."""
    from kspec_guidance.evaluation import compare_sets, write_page
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.evaluation.embedders import text_embedder as named_text_embedder

    try:
        embed, embed_text = image_embedder(embedder), named_text_embedder(text_embedder)
        a, b = _load(first, embed, None, cache), _load(second, embed, None, cache)
        result = compare_sets(a, b, embed, embed_text)
        write_page(result, out)
    except (ValueError, OSError, ImportError) as error:
        raise fail(str(error)) from error
    table = Table(title="permutation tests on equally many images", caption=f"features: {escape(embed.name)}")
    for column in ("score", "first", "second", "difference", "p"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, test in result.tests.items():
        table.add_row(name, f"{test.a:.3f}", f"{test.b:.3f}", f"{test.difference:+.3f}", f"{test.p_value:.3f}")
    console.print(table)
    console.print(_scores(result.scores, f"{first} with {second} as reference", embed.name))
    console.print(f"wrote {out} and {out.with_suffix('.json')}", highlight=False, soft_wrap=True, markup=False)
