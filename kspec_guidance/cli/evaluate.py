"""The commands ``kspec-guidance evaluate``, ``compare`` and ``embeddings``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from kspec_guidance.cli.arguments import (
    FEATURES,
    IMAGE_EMBEDDERS,
    JUDGES,
    OUTPUT,
    TEXT_EMBEDDERS,
    Cache,
    Embedder,
    Json,
    Quiet,
    TextEmbedder,
    Version,
    existing_file,
    finite,
    named,
    page_option,
)
from kspec_guidance.cli.console import Output, command_output

__all__ = ["compare", "embeddings", "evaluate"]

SETS = "Image sets"
SET_HELP = "Folder of images, .tar shards (WebDataset) or .parquet files."
DROP_HELP = "Text file of names of images to leave out, one a line, as a report lists near-duplicates."
PROMPTS_HELP = "Captions (.jsonl, .csv, .tsv, .parquet; - for standard input); by default those in the folder."
HELD_OUT_HELP = "Real images that no model was trained on: how much less diverse is each set, among equally many?"

MODES_HELP = "Folder to create, with copies of the images by kind."
LOG_HELP = "Log all figures: trackio:PROJECT, wandb:PROJECT or tensorboard:FOLDER."
JUDGE_HELP = f"Judge of prompt agreement: {', '.join(JUDGES)}; auto is CLIP, if cached."
PERCEPTUAL_HELP = "Also the mean distance of two images of a prompt, if installed: lpips, dreamsim; may be repeated."
Judge = Annotated[str, typer.Option(help=JUDGE_HELP, rich_help_panel=FEATURES, callback=named(*JUDGES))]
Drop = Annotated[Path | None, typer.Option(help=DROP_HELP, rich_help_panel=SETS, callback=existing_file)]

EMBEDDER_HELP = f"Embedder: {', '.join(IMAGE_EMBEDDERS)}."
SECOND_TEXT_HELP = "Prompt features beside the second embedder; by default the same."
EPS_HELP = "How many alike images the other embedder may see in a grouping."

SecondTextEmbedder = Annotated[
    str | None, typer.Option(help=SECOND_TEXT_HELP, rich_help_panel=FEATURES, callback=named(*TEXT_EMBEDDERS))
]
Log = Annotated[str | None, typer.Option(help=LOG_HELP, rich_help_panel=OUTPUT)]


def _tracker(log: str | None) -> Any:
    """A function that logs figures; it does nothing without a target."""
    from kspec_guidance.evaluation.exports import tracker

    return (lambda figures, name: None) if log is None else tracker(log)


def _load(
    output: Output,
    folder: Path,
    embedder: Any,
    prompts: Path | None,
    cache: Path | None,
    drop: Path | None = None,
    judge: Any = None,
    again: bool = False,
) -> Any:
    """Load an image set, with a progress bar; what was left out is listed on the error stream, unless it is read again."""
    from kspec_guidance.evaluation import load_images
    from kspec_guidance.evaluation.image_sets import read_names

    names = set() if drop is None else read_names(drop)
    with output.progress_bars() as bars:
        task = bars.add_task(f"reading {folder.name or folder}", total=None)
        found = load_images(folder, embedder, prompts, cache, lambda n: bars.advance(task, n), drop=names, judge=judge)
        bars.update(task, total=len(found))
    for line in [] if again else found.summary():
        output.warning(f"{folder.name or folder}: {line}")
    return found


def _embedders(output: Output, embedder: str, text_embedder: str, cache: Path | None) -> tuple[Any, Any]:
    output.note(f"loading embedder {embedder} ...")
    if cache is not None:
        output.kept = f"features are kept in {cache}; run the same command again to continue with them"
    from kspec_guidance.evaluation import embedders

    return embedders.image_embedder(embedder), embedders.text_embedder(text_embedder)


def _judge(name: str, folders: list[Path], embedder: Any, text_embedder: Any) -> Any:
    """The judge with this name; ``auto`` takes the embedders themselves if they have one space."""
    from kspec_guidance.evaluation.judges import clip_judge, prompt_judge

    if name == "auto" and embedder.name == text_embedder.name:
        return clip_judge(embedder, text_embedder)
    found = [prompt_judge(name, folder) for folder in folders]
    return found[0] if all(f is not None and found[0] is not None and f.name == found[0].name for f in found) else None


def _write(output: Output, result: Any, out: Path | None, default: str) -> list[str]:
    """Write the page, unless only JSON is wanted, and return the names of its files."""
    from kspec_guidance.evaluation import write_page

    if output.as_json and out is None:
        return []
    out = Path(default) if out is None else out
    files = write_page(result, out)
    output.wrote(*files)
    return [str(file) for file in files]


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
    folder: Annotated[Path, typer.Argument(help=SET_HELP, exists=True)],
    reference: Annotated[
        Path | None, typer.Option(help="A second set, for fidelity and novelty.", rich_help_panel=SETS, exists=True)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help=PROMPTS_HELP, rich_help_panel=SETS, callback=existing_file),
    ] = None,
    drop: Drop = None,
    embedder: Embedder = "auto",
    text_embedder: TextEmbedder = "none",
    judge: Judge = "auto",
    perceptual: Annotated[list[str] | None, typer.Option(help=PERCEPTUAL_HELP, rich_help_panel=FEATURES)] = None,
    cache: Cache = None,
    out: Annotated[Path | None, page_option("report.html")] = None,
    modes_to: Annotated[Path | None, typer.Option(help=MODES_HELP, rich_help_panel=OUTPUT, file_okay=False)] = None,
    log: Log = None,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """How many different images a set has, also given its prompts. Prints the answer, and writes a page with images."""
    with command_output(as_json, quiet) as output:
        track = _tracker(log)
        from kspec_guidance.evaluation import evaluate_set
        from kspec_guidance.evaluation.exports import copy_by_kind
        from kspec_guidance.evaluation.perceptual import pair_distance

        distances = {name: pair_distance(name) for name in perceptual or []}
        embed, embed_text = _embedders(output, embedder, text_embedder, cache)

        decide = _judge(judge, [folder], embed, embed_text)
        images = _load(output, folder, embed, prompts, cache, drop, decide)
        other = None if reference is None else _load(output, reference, embed, None, cache)
        result = evaluate_set(images, embed, embed_text, other, distances=distances)
        files = _write(output, result, out, "report.html")
        if modes_to is not None:
            output.wrote(copy_by_kind(result, modes_to))
        track(result.scalars(), folder.name or "evaluate")
        record = {**result.as_dict(), "files": files}
        output.result(record, *result.summary(), _scores(result.scores, f"{folder}: {len(images)} images", embed.name))


def compare(
    first: Annotated[Path, typer.Argument(help=SET_HELP, exists=True)],
    second: Annotated[Path, typer.Argument(help="The second set.", exists=True)],
    reference: Annotated[Path | None, typer.Option(help=HELD_OUT_HELP, rich_help_panel=SETS, exists=True)] = None,
    drop: Drop = None,
    embedder: Embedder = "auto",
    text_embedder: TextEmbedder = "none",
    judge: Judge = "auto",
    cache: Cache = None,
    out: Annotated[Path | None, page_option("compare.html")] = None,
    log: Log = None,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Compare the diversity of two image sets, and find kinds of images that are more frequent in one of them."""
    with command_output(as_json, quiet) as output:
        track = _tracker(log)
        embed, embed_text = _embedders(output, embedder, text_embedder, cache)
        from kspec_guidance.evaluation import compare_sets

        decide = _judge(judge, [first, second], embed, embed_text)
        a, b = (_load(output, folder, embed, None, cache, drop, decide) for folder in (first, second))
        held_out = None if reference is None else _load(output, reference, embed, None, cache)
        result = compare_sets(a, b, embed, embed_text, reference=held_out)
        files = _write(output, result, out, "compare.html")
        track(result.scalars(), f"{first.name}-{second.name}")
        table = Table(title="permutation tests on equally many images", caption=f"features: {escape(embed.name)}")
        for column in ("score", "first", "second", "difference", "p"):
            table.add_column(column, justify="left" if column == "score" else "right")
        for name, test in result.tests.items():
            table.add_row(name, f"{test.a:.3f}", f"{test.b:.3f}", f"{test.difference:+.3f}", f"{test.p_value:.3f}")
        record = {**result.as_dict(), "files": files}
        output.result(
            record, *result.summary(), table, _scores(result.scores, f"{first} with {second} as reference", embed.name)
        )


