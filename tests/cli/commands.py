"""Running a command in this process."""

from typer.testing import CliRunner

from kspec_guidance.cli import app


def call(*words, stdin=None):
    return CliRunner().invoke(app, [str(w) for w in words], input=stdin)
