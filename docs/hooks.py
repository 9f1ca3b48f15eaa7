"""MkDocs hooks: the link to the repository, links of pages that are also read there, and names in docstrings."""

import re
import shutil
import subprocess
from typing import Any

REPOSITORY = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([\w.]+)</code>")
SHORT = re.compile(r"<code>([^<\n]{1,30})</code>")


def on_config(config: Any) -> Any:
    """Take the address of the repository from the clone's ``origin``, where mkdocs.yml has none."""
    git = shutil.which("git")
    if git and not config.repo_url:
        command = [git, "-C", config.docs_dir, "remote", "get-url", "origin"]
        origin = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        config.repo_url = web_address(origin)
        config.repo_name = config.repo_url and config.repo_url.split("/", 3)[3]
    return config


def web_address(origin: str) -> str | None:
    """The page of a repository, from the address that git fetches it from; None for a folder."""
    match = re.fullmatch(r"(?:https://|ssh://)?(?:[^@/]+@)?([\w-]+(?:\.[\w-]+)+)(?::\d+)?[:/](.+?)(?:\.git)?/?", origin)
    return f"https://{match[1]}/{match[2]}" if match else None


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace each link to a file outside of ``docs``: by its page in the repository, or by its path in a clone."""
    depth = page.file.src_path.count("/") + 1

    def replace(match: re.Match) -> str:
        if match[1].count("../") < depth:
            return match[0]
        return f"]({config.repo_url}/blob/main/{match[2]}{match[3] or ''})" if config.repo_url else f"] `{match[2]}`"

    text = REPOSITORY.sub(replace, markdown)
    return re.sub(
        r"(?<!!)\[`?([^\]\[`]*)`?\] `([^`]+)`", lambda m: f"`{m[2]}`" if m[1] == m[2] else f"{m[1]} (`{m[2]}`)", text
    )


def on_page_content(html: str, **_: Any) -> str:
    """Show what docstrings write as ``:class:`~package.Name``` as a link, and keep short code on one line."""
    link = r'<autoref identifier="{0}" optional><code>{1}</code></autoref>'
    html = ROLE.sub(lambda m: link.format(m[1], m[1].rsplit(".", 1)[-1]), html).replace("::</p>", ":</p>")
    return SHORT.sub(r'<code class="kspec-word">\1</code>', html)
