"""Standard input in place of a file, and the format of text without a suffix."""

import json
import os
import sys

__all__ = ["STANDARD_INPUT", "read_standard_input", "suffix_of"]

STANDARD_INPUT = "-"
COLUMNS = {"prompt", "caption", "text", "file_name"}  # one of which is in the header of a table


def read_standard_input() -> bytes:
    """All of standard input.

    Raises:
        ValueError: if it is closed, or if several processes run, of which only one would get it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("standard input (-) reaches one process only; for several processes, give a file")
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("standard input (-) is closed; give a file")
    if sys.stdin.isatty():
        print("reading standard input; end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.buffer.read()


def suffix_of(data: bytes) -> str:
    r"""The suffix that a file of prompts or captions with this content would have.

    JSON is known by its syntax, a table by a header with a column ``prompt``, ``caption``, ``text`` or ``file_name``;
    anything else is text with one prompt a line.

    >>> [suffix_of(d) for d in (b'{"prompt": "heart"}\n', b'["heart"]', b"prompt,group\nheart,a\n", b"heart, red\nman\n")]
    ['.jsonl', '.json', '.csv', '.txt']
    """
    if data.startswith(b"PAR1"):
        return ".parquet"
    lines = [line for line in data.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    if not lines:
        return ".txt"
    if isinstance(_parsed(lines[0]), dict) or all(isinstance(_parsed(line), str) for line in lines):
        return ".jsonl"
    if lines[0].lstrip()[0] in "[{" and isinstance(_parsed("\n".join(lines)), list | dict):
        return ".json"
    for mark, suffix in (("\t", ".tsv"), (",", ".csv")):
        if COLUMNS & {name.strip().strip('"') for name in lines[0].split(mark)}:
            return suffix
    return ".txt"


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
