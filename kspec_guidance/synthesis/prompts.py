"""Prompts from a list, a file, or a Hugging Face dataset."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kspec_guidance.synthesis.errors import SynthesisError

__all__ = ["Prompt", "read_prompts"]

PROMPT_COLUMNS = ("prompt", "caption", "text")
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        text: what the pipeline is given.
        group: for quotas and for memories by group.
        images: number of its images, in place of the run's ``images_per_prompt``.
        times: how often the source lists it; it gets as many times ``images_per_prompt``.
        extra: further columns, copied into the metadata.
    """

    text: str
    group: str | None = None
    images: int | None = None
    times: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(source: Any, column: str | None = None, group_column: str = "group") -> list[Prompt]:
    """Distinct prompts, in order of their first appearance; a prompt that is listed k times gets k times the images.

    Args:
        source: a list of strings, mappings or :class:`Prompt`; a file (``.txt`` with one prompt a line, ``.csv``, ``.tsv``,
            ``.jsonl``, ``.json`` with a list, ``.parquet``); a ``datasets.Dataset``; a folder written by its
            ``save_to_disk``; or the name of a dataset on the hub, whose split ``train`` is read.
        column: of the prompts; ``prompt``, ``caption`` or ``text`` by default. A column ``images`` gives
            :attr:`Prompt.images`; other columns of strings and numbers are copied into the metadata.
        group_column: of the groups; it may be absent.

    Raises:
        SynthesisError: for a source that cannot be read or holds no prompts, with the line or the number of the prompt.
    """
    merged: dict[str, Prompt] = {}
    for number, row in enumerate(_rows(source), 1):
        prompt = _prompt(row, number, column, group_column)
        if not prompt.text.strip():
            continue
        known = merged.get(prompt.text)
        if known is None:
            merged[prompt.text] = prompt
        elif known.images is not None or prompt.images is not None:
            merged[prompt.text] = replace(known, images=(known.images or 0) + (prompt.images or 0))
        else:
            merged[prompt.text] = replace(known, times=known.times + prompt.times)
    if not merged:
        raise SynthesisError(f"no prompts in {source if isinstance(source, str | Path) else 'the given prompts'}")
    return list(merged.values())


def _prompt(row: Any, number: int, column: str | None, group_column: str) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        return Prompt(row.strip())
    if not isinstance(row, Mapping):
        raise SynthesisError(f"prompt {number} is a {type(row).__name__}; expected text or a row with a column of prompts")
    name = column if column is not None else next((n for n in PROMPT_COLUMNS if row.get(n) is not None), None)
    if name is None or row.get(name) is None:
        expected = column or ", ".join(PROMPT_COLUMNS)
        raise SynthesisError(f"prompt {number} has no column {expected}; its columns are {', '.join(map(str, row))}")
    images = row.get("images")
    if images in (None, ""):
        images = None
    else:
        try:
            images = int(images)
        except (TypeError, ValueError, OverflowError) as error:
            raise SynthesisError(f"prompt {number} has {images!r} images; expected an integer") from error
        if images < 0:
            raise SynthesisError(f"prompt {number} has {images} images; expected 0 or more")
    group = row.get(group_column)
    extra = {
        k: v for k, v in row.items() if k not in (name, group_column, "images") and isinstance(v, str | int | float | bool)
    }
    return Prompt(str(row[name]).strip(), None if group in (None, "") else str(group), images, 1, extra)


def _rows(source: Any) -> Iterator[Any]:
    if isinstance(source, str | Path):
        yield from _read_file(Path(source), str(source))
    elif isinstance(source, Iterable):
        yield from source
    else:
        raise SynthesisError(f"prompts must be a list, a file or a dataset, got {type(source).__name__}")


def _read_file(path: Path, name: str) -> Iterator[Any]:
    if path.is_dir() or not path.exists():
        yield from _read_dataset(path, name)
        return
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
        elif kind in (".csv", ".tsv"):
            with path.open(newline="", encoding="utf-8-sig") as file:
                yield from csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
        elif kind == ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _parse_json(line, f"{path} line {number}")
        elif kind == ".json":
            rows = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
            if not isinstance(rows, list):
                raise SynthesisError(f"{path} holds a {type(rows).__name__}; expected a list of prompts or rows")
            yield from rows
        elif kind == ".txt" or not kind:
            with path.open(encoding="utf-8-sig") as file:
                yield from (line for line in file if line.strip())
        else:
            raise SynthesisError(f"{path} has an unknown suffix; expected one of {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise SynthesisError(
            f"{path} is not UTF-8 text ({error.reason}); convert it, or give it the suffix of its format"
        ) from error
    except (OSError, csv.Error) as error:
        raise SynthesisError(f"cannot read {path}: {error}") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SynthesisError(f"{where} is not JSON: {error}") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SynthesisError("Parquet files need: pip install 'kspec-guidance[data]'") from error
    from pyarrow import ArrowInvalid

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise SynthesisError(f"{path} is not a Parquet file: {error}") from error


def _read_dataset(path: Path, name: str) -> Iterator[Any]:
    if not path.exists() and (path.suffix.lower() in SUFFIXES or len(path.parts) > 2 or path.is_absolute()):
        raise SynthesisError(f"no prompts file at {path}")
    try:
        import datasets
    except ImportError as error:
        raise SynthesisError("datasets of prompts need: pip install 'kspec-guidance[data]'") from error
    try:
        dataset = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, split="train")
    except Exception as error:  # of the hub, the network or the files
        raise SynthesisError(f"{name!r} is neither a file of prompts nor a dataset that can be loaded: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    yield from dataset
