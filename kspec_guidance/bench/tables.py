"""The tables of a comparison, and tables as Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kspec_guidance.bench.metrics import ASPECTS
from kspec_guidance.evaluation.page import number

__all__ = ["Cell", "Table", "latex", "markdown", "markdown_table", "tables"]

SURE = 0.05  # p-value below which a difference gets a star
TITLES = {
    "diversity": "Diversity", "agreement": "Agreement with the prompts", "preference": "Preference", "realism": "Realism",
}  # fmt: skip
STAR = "A star marks a difference to plain sampling with a corrected p below 0.05."
ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A figure of a table.

    Attributes:
        text: the figure.
        interval: its 95% interval, empty without one.
        star: whether its difference to plain sampling is sure.
    """

    text: str
    interval: str = ""
    star: bool = False


@dataclass(frozen=True)
class Table:
    """A table of methods.

    Attributes:
        title: of the table.
        about: a sentence or two below the title.
        head: names of the columns, of which the first is that of the methods.
        rows: name of the method, and its cells.
    """

    title: str
    about: str
    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Gains at equal quality, the scores of each aspect, time and memory.

    Args:
        results: of :func:`~kspec_guidance.bench.judge.judge`.
    """
    found = [_gains(results)] if results["fronts"] else []
    for aspect in ASPECTS:
        names = [n for n, m in results["metrics"].items() if m["aspect"] == aspect]
        if names:
            found.append(_scores(results, aspect, names))
    return [*found, _cost(results)]


def _gains(results: Mapping[str, Any]) -> Table:
    fronts, metrics = results["fronts"], results["metrics"]
    first = next(iter(fronts))
    head = ["method", *(metrics[n]["title"] for n in fronts), f"hypervolume, {metrics[first]['title']}", "p"]
    rows = []
    for method, found in fronts[first]["methods"].items():
        cells = [_percent(fronts[n]["methods"][method], "gain") for n in fronts]
        volume = Cell(f"{found['volume']:.2f}", f"{found['volume_low']:.2f}, {found['volume_high']:.2f}")
        rows.append((method, [*cells, volume, Cell("-" if found["p"] is None else f"{found['p']:.3f}")]))
    rows.sort(key=lambda row: -fronts[first]["methods"][row[0]]["gain"])
    kept = " and ".join(
        f"{metrics[n]['title']} within {q['tolerance']:g}{' of its value' if q['relative'] else ''}"
        for n, q in results["quality"].items()
    )
    about = (
        f"Largest gain over plain sampling of the same prompts and seeds that keeps {kept}, on the line through a method's "
        f"strengths. p: of the difference in {metrics[first]['title']} to {fronts[first]['reference']}, corrected for the "
        "number of methods."
    )
    return Table("Diversity at equal quality", about, head, rows)


def _percent(found: Mapping[str, float], key: str) -> Cell:
    low, high = found[f"{key}_low"], found[f"{key}_high"]
    return Cell(f"{100 * found[key]:+.0f}%", f"{100 * low:+.0f}%, {100 * high:+.0f}%")


def _scores(results: Mapping[str, Any], aspect: str, names: Sequence[str]) -> Table:
    metrics, rows = results["metrics"], []
    for label, found in results["methods"].items():
        cells = []
        for name in names:
            v, p = found[name], results["differences"].get(label, {}).get(name, {}).get("p")
            interval = "" if v["low"] is None else f"{number(v['low'])}, {number(v['high'])}"
            cells.append(Cell(number(v["value"]), interval, p is not None and p < SURE))
        rows.append((label, cells))
    head = ["method", *(f"{metrics[n]['title']} {'↑' if metrics[n]['higher'] else '↓'}" for n in names)]
    return Table(TITLES[aspect], STAR if results["differences"] else "", head, rows)


def _cost(results: Mapping[str, Any]) -> Table:
    rows = []
    for label in results["methods"]:
        found = results["cost"][label]
        peak = found["peak_bytes"]
        added = found["added_seconds"]
        rows.append((label, [
            Cell(number(found["seconds"])), Cell("-" if added is None else number(added)),
            Cell("-" if peak is None else f"{peak / 2**30:.2f}"),
        ]))  # fmt: skip
    about = f"Of denoising, medians over images; on {results['device'] or 'an unknown device'}."
    return Table("Time and memory", about, ["method", "seconds an image", "added seconds", "peak GiB"], rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """A Markdown table.

    >>> print(markdown_table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(indent + line for line in lines)


def markdown(table: Table) -> str:
    """A table as Markdown, with its title and words."""

    def cell(c: Cell) -> str:
        return c.text + (f" [{c.interval}]" if c.interval else "") + (r"\*" if c.star else "")

    rows = [[method.replace("|", r"\|"), *map(cell, cells)] for method, cells in table.rows]
    return "\n\n".join(part for part in (f"## {table.title}", table.about, markdown_table(table.head, rows)) if part) + "\n"


def latex(table: Table) -> str:
    """A table as LaTeX, for the packages ``booktabs`` and ``textcomp``; its words are its caption."""

    def escape(text: str) -> str:
        text = "".join(ESCAPED.get(c, c) for c in text)
        return text.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")

    def cell(c: Cell) -> str:
        interval = rf" {{\scriptsize [{escape(c.interval)}]}}" if c.interval else ""
        return escape(c.text) + interval + ("$^*$" if c.star else "")

    lines = [" & ".join([escape(method), *map(cell, cells)]) + r" \\" for method, cells in table.rows]
    caption = escape(f"{table.title}. {table.about}".strip())
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        r"\toprule", " & ".join(map(escape, table.head)) + r" \\", r"\midrule", *lines, r"\bottomrule", r"\end{tabular}",
        r"\end{table}", "",
    ])  # fmt: skip
