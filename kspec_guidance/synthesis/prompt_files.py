"""Rows of prompts from lists, tables, files and Hugging Face datasets, each with its place in the source."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import IO, Any, TextIO

from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.utils.standard_input import STANDARD_INPUT, read_standard_input, suffix_of

__all__ = ["read_rows"]

SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")
Rows = Iterator[tuple[str, Any]]


def read_rows(source: Any) -> Rows:
    """The rows of a source of prompts, as :func:`~kspec_guidance.synthesis.read_prompts` takes them, with their places.

    Raises:
        SynthesisError: for a source that cannot be read, with the line.
    """
    if isinstance(source, str | os.PathLike):
        if str(source) == STANDARD_INPUT:
            return _read_standard_input()
        return _read_file(Path(source), str(source))
    if hasattr(source, "to_pylist"):  # of pyarrow
        _check_names(getattr(source, "column_names", []), "the table of prompts")
        return _numbered(source.to_pylist())
    if hasattr(source, "columns") and hasattr(source, "to_dict"):  # of pandas and polars
        _check_names(list(source.columns), "the table of prompts")
        return _numbered(source.to_dicts() if hasattr(source, "to_dicts") else source.to_dict("records"))
    if isinstance(source, Mapping) and hasattr(source, "column_names"):  # datasets.DatasetDict
        return _numbered(_training_split(source))
    if isinstance(source, Set):
        raise SynthesisError(f"prompts must have an order that is the same in each run, got a {type(source).__name__}")
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes | bytearray):
        hint = "; for a dictionary of columns: pandas.DataFrame(columns)" if isinstance(source, Mapping) else ""
        raise SynthesisError(f"prompts must be a list, a file or a dataset, got {type(source).__name__}{hint}")
    return _numbered(source)


def _numbered(rows: Iterable[Any]) -> Rows:
    return ((f"prompt {number}", row) for number, row in enumerate(rows, 1))


def _check_names(names: Sequence[Any], where: str) -> None:
    """Refuse column names that occur twice, since one of the columns would be lost."""
    twice = sorted({str(name) for name in names if name != "" and list(names).count(name) > 1})
    if twice:
        raise SynthesisError(f"{where} has several columns named {', '.join(twice)}; give each column a name of its own")


def _read_standard_input() -> Rows:
    try:
        data = read_standard_input()
    except ValueError as error:
        raise SynthesisError(str(error)) from error
    return _read_binary(io.BytesIO(data), "standard input", suffix_of(data))


def _read_file(path: Path, name: str) -> Rows:
    if path.is_dir() or not path.exists():
        yield from _read_dataset(path, name)
        return
    kind = path.suffix.lower()
    if kind and kind not in SUFFIXES:
        raise SynthesisError(f"{path} has an unknown suffix; expected one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            if kind:
                yield from _read_binary(file, str(path), kind)
            else:  # a pipe, for instance
                data = file.read()
                yield from _read_binary(io.BytesIO(data), str(path), suffix_of(data))
    except OSError as error:
        raise SynthesisError(f"cannot read {path}: {error}") from error


def _read_binary(file: IO[bytes], path: str, kind: str) -> Rows:
    """Rows of an open file whose format has the suffix ``kind``; ``path`` is for their places."""
    try:
        if kind == ".parquet":
            yield from _read_parquet(file, path)
        elif kind in (".csv", ".tsv"):
            yield from _read_table(_as_text(file, newline=""), path, "\t" if kind == ".tsv" else ",")
        elif kind == ".jsonl":
            for number, line in enumerate(_as_text(file), 1):
                if line.strip():
                    yield f"{path} line {number}", _parse_json(line, f"{path} line {number}")
        elif kind == ".json":
            rows = _parse_json(_as_text(file).read(), path, "; JSON of one value a line is named .jsonl")
            if not isinstance(rows, list):
                raise SynthesisError(f"{path} holds a {type(rows).__name__}; expected a list of prompts or rows")
            yield from ((f"{path} prompt {number}", row) for number, row in enumerate(rows, 1))
        else:
            for number, line in enumerate(_as_text(file), 1):
                if line.strip():
                    yield f"{path} line {number}", _checked(line, f"{path} line {number}")
    except UnicodeDecodeError as error:
        raise SynthesisError(
            f"{path} is not UTF-8 text ({error.reason}); convert it, or give it the suffix of its format"
        ) from error


def _as_text(file: IO[bytes], newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _read_table(file: TextIO, path: str, delimiter: str) -> Rows:
    """Rows of a table of text, whose first line is the header; each row must have as many fields."""
    advice = "put texts that contain a comma, a quote or a line break in quotes, with quotes in them doubled"
    if delimiter == "\t":
        advice = "put texts that contain a tab, a line break or a quote at the start in quotes, with quotes in them doubled"
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=delimiter == ",")
    header: list[str] | None = None
    try:
        for fields in reader:
            where = f"{path} line {reader.line_num}"
            if not any(field.strip() for field in fields):
                continue
            _checked("".join(fields), where)
            if header is None:
                header = [field.strip() for field in fields]
                _check_names(header, where)
                if len(header) == 1 and delimiter == "," and any(mark in header[0] for mark in ";\t|"):
                    raise SynthesisError(f"{where} has one column, {header[0]!r}; separate columns by commas")
                continue
            if len(fields) != len(header):
                raise SynthesisError(
                    f"{where} has {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); "
                    f"{advice}, and leave the fields of missing values empty"
                )
            yield where, {name: field for name, field in zip(header, fields, strict=True) if name}
    except csv.Error as error:
        raise SynthesisError(f"{path} line {reader.line_num}: {error}; {advice}") from error


def _checked(text: str, where: str) -> str:
    if "\0" in text:
        raise SynthesisError(f"{where} holds null characters, as in text that is UTF-16; convert the file to UTF-8")
    return text


def _parse_json(text: str, where: str, advice: str = "") -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([name for name, _ in pairs], where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise SynthesisError(f"{where} is not JSON: {error}{advice}") from error


def _read_parquet(source: IO[bytes], path: str) -> Rows:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SynthesisError("Parquet files need: pip install 'kspec-guidance[data]'") from error
    from pyarrow import ArrowInvalid

    number = 0
    try:
        with parquet.ParquetFile(source) as file:
            _check_names(file.schema_arrow.names, path)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except ArrowInvalid as error:
        raise SynthesisError(f"{path} is not a Parquet file: {error}") from error


def _read_dataset(path: Path, name: str) -> Rows:
    if not path.exists() and (path.suffix.lower() in SUFFIXES or len(path.parts) > 2 or path.is_absolute()):
        raise SynthesisError(f"no prompts file at {path}")
    try:
        import datasets
    except ImportError as error:
        raise SynthesisError("datasets of prompts need: pip install 'kspec-guidance[data]'") from error
    try:
        dataset = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name, split="train")
    except Exception as error:  # of the hub, the network or the files
        raise SynthesisError(
            f"{name!r} is neither a file of prompts nor a dataset that can be loaded (a prompt goes into a list): {error}"
        ) from error
    yield from _numbered(_training_split(dataset) if isinstance(dataset, Mapping) else dataset)


def _training_split(splits: Mapping[str, Any]) -> Any:
    return splits["train"] if "train" in splits else next(iter(splits.values()))