def embeddings(
    first: Annotated[str, typer.Argument(help=EMBEDDER_HELP, callback=named(*IMAGE_EMBEDDERS))],
    second: Annotated[str, typer.Argument(help="The second embedder.", callback=named(*IMAGE_EMBEDDERS))],
    folder: Annotated[Path, typer.Argument(help=SET_HELP, exists=True)],
    prompts: Annotated[
        Path | None,
        typer.Option(help=f"{PROMPTS_HELP} The text modality.", rich_help_panel=SETS, callback=existing_file),
    ] = None,
    directions: Annotated[
        int, typer.Option(min=1, help="Groupings of each embedder, at most.", rich_help_panel=FEATURES)
    ] = 6,
    eps: Annotated[float, typer.Option(min=0, help=EPS_HELP, rich_help_panel=FEATURES, callback=finite)] = 4.0,
    text_embedder: TextEmbedder = "none",
    second_text_embedder: SecondTextEmbedder = None,
    drop: Drop = None,
    cache: Cache = None,
    out: Annotated[Path | None, page_option("embeddings.html")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """What one embedder groups in a set of images and another does not, both ways. Writes a page with the images."""
    with command_output(as_json, quiet) as output:
        output.note(f"loading embedders {first} and {second} ...")
        from kspec_guidance.evaluation import embedders
        from kspec_guidance.evaluation.embeddings import LEAST_IMAGES, compare_embeddings

        a, b = (embedders.image_embedder(name) for name in (first, second))
        text_a = embedders.text_embedder(text_embedder)
        text_b = text_a if second_text_embedder is None else embedders.text_embedder(second_text_embedder)
        images = _load(output, folder, a, prompts, cache, drop)
        known = [p for p in images.prompts or [] if p is not None]
        if prompts is not None and (len(known) < LEAST_IMAGES or len(set(known)) < 2):
            raise ValueError(
                f"images are compared with their prompts if {LEAST_IMAGES} or more have one, and not all the same; "
                f"{prompts} gives {len(known)} of {len(images)} images {len(set(known))} different prompts"
            )
        same = _load(output, folder, b, None, cache, drop, again=True)
        result = compare_embeddings(images, same, a, b, directions, eps, (text_a, text_b))
        files = _write(output, result, out, "embeddings.html")
        tables = [
            _groupings(found, f"{title}only {mine['name']}", other["name"])
            for title, part in (("", result), ("images with prompts: ", result.joint))
            if part is not None
            for found, mine, other in ((part.only_a, result.a, result.b), (part.only_b, result.b, result.a))
            if found
        ]
        output.result({**result.as_dict(), "files": files}, *result.summary(), *tables)


def _groupings(found: list, title: str, other: str) -> Table:
    table = Table(title=escape(title), caption=f"alike images that {escape(other)} sees in them are in brackets")
    for column in ("alike images", "one side", "the other side"):
        table.add_column(column, justify="right")
    for g in found:
        table.add_row(f"{g.alike:.1f} ({g.alike_other:.1f})", str(len(g.first)), str(len(g.second)))
    return table
