"""Tables of documentation pages, put between their marks by the scripts that measured them."""

import re
from pathlib import Path


def table(head: list[str], rows: list[list[str]], indent: str = "") -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(indent + line for line in lines)


def fill(path: Path, parts: dict[str, str]) -> None:
    """Put each part between ``<!-- name -->`` and ``<!-- /name -->``, indented as the marks are.

    A page that does not exist yet is made of marks alone.
    """
    marks = "\n\n".join(f"<!-- {n} -->\n<!-- /{n} -->" for n in parts)
    text = path.read_text() if path.exists() else f"# {path.stem}\n\n{marks}\n"
    for name, part in parts.items():
        marked = rf"(?s)( *)<!-- {name} -->.*?<!-- /{name} -->"
        assert re.search(marked, text), f"{path} has no place for {name}"
        text = re.sub(marked, lambda m, p=part, n=name: f"{m[1]}<!-- {n} -->\n{p}\n{m[1]}<!-- /{n} -->", text)
    path.write_text(text)
