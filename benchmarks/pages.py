"""Insertion of Markdown tables into documentation pages."""

import re
from pathlib import Path

from kspec_guidance.bench.tables import markdown_table as table

__all__ = ["fill", "table"]


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
