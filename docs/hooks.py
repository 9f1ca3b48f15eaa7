"""What the site changes in the pages, which are written to be read in the repository as well."""

import re
from typing import Any

REPOSITORY = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave the documentation become the plain path, as one would type it in a clone."""
    depth = page.file.src_path.count("/") + 1

    def plain(found: re.Match) -> str:
        leaves = found[1].count("../") >= depth
        return f"] `{found[2]}`" if leaves else found[0]

    text = REPOSITORY.sub(plain, markdown)
    return re.sub(
        r"(?<!!)\[`?([^\]\[`]*)`?\] `([^`]+)`", lambda m: f"`{m[2]}`" if m[1] == m[2] else f"{m[1]} (`{m[2]}`)", text
    )
