"""The command line ``kspec-guidance demo | generate | calibrate | tune | evaluate | compare | embeddings | bench``.

See docs/command-line.md. Options have the names of the API's arguments. Nothing here imports torch before a command runs.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from kspec_guidance.cli.arguments import Version
from kspec_guidance.cli.bench import bench
from kspec_guidance.cli.calibrate import calibrate
from kspec_guidance.cli.console import EXIT_CODES, one_line_errors
from kspec_guidance.cli.demo import demo
from kspec_guidance.cli.evaluate import compare, embeddings, evaluate
from kspec_guidance.cli.generate import generate
from kspec_guidance.cli.tune import tune

__all__ = ["app"]


class Commands(TyperGroup):
    """All commands; their errors are one line each, with the exit codes of :data:`EXIT_CODES`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the name of the command; without any word, show the help."""
        with one_line_errors():
            return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


HELP_NAMES = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    cls=Commands,
    context_settings=HELP_NAMES,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diverse images from any diffusers pipeline without retraining, and diversity scores of image sets.",
    epilog=EXIT_CODES,
)
for command in (demo, generate, calibrate, tune, evaluate, compare, embeddings, bench):
    app.command(epilog=EXIT_CODES, context_settings=HELP_NAMES)(command)


@app.callback()
def main(version: Version = False) -> None:
    """Diverse images from any diffusers pipeline without retraining, and diversity scores of image sets."""
