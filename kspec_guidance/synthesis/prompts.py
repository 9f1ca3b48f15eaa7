"""Prompts from a list, a file, or a Hugging Face dataset."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kspec_guidance.synthesis.columns import Columns, plain_value
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.prompt_files import read_rows

__all__ = ["Prompt", "read_prompts"]

PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        text: what the pipeline is given.
        group: for quotas and for memories by group.
        images: number of its images, in place of the run's ``images_per_prompt``.
        times: how often the source lists it; it gets as many times ``images_per_prompt``.
        extra: further columns, copied into the metadata: text, numbers and booleans.
    """

    text: str
    group: str | None = None
    images: int | None = None
    times: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


def read_prompts(source: Any, column: str | None = None, group_column: str = "group") -> list[Prompt]:
    """Distinct prompts, in order of their first appearance; a prompt that is listed k times gets k times the images.

    Missing values are None, NaN, and what pandas has for them. A column has one type; whole numbers among fractions become
    floats. Own columns whose names the metadata uses itself are renamed (``seed`` to ``source_seed``), with a warning.

    Args:
        source: a list of strings, mappings or :class:`Prompt`; a file (``.txt`` with one prompt a line, ``.csv``, ``.tsv``,
            ``.jsonl``, ``.json`` with a list, ``.parquet``); a table of pandas, polars or pyarrow; a ``datasets.Dataset``;
            a folder written by its ``save_to_disk``; the name of a dataset on the hub, whose split ``train`` is read; or
            ``-`` for standard input, whose format, like that of a file without a suffix, is known by its content.
        column: of the prompts; ``prompt``, ``caption`` or ``text`` by default. A column ``images`` gives
            :attr:`Prompt.images`; other columns of strings and numbers are copied into the metadata.
        group_column: of the groups; it may be absent.

    Raises:
        SynthesisError: for a source that cannot be read or holds no prompts, a prompt that is no text, a prompt in two
            groups, or a column of several types; with the line or the number of the prompt.
    """
    columns = Columns()
    merged: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    blank: list[str] = []
    changed: list[str] = []
    for where, row in read_rows(source):
        prompt = _prompt(row, where, column, group_column, columns)
        if not prompt.text.strip():
            blank.append(where)
            continue
        known = merged.get(prompt.text)
        if known is None:
            merged[prompt.text], places[prompt.text] = prompt, where
            continue
        if known.extra != prompt.extra:
            changed.append(where)
        merged[prompt.text] = _merge(known, prompt, f"{places[prompt.text]} and {where}")
    if blank:
        warnings.warn(f"{len(blank)} prompts without text are left out (the first is {blank[0]})", stacklevel=2)
    if changed:
        warnings.warn(
            f"{len(changed)} prompts are listed again with other values in their own columns (the first is {changed[0]}); "
            "their images get the values of the first listing",
            stacklevel=2,
        )
    if not merged:
        raise SynthesisError(f"no prompts in {'the given prompts' if _is_data(source) else source}")
    prompts = list(merged.values())
    extra = columns.unify([prompt.extra for prompt in prompts])
    return [replace(prompt, extra=cells) for prompt, cells in zip(prompts, extra, strict=True)]


def _is_data(source: Any) -> bool:
    return not isinstance(source, str) and not hasattr(source, "__fspath__")


def _merge(first: Prompt, other: Prompt, where: str) -> Prompt:
    """One prompt in place of two with the same text."""
    if first.group != other.group:
        raise SynthesisError(
            f"the prompt {_short(first.text)} has group {first.group!r} and also {other.group!r} ({where}); give one"
        )
    if (first.images is None) != (other.images is None):
        raise SynthesisError(
            f"the prompt {_short(first.text)} is listed with a number of images and also without ({where}); give both"
        )
    if first.images is not None and other.images is not None:
        return replace(first, images=first.images + other.images)
    return replace(first, times=first.times + other.times)


def _prompt(row: Any, where: str, column: str | None, group_column: str, columns: Columns) -> Prompt:
    if isinstance(row, Prompt):
        text, group, images = _text(row.text, where), _group(row.group, where), _images(row.images, where)
        if not isinstance(row.times, int) or row.times < 1:
            raise SynthesisError(f"{where} is listed {row.times!r} times; expected an integer of at least 1")
        return Prompt(text, group, images, row.times, columns.add(row.extra, where))
    if not isinstance(row, Mapping):
        return Prompt(_text(row, where).strip())
    name = column if column is not None else next((n for n in PROMPT_COLUMNS if n in row), None)
    if name is None or name not in row:
        expected = column or ", ".join(PROMPT_COLUMNS)
        raise SynthesisError(f"{where} has no column {expected}; its columns are {', '.join(map(str, row))}")
    text = _text(row[name], f"{where}: column {name!r}").strip()
    group, images = _group(row.get(group_column), where), _images(row.get("images"), where)
    own = {key: value for key, value in row.items() if key not in (name, group_column, "images")}
    return Prompt(text, group, images, 1, columns.add(own, where))


def _text(value: Any, where: str) -> str:
    text = plain_value(value, where)
    if text is None:
        raise SynthesisError(f"{where} holds no text: the value is missing")
    if not isinstance(text, str):
        raise SynthesisError(
            f"{where} is a {type(text).__name__}, {_short(text)}; expected text, or a row with a column of prompts"
        )
    return text


def _group(value: Any, where: str) -> str | None:
    group = plain_value(value, f"{where}: the group")
    if isinstance(group, float) and group.is_integer():
        group = int(group)  # pandas turns whole numbers into floats where others are missing
    if group is not None and not isinstance(group, str | int | float):
        raise SynthesisError(f"{where} has a {type(group).__name__} as its group; expected text")
    return None if group is None else str(group).strip() or None


def _images(value: Any, where: str) -> int | None:
    images = plain_value(value, where)
    if images is None or (isinstance(images, str) and not images.strip()):
        return None
    try:
        if isinstance(images, bool):
            raise TypeError
        number = images if isinstance(images, int) else float(images)
        if not (math.isfinite(number) and number == int(number)):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise SynthesisError(f"{where} has {images!r} images; expected an integer") from error
    if number < 0:
        raise SynthesisError(f"{where} has {images} images; expected 0 or more")
    return int(number)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
