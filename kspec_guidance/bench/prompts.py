"""Prompts of a comparison: a set of our own, and readers for those that papers use, from the files that they publish.

The published files are not bundled: each has a licence of its own. ``coco:1000`` are the first thousand prompts in their
published order.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.prompt_files import read_rows
from kspec_guidance.utils.arguments import choices
from kspec_guidance.utils.messages import warn_user

__all__ = ["SOURCES", "BenchPrompt", "Source", "read_bench_prompts"]

BUNDLED = Path(__file__).parent / "assets" / "prompts.jsonl"
TEXT_COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "sentence")
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt.

    Attributes:
        text: what the pipeline is given.
        truth: what its source states of it, such as ``attributes``: a mapping from names of attributes that the prompt
            leaves open to their values.
    """

    text: str
    truth: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A published set of prompts.

    Attributes:
        title: its name in texts.
        files: names of its file, or folder, as published; the first that is found is read.
        read: its rows, from the path of the file.
        prompt: the prompt of a row; None for rows without one.
        home: where it is published.
        sha256: of the file, where it is known, in hexadecimal.
        seen: whether the reader was written with the file, or code that reads it, at hand.
    """

    title: str
    files: tuple[str, ...]
    read: Callable[[Path], Rows]
    prompt: Callable[[Mapping[str, Any]], BenchPrompt | None]
    home: str
    sha256: str | None = None
    seen: bool = True


# -- rows of files -----------------------------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SynthesisError(f"{path} is not JSON: {error}") from error


def _rows(path: Path) -> Rows:
    """Rows of a table; lines of a text as rows with a column ``prompt``."""
    for _, row in read_rows(str(path)):
        yield row if isinstance(row, Mapping) else {"prompt": str(row).strip()}


def _parti(path: Path) -> Rows:
    """Rows of the table, whose cells have quotes in several ways, so that no reader of tables takes all of them."""

    def cells(line: str) -> list[str]:
        found = (cell.strip() for cell in line.split("\t"))
        return [c[1:-1].replace('""', '"') if len(c) > 1 and c[0] == c[-1] == '"' else c for c in found]

    header, *lines = path.read_text(encoding="utf-8").splitlines()
    return [dict(zip(cells(header), cells(line), strict=False)) for line in lines if line.strip()]


def _coco(path: Path) -> Rows:
    """One caption of each image, the first, in the order of the images."""
    found = _json(path)
    try:
        first: dict[Any, dict[str, Any]] = {}
        for annotation in sorted(found["annotations"], key=lambda a: a["id"]):
            first.setdefault(annotation["image_id"], annotation)
        return [first[image["id"]] for image in found["images"] if image["id"] in first]
    except (KeyError, TypeError) as error:
        raise SynthesisError(f"{path} has no images and annotations as in COCO's files of captions ({error})") from error


def _dpg(path: Path) -> Rows:
    """One prompt a text file, or the table of propositions, in which each prompt is repeated."""
    if path.is_dir():
        files = sorted(path.glob("*.txt"), key=lambda p: (len(p.stem), p.stem))
        return [{"item_id": p.stem, "prompt": p.read_text(encoding="utf-8").strip()} for p in files]
    first: dict[str, Mapping[str, Any]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            first.setdefault(row.get("item_id") or "", row)
    return list(first.values())


def _imagenet(path: Path) -> Rows:
    """Classes, from a JSON file by their number, or lines of names, after their WordNet identifiers if these are given."""
    if path.suffix == ".json":
        for row in _json(path).values():
            label = row["label"] if isinstance(row, dict) else row[1]
            yield {"label": label.replace("_", " ")}
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        first, _, rest = line.strip().partition(" ")
        name = rest if first[:1] == "n" and first[1:].isdecimal() else line
        if name.strip():
            yield {"label": name.split(",")[0].strip()}


def _dimcim(path: Path) -> Rows:
    """Coarse prompts with the attributes of their concept: the first of each concept, then the second, and so on."""

    def of(file: Path) -> Iterator[dict[str, Any]]:
        found = _json(file)
        beside = path / "seed_captions_attributes" / f"{found['concept']}_seed_captions_attributes.json"
        attributes = _json(beside).get("attributes", {}) if beside.is_file() else {}
        for row in found["coarse_dense_prompts"]:
            yield {"prompt": row["coarse_prompt"], "concept": found["concept"], "attributes": attributes}

    files = sorted((path / "dense_prompts").glob("*_dense_prompts.json"))
    return [row for row in chain.from_iterable(zip_longest(*map(of, files))) if row is not None]


# -- prompts of rows ---------------------------------------------------------------------------------------------------


def _column(row: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these columns that a row has, whatever the case of its name."""
    lower = {str(k).strip().lower(): v for k, v in row.items()}
    return next((lower[n] for n in names if lower.get(n) not in (None, "")), None)


