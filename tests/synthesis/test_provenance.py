import hashlib
from types import SimpleNamespace

import pytest

from kspec_guidance.synthesis import Arm, SynthesisError
from kspec_guidance.synthesis.provenance import check_licence, model_of
from tests.synthesis.small_runs import make, rows_of

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 4.0}


def test_rows_state_where_an_image_comes_from(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"], 1, 1, call=ONE_STEP, licence="cc0-1.0")
    (row,) = rows_of(tmp_path)
    known = {
        "model": "demo", "revision": None, "pipeline": "StableDiffusionPipeline", "steps": 1, "guidance_scale": 4.0,
        "scheduler": "DPMSolverMultistepScheduler", "licence": "CC0-1.0", "marks": "iptc",
    }  # fmt: skip
    assert {name: row[name] for name in known} == known
    assert len(row["guide_digest"]) == 12
    for name in ("kspec-guidance ", "torch ", "diffusers ", "python "):
        assert name in row["versions"]
    assert row["sha256"] == hashlib.sha256((tmp_path / row["file_name"]).read_bytes()).hexdigest()


def test_rows_have_the_settings_of_their_arm(tmp_path, pipe):
    arms = [
        Arm("plain", {"guidance_scale": 1.5}),
        Arm("euler", {"num_inference_steps": 2}, scheduler="EulerDiscreteScheduler"),
    ]
    make(tmp_path, pipe, ["heart"], 8, 1, call=ONE_STEP, arms=arms, select="uniform")
    found = {(r["arm"], r["scheduler"], r["steps"], r["guidance_scale"]) for r in rows_of(tmp_path)}
    assert found == {
        ("plain", "DPMSolverMultistepScheduler", 1, 1.5),
        ("euler", "EulerDiscreteScheduler", 2, 4.0),
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [("CC0-1.0", "CC0-1.0"), ("cc-by-4.0", "CC-BY-4.0"), ("mit or apache-2.0", "MIT OR Apache-2.0"), (None, None),
     ("LicenseRef-mine", "LicenseRef-mine")],
)  # fmt: skip
def test_licences_get_their_spdx_spelling(given, expected):
    assert check_licence(given) == expected


@pytest.mark.parametrize("given", ["CC0", "", "my own", "MIT OR", 3, "CC0-1.0\n<script>"])
def test_other_licences_are_refused_before_anything_is_written(given, tmp_path, pipe):
    with pytest.raises(SynthesisError, match=r"licence must be an SPDX identifier .* for instance CC0-1.0"):
        make(tmp_path / "set", pipe, ["heart"], 1, licence=given)
    assert not (tmp_path / "set").exists()


def test_images_keep_the_licence_they_were_made_under(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"], 1, call=ONE_STEP, licence="CC0-1.0")
    with pytest.raises(SynthesisError, match=r"licence: CC0-1.0 before, now MIT"):
        make(tmp_path, pipe, ["heart"], 1, call=ONE_STEP, licence="MIT")
    make(tmp_path, pipe, ["heart"], 2, call=ONE_STEP, licence="MIT", force=True)
    assert [row["licence"] for row in rows_of(tmp_path)] == ["CC0-1.0", "MIT"]


def fake(name, part=""):
    return SimpleNamespace(
        config={"_name_or_path": name}, components={"unet": SimpleNamespace(config={"_name_or_path": part or name})}
    )


def test_the_model_is_named_without_paths_of_this_machine(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "mine").mkdir()
    for name, part, expected in (
        ("org/model", f"/home/me/.cache/hub/models--org--model/snapshots/{commit}/unet", ("org/model", commit)),
        (f"/c/models--org--model/snapshots/{commit}", "", ("org/model", commit)),
        (str(tmp_path / "mine"), "", ("mine", None)),
        (str(tmp_path / "mine") + "/", "", ("mine", None)),
        ("./mine", "", ("mine", None)),
        ("C:\\models\\mine", "", ("mine", None)),
        ("", "", (None, None)),
    ):  # fmt: skip
        assert model_of(fake(name, part)) == expected


def test_times_are_beside_the_metadata(tmp_path, pipe):
    import json
    from datetime import datetime, timezone

    make(tmp_path, pipe, ["heart"], 2, call=ONE_STEP)
    lines = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [row["file_name"] for row in rows_of(tmp_path)]
    for line in lines:
        assert 0 <= (datetime.now(timezone.utc) - datetime.fromisoformat(line["time"])).total_seconds() < 600
