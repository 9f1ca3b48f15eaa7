"""Columns of prompts besides their texts: plain values of one type each, under names that the metadata leaves free."""

import math
import warnings
from collections.abc import Mapping, Sequence
from datetime import date, time
from typing import Any

from kspec_guidance.synthesis.errors import SynthesisError

__all__ = ["COLUMNS", "TYPES", "Columns", "column_types", "plain_value"]

COLUMNS: dict[str, type] = {  # of the metadata, with the types of their values
    "file_name": str, "prompt": str, "group": str, "seed": int, "attempt": int, "prompt_number": int, "guide": str,
    "variety": float, "scale": float, "settings": str, "nearest": float, "vendi": float, "attribute": str, "arm": str,
    "model": str, "revision": str, "pipeline": str, "scheduler": str, "steps": int, "guidance_scale": float,
    "guide_digest": str, "licence": str, "versions": str, "marks": str, "sha256": str,
    "reward": float,
}  # fmt: skip
TYPES = {bool: "booleans", int: "whole numbers", float: "numbers", str: "texts"}
EXACT = 2**53  # up to which float64 holds all whole numbers


def plain_value(value: Any, where: str) -> Any:
    """A value as text, boolean, int or float; None if it is missing (None, NaN, pandas.NA, pandas.NaT).

    Args:
        value: of a cell; scalars of numpy and pandas, dates and times are converted; others are returned as they are.
        where: place of the cell, for errors.

    Raises:
        SynthesisError: for infinite numbers, integers of more than 64 bits, and text with unpaired surrogates.
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of numpy
        item = value.item()
        value = str(value) if type(value).__name__ == "datetime64" and item is not None else item
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, float) and math.isinf(value):
        raise SynthesisError(f"{where} holds {value}; JSON has no infinite numbers, give a finite one or leave it out")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise SynthesisError(f"{where} holds the number {value}, which takes more than 64 bits; give it as text")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SynthesisError(f"{where} holds text that is not valid Unicode ({error.reason}): {value!a}") from error
    return value


class Columns:
    """Collects the users' own columns, row by row, and gives each of them one name and one type.

    Attributes:
        types: of each column so far, with the place and value that showed it first; no types if all values are missing.
        left_out: the type of the values of each column that holds other things than text, numbers and booleans.
    """

    def __init__(self) -> None:
        self.types: dict[str, dict[type, tuple[str, Any]]] = {}
        self.left_out: dict[str, str] = {}

    def add(self, cells: Mapping[Any, Any], where: str) -> dict[str, Any]:
        """The plain values of a row's cells, by column."""
        found = {}
        for key, cell in cells.items():
            name = str(key)
            value = plain_value(cell, f"{where}: column {name!r}")
            if value is not None and not isinstance(value, str | int | float):
                self.left_out.setdefault(name, type(value).__name__)
                continue
            types = self.types.setdefault(name, {})
            if value is not None:
                types.setdefault(_type_of(value), (where, value))
            found[name] = value
        return found

    def unify(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with all columns in each, None for missing values, one type a column, and names that are free.

        Raises:
            SynthesisError: for a column of several types, other than whole and other numbers.
        """
        for name in self.left_out.keys() & self.types.keys():
            if self.types[name]:
                where, value = next(iter(self.types[name].values()))
                raise SynthesisError(
                    f"column {name!r} holds {value!r} ({where}) and also a {self.left_out[name]}; give all values one type"
                )
            del self.types[name]
        if self.left_out:
            others = ", ".join(f"{name} ({kind})" for name, kind in sorted(self.left_out.items()))
            warnings.warn(
                f"columns of prompts that hold neither text nor numbers are not copied into the metadata: {others}",
                stacklevel=2,
            )
        kinds = {name: self._type(name, types) for name, types in self.types.items()}
        names = self._names()
        return [
            {
                names[name]: _as_float(name, row.get(name)) if kind is float else row.get(name)
                for name, kind in kinds.items()
            }
            for row in rows
        ]

    def _type(self, name: str, types: dict[type, tuple[str, Any]]) -> type | None:
        if set(types) == {int, float}:
            return float
        if len(types) > 1:
            (_, (first, one)), (_, (second, other)) = list(types.items())[:2]
            kinds = " and ".join(TYPES[kind] for kind in types)
            raise SynthesisError(
                f"column {name!r} holds {kinds}: {one!r} ({first}), {other!r} ({second}); give all values as text, or all "
                "as numbers"
            )
        return next(iter(types), None)

    def _names(self) -> dict[str, str]:
        """New names of the columns: those that the metadata or the loader uses get the prefix ``source_``."""
        names, taken = {}, set(self.types) | set(COLUMNS)
        for name in self.types:
            new = name
            if name.endswith("_file_name"):  # load_dataset takes the values for names of files
                new = name.removesuffix("_name")
            while new in COLUMNS or new == "image" or (new != name and new in taken):
                new = f"source_{new}".replace("file_name", "file")
            names[name] = new
            taken.add(new)
        renamed = [f"{old} is written as {new}" for old, new in names.items() if old != new]
        if renamed:
            warnings.warn(
                "columns of prompts whose names the metadata uses itself are renamed, and have no effect on the run: "
                + ", ".join(renamed),
                stacklevel=2,
            )
        return names


def _as_float(name: str, value: float | None) -> float | None:
    if isinstance(value, int) and abs(value) > EXACT:
        raise SynthesisError(
            f"column {name!r} mixes fractions with {value}, which no float holds exactly; give all as text"
        )
    return None if value is None else float(value)


def _type_of(value: Any) -> type:
    return next(kind for kind in TYPES if isinstance(value, kind))


def column_types(rows: Sequence[Mapping[str, Any]]) -> dict[str, type | None]:
    """The type of each column that the rows have besides those of the metadata; None if all its values are missing."""
    types: dict[str, type | None] = {}
    for row in rows:
        for name, value in row.items():
            if name not in COLUMNS and types.get(name) is None:
                types[name] = None if value is None else _type_of(value)
    return types