def _plain(*kept: str) -> Callable[[Mapping[str, Any]], BenchPrompt | None]:
    """The prompt of a row with a column of texts; further columns that are kept."""

    def prompt(row: Mapping[str, Any]) -> BenchPrompt | None:
        text = _column(row, *TEXT_COLUMNS)
        text = text[0] if isinstance(text, list) and text else text  # data sets of COCO list all captions
        if not isinstance(text, str):
            raise SynthesisError(f"no column {', '.join(TEXT_COLUMNS)} of texts; it has {', '.join(map(str, row))}")
        truth = {name: value for name in kept if (value := _column(row, name)) is not None}
        return BenchPrompt(text.strip(), truth) if text.strip() else None

    return prompt


def _class(row: Mapping[str, Any]) -> BenchPrompt:
    label = _column(row, "label", "class", "text")
    if not isinstance(label, str):
        raise SynthesisError(f"no column label of names; the columns are {', '.join(map(str, row))}")
    return BenchPrompt(f"A photo of {label}", {"class": label})


def _concept(row: Mapping[str, Any]) -> BenchPrompt:
    concept, attribute = _column(row, "concept"), _column(row, "attribute", "aspect", "factor_of_variation")
    if not (isinstance(concept, str) and isinstance(attribute, str)):
        raise SynthesisError(
            f"no columns concept and attribute; it has {', '.join(map(str, row))}: rename them, since the published file "
            "was not at hand when this reader was written"
        )
    article = "an" if concept[:1].lower() in "aeiou" else "a"
    text = _column(row, "prompt") or f"An image of {article} {concept}"
    return BenchPrompt(str(text), {"concept": concept, "attributes": {attribute: []}})


SOURCES: dict[str, Source] = {
    "coco": Source(
        "COCO 2017, captions of the validation images",
        ("captions_val2017.json", "annotations/captions_val2017.json"),
        _coco,
        _plain(),
        "annotations_trainval2017.zip at cocodataset.org",
    ),
    "coco2014": Source(
        "COCO 2014, captions of the validation images",
        ("captions_val2014.json", "annotations/captions_val2014.json"),
        _coco,
        _plain(),
        "annotations_trainval2014.zip at cocodataset.org",
    ),
    "geneval": Source(
        "GenEval",
        ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl"),
        _rows,
        _plain("tag", "include", "exclude"),
        "prompts/ of github.com/djghosh13/geneval",
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    ),
    "drawbench": Source(
        "DrawBench",
        ("DrawBench.csv", "drawbench.csv", "drawbench_prompts.txt"),
        _rows,
        _plain("category"),
        "the sheet that imagen.research.google links to",
    ),
    "parti": Source(
        "PartiPrompts",
        ("PartiPrompts.tsv",),
        _parti,
        _plain("category", "challenge"),
        "github.com/google-research/parti",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    ),
    "dpg": Source(
        "DPG-Bench",
        ("dpg_bench.csv", "dpg_bench/dpg_bench.csv", "dpg_bench/prompts"),
        _dpg,
        _plain("item_id"),
        "dpg_bench/ of github.com/TencentQQGYLab/ELLA",
    ),
    "imagenet": Source(
        "ImageNet classes",
        ("imagenet_class_index.json", "imagenet_full.json", "imagenet_classes.txt", "LOC_synset_mapping.txt"),
        _imagenet,
        _class,
        "Keras (imagenet_class_index.json), or datasets/ of github.com/L-YeZhu/GASS_T2I (imagenet_full.json)",
    ),
    "dimcim": Source(
        "COCO-DIMCIM",
        ("COCO-DIMCIM",),
        _dimcim,
        _plain("concept", "attributes"),
        "github.com/facebookresearch/DIMCIM",
    ),
    "concepts": Source(
        "the 86 concept-attribute pairs of arXiv 2511.10547",
        ("t2i_diversity.csv",),
        _rows,
        _concept,
        "storage.googleapis.com/t2i-diversity/t2i_diversity/",
        seen=False,
    ),
}


