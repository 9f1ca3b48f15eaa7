import json
import warnings
from pathlib import Path

import pytest
import typer

from kspec_guidance.cli.console import command_output, one_line_errors, plain_values
from kspec_guidance.synthesis import FolderError, RunFailedError, SynthesisError


def test_plain_values_have_no_numbers_outside_of_json():
    record = {1: [float("nan"), 2.5, (True, None)], "path": Path("a/b"), "inner": {"x": float("inf")}}
    assert json.dumps(plain_values(record), allow_nan=False) == (
        '{"1": [null, 2.5, [true, null]], "path": "a/b", "inner": {"x": null}}'
    )


@pytest.mark.parametrize("quiet", [False, True])
def test_with_json_standard_output_is_one_document(quiet, capsys):
    with command_output(as_json=True, quiet=quiet) as output:
        output.note("loading ...")
        print("a print of a filter")
        warnings.warn("mind this", UserWarning, stacklevel=1)
        output.wrote("page.html")
        output.result({"score": 1.5}, "a table")
    written = capsys.readouterr()
    assert json.loads(written.out) == {"score": 1.5}
    assert written.err.splitlines() == (
        ["a print of a filter", "warning: mind this"]
        if quiet
        else ["loading ...", "a print of a filter", "warning: mind this", "wrote page.html"]
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a"), 2),
        (SynthesisError("a"), 2),
        (typer.BadParameter("a"), 2),
        (OSError("a"), 1),
        (ImportError("a"), 1),
        (RuntimeError("a"), 1),
        (RunFailedError("a"), 1),
        (FolderError("a"), 3),
    ],
)
def test_errors_have_exit_codes(error, code, capsys):
    with pytest.raises(typer.Exit) as raised, one_line_errors():
        raise error
    assert raised.value.exit_code == code
    assert capsys.readouterr().err.startswith("error: ")


def test_errors_in_the_code_keep_their_traceback():
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a")


def test_only_the_first_process_prints_notes(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with command_output(as_json=False, quiet=False) as output:
        output.note("loading ...")
    assert capsys.readouterr().err == ""
