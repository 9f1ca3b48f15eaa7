"""MkDocs hook: rewrites links of pages that are also read in the repository."""

import re
from typing import Any

REPOSITORY = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace each link to a file outside of ``docs`` by the path of the file in a clone."""
    depth = page.file.src_path.count("/") + 1

    def replace(match: re.Match) -> str:
        outside = match[1].count("../") >= depth
        return f"] `{match[2]}`" if outside else match[0]

    text = REPOSITORY.sub(replace, markdown)
    return re.sub(
        r"(?<!!)\[`?([^\]\[`]*)`?\] `([^`]+)`", lambda m: f"`{m[2]}`" if m[1] == m[2] else f"{m[1]} (`{m[2]}`)", text
    )
