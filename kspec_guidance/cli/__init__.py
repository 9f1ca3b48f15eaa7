"""The command line: ``kspec-guidance demo | generate | tune | evaluate | compare``.

Options have the names of the API's arguments.
"""

import typer

from kspec_guidance.cli.demo import demo
from kspec_guidance.cli.evaluate import compare, evaluate
from kspec_guidance.cli.generate import generate
from kspec_guidance.cli.tune import tune

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diverse images from any diffusers pipeline without retraining, and diversity scores of image sets.",
)
for command in (demo, generate, tune, evaluate, compare):
    app.command()(command)