def read_bench_prompts(name: str, where: str | Path | None = None) -> list[BenchPrompt]:
    """The prompts of a comparison.

    Args:
        name: ``bundled``, one of :data:`SOURCES`, or a file of own prompts; with a number after a colon, the first so many.
        where: of a published source, its file, a folder that holds it under its published name, or the name of a data set
            of the hub with the same columns; by default the current folder.

    Raises:
        SynthesisError: for unknown names, files that are missing or have another form, or more prompts than there are.
    """
    source, _, number = name.rpartition(":") if name.rpartition(":")[2].isdecimal() else (name, "", "")
    if number and int(number) < 1:
        raise SynthesisError(f"--prompts {name}: give a number of at least 1")
    if source == "bundled":
        prompts = [BenchPrompt(row["prompt"], {"attributes": row["attributes"]}) for row in _rows(BUNDLED)]
    elif source in SOURCES:
        prompts = _published(source, SOURCES[source], where)
    elif Path(source).exists():
        prompts = [p for row in _rows(Path(source)) if (p := _plain("attributes")(row)) is not None]
    else:
        raise SynthesisError(f"no prompts named {source!r}, and no such file; {choices(source, ['bundled', *SOURCES])}")
    if number and int(number) > len(prompts):
        raise SynthesisError(f"{source} has {len(prompts)} prompts, fewer than the {number} of --prompts {name}")
    return prompts[: int(number)] if number else prompts


def _published(name: str, source: Source, where: str | Path | None) -> list[BenchPrompt]:
    given = Path("." if where is None else where)
    path = next((p for p in (given / f for f in source.files) if p.exists()), None)
    if path is None and (given.is_file() or any(given.parts[-len(Path(f).parts) :] == Path(f).parts for f in source.files)):
        path = given if given.exists() else None
    read: Callable[[], Rows]
    if path is not None and path.suffix not in {Path(f).suffix for f in source.files}:
        read = partial(_rows, path)  # the same columns in another format
    elif path is not None:
        _check_digest(source, path)
        read = partial(source.read, path)
    elif where is not None and not given.exists():
        read = partial(_of_hub, name, source, str(where))
    else:
        raise SynthesisError(_missing(name, source, given))
    at = where if path is None else path
    try:
        found = [prompt for row in read() if (prompt := source.prompt(row)) is not None]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError) as error:
        raise SynthesisError(f"{at} is not as {source.title} is published ({type(error).__name__}: {error})") from error
    if not found:
        raise SynthesisError(f"no prompts of {source.title} in {at}")
    unique: dict[str, BenchPrompt] = {}
    for prompt in found:
        unique.setdefault(json.dumps([prompt.text, prompt.truth], sort_keys=True, default=str), prompt)
    return list(unique.values())


def _of_hub(name: str, source: Source, where: str) -> Rows:
    """Rows of a data set of the hub, or what else :func:`read_rows` knows by its name."""
    try:
        return [row for _, row in read_rows(where)]
    except SynthesisError as error:
        raise SynthesisError(f"{_missing(name, source, where)} ({error})") from error


def _missing(name: str, source: Source, where: str | Path) -> str:
    files = " or ".join(source.files)
    return (
        f"the prompts of {source.title} are not bundled, and there is no {files} in {str(where)!r}: get it from "
        f"{source.home}, and give its path, its folder, or the name of a data set: --prompts {name} --prompts-from PATH"
    )


def _check_digest(source: Source, path: Path) -> None:
    if not source.seen:
        warn_user(f"the published file of {source.title} was not at hand when its reader was written; look at the prompts")
    if source.sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
        warn_user(f"{path} is not the file of {source.title} that this reader was written for; results may be others")
