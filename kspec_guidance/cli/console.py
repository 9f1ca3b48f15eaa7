"""Terminal output: results, errors and progress bars."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["console", "counter", "errors", "fail", "plain_warnings", "progress_bars", "synthesis_progress"]

REPORT_SECONDS = 30  # between two progress lines if the error stream is not a terminal

console = Console()


def errors() -> Console:
    """A console on the error stream, so that the output itself can be piped."""
    return Console(stderr=True)


def fail(message: str) -> typer.Exit:
    """Print an error, and return the exception to raise."""
    errors().print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings for the user as one line, without the place in the code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_plainly(message: Any, category: type[Warning], *place: Any, **kwargs: Any) -> None:
            if category is UserWarning:
                errors().print(f"[bold yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
            else:
                show(message, category, *place, **kwargs)

        warnings.showwarning = show_plainly
        yield


def progress_bars() -> Progress:
    """Progress bars on the error stream; none if that is not a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    stream = errors()
    return Progress(*columns, console=stream, disable=not stream.is_terminal)


@contextmanager
def counter(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; the block gets a function to call with the number done and the total."""
    with progress_bars() as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def synthesis_progress() -> Iterator[Callable[[Any], None]]:
    """Number of images, rate, time left and diversity; one line per 30 s if the error stream is not a terminal."""
    columns = (
        TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f}/s"),
        TextColumn("{task.fields[left]} left"), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    stream = errors()
    bars = Progress(*columns, console=stream, disable=not stream.is_terminal)
    task = bars.add_task("images", total=None, rate=0.0, left="?", note="")
    printed = time.monotonic()

    def update(now: Any) -> None:
        nonlocal printed
        left = "?" if now.remaining == float("inf") else str(timedelta(seconds=round(now.remaining)))
        note = "" if now.diversity is None else f"Vendi {now.diversity:.0%} of images"
        note += f", {now.rejected} dropped" if now.rejected else ""
        bars.update(task, completed=now.done, total=now.total, rate=now.rate, left=left, note=note)
        if not stream.is_terminal and time.monotonic() - printed > REPORT_SECONDS:
            printed = time.monotonic()
            stream.print(f"{now.done} of {now.total} images, {now.rate:.1f}/s, {left} left {note}", highlight=False)

    with bars:
        yield update
