"""Terminal output: results on standard output; notes, progress, warnings and errors on standard error; exit codes."""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["EXIT_CODES", "Output", "command_output", "one_line_errors", "plain_values"]

REPORT_SECONDS = 30  # between two progress lines if the error stream is not a terminal
FAILED, USAGE, FOLDER, INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = (
    "Exit code: 0 done; 1 the work failed (pipeline, filter, disk, missing package); 2 an option, a name or an input "
    "cannot be used; 3 the folder of the run holds other settings, damaged files or a running process, see --force; "
    "130 stopped by Ctrl-C."
)


def errors() -> Console:
    """A console on the error stream, so that the output itself can be piped."""
    return Console(stderr=True)


def print_line(text: str, label: str = "") -> None:
    """Print one line on the error stream, as it is, with a coloured label before it."""
    colour = {"error": "bold red", "warning": "bold yellow"}.get(label)
    start = f"[{colour}]{label}:[/] " if colour else ""
    errors().print(start + escape(text), highlight=False, soft_wrap=True)


def exit_code(error: Exception) -> int | None:
    """The exit code for an error that the user can mend; None for one in the code, whose traceback is needed."""
    if hasattr(error, "format_message"):  # a usage error of typer
        return getattr(error, "exit_code", USAGE)
    if isinstance(error, ValueError):
        return USAGE
    if isinstance(error, OSError | ImportError):
        return FAILED
    if isinstance(error, RuntimeError):
        from kspec_guidance.synthesis.errors import FolderError, RunFailedError, SynthesisError

        if isinstance(error, FolderError):
            return FOLDER
        return USAGE if isinstance(error, SynthesisError) and not isinstance(error, RunFailedError) else FAILED
    return None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print errors as one line, and exit with their code."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        message, context = str(error), getattr(error, "ctx", None)
        if hasattr(error, "format_message"):
            message = error.format_message()
            message += f" (see {context.command_path} --help)" if context is not None else ""
        print_line(message or type(error).__name__, "error")
        raise typer.Exit(code) from error


def plain_values(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite become null, paths become text."""
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value) if isinstance(value, Path) else [plain_values(v) for v in value]


class Output:
    """Where a command writes, as ``--json`` and ``--quiet`` say.

    Args:
        as_json: write the result as one JSON document.
        quiet: write no notes and no progress.

    Attributes:
        kept: what to say after Ctrl-C: what was kept, and how to go on.
        first: whether this is the first of the processes of torchrun or accelerate launch, which prints for all.
    """

    def __init__(self, as_json: bool, quiet: bool):
        self.as_json, self.quiet = as_json, quiet
        self.kept = "nothing was written; run the same command again to start anew"
        self._results = sys.stdout  # the JSON document goes here while other prints go to the error stream
        self.first = int(os.environ.get("RANK", "0")) == 0

    def note(self, text: str) -> None:
        """Print a line about the work, on the error stream."""
        if self.first and not self.quiet:
            print_line(text)

    def warning(self, text: str) -> None:
        """Print a warning, on the error stream."""
        print_line(text, "warning")

    def result(self, record: Mapping[str, Any], *shown: Any) -> None:
        """Print the result: ``record`` as JSON, or the tables and texts ``shown``."""
        if self.as_json:
            print(json.dumps(plain_values(record), indent=1, allow_nan=False), file=self._results)
            return
        for part in shown:
            text = isinstance(part, str)
            Console().print(part, highlight=False, soft_wrap=text, markup=not text)

    def wrote(self, *paths: Any) -> None:
        """Name the files that were written."""
        for path in paths:
            self.note(f"wrote {path}")

    def progress_bars(self, *columns: Any) -> Progress:
        """Progress bars on the error stream; none if that is not a terminal."""
        columns = columns or (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        stream = errors()
        return Progress(*columns, console=stream, disable=self.quiet or not stream.is_terminal)

    @contextmanager
    def counter(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar; the block gets a function to call with the number done and the total."""
        with self.progress_bars() as bars:
            task = bars.add_task(description, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    @contextmanager
    def synthesis_progress(self) -> Iterator[Callable[[Any], None]]:
        """Number of images, rate, time left and diversity; one line per 30 s if the error stream is not a terminal."""
        bars = self.progress_bars(
            TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f}/s"),
            TextColumn("{task.fields[left]} left"), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        task = bars.add_task("images", total=None, rate=0.0, left="?", note="")
        printed = time.monotonic()

        def update(now: Any) -> None:
            nonlocal printed
            left = "?" if now.remaining == float("inf") else str(timedelta(seconds=round(now.remaining)))
            note = "" if now.diversity is None else f"Vendi {now.diversity:.0%} of images"
            note += f", {now.rejected} dropped" if now.rejected else ""
            bars.update(task, completed=now.done, total=now.total, rate=now.rate, left=left, note=note)
            if not bars.console.is_terminal and time.monotonic() - printed > REPORT_SECONDS:
                printed = time.monotonic()
                self.note(f"{now.done} of {now.total} images, {now.rate:.1f}/s, {left} left {note}")

        with bars:
            yield update


@contextmanager
def command_output(as_json: bool, quiet: bool) -> Iterator[Output]:
    """The output of one command. Warnings for the user are one line; after Ctrl-C it says what was kept."""
    output = Output(as_json, quiet)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr) if as_json else nullcontext():
        show = warnings.showwarning

        def show_plainly(message: Any, category: type[Warning], *place: Any, **kwargs: Any) -> None:
            if category is UserWarning:
                output.warning(str(message))
            else:
                show(message, category, *place, **kwargs)

        warnings.showwarning = show_plainly
        try:
            yield output
        except KeyboardInterrupt:
            print_line(f"stopped: {output.kept}")
            raise typer.Exit(INTERRUPTED) from None
