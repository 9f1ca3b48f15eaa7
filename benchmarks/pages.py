"""Markdown tables, and their insertion into documentation pages."""

import re
from pathlib import Path


def table(head: list[str], rows: list[list[str]], indent: str = "") -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(indent + line for line in lines)


def fill(path: Path, parts: dict[str, str]) -> None:
    """Write each part between ``<!-- name -->`` and ``<!-- /name -->``, with the indentation of the markers.

    A page that does not exist yet is made of the markers alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    markers = "\n\n".join(f"<!-- {n} -->\n<!-- /{n} -->" for n in parts)
    text = path.read_text() if path.exists() else f"# {path.stem}\n\n{markers}\n"
    for name, part in parts.items():
        pattern = rf"(?s)( *)<!-- {name} -->.*?<!-- /{name} -->"
        assert re.search(pattern, text), f"{path} has no markers for {name}"
        text = re.sub(pattern, lambda m, p=part, n=name: f"{m[1]}<!-- {n} -->\n{p}\n{m[1]}<!-- /{n} -->", text)
    path.write_text(text)
