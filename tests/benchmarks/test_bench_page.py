"""The examples of docs/bench.md, in small."""

import json

from benchmarks.bench_page import save_transformer
from tests.cli.commands import call

SMALL = ("--prompts", "bundled:2", "--images", 2, "--steps", 2, "--guidance-scale", 4, "--option", "max_sequence_length=0")


def test_the_transformer_of_the_arena_is_compared_as_a_folder_of_a_pipeline(tmp_path):
    folder = save_transformer(tmp_path / "pipeline")
    result = call(
        "bench", "--model", folder, "--judge", "demo", "--methods", "plain,sparke,contextual", *SMALL,
        "--metrics", "vendi,agreement,on_data", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["methods"]) == {"plain", "sparke", "contextual"}
    assert all(set(by) == {"vendi", "agreement", "on_data"} for by in found["methods"].values())
    assert (tmp_path / "out" / "bench.html").is_file()
