"""Scores of comparisons whose values are known."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from kspec_guidance.bench import judge as judging
from kspec_guidance.bench.judge import judge
from kspec_guidance.bench.metrics import METRICS, Metric
from kspec_guidance.bench.resources import Unavailable
from kspec_guidance.utils.images import SourceError
from tests.bench.runs import make_run


def channel(sample, c):
    with Image.open(sample.path) as image:
        return float(image.getpixel((0, 0))[c])


def stub(name, aspect, unit, measure, **more):
    return Metric(name, name, aspect, unit, lambda r: measure, **more)


@pytest.fixture
def stubs(monkeypatch):
    """Scores that read the colours of images: the method's number (diversity, of prompts) and equal quality (of images)."""
    found = {
        "method": stub("method", "diversity", "prompt", lambda s: torch.tensor(100 + channel(s[0], 0) + channel(s[0], 1))),
        "flat": stub("flat", "agreement", "image", lambda s: torch.ones(len(s)), tolerance=0.1),
        "all": stub("all", "diversity", "set", lambda s: torch.tensor([channel(x, 1) for x in s]).mean()),
    }
    for name, metric in found.items():
        monkeypatch.setitem(METRICS, name, metric)
    return list(found)


def test_values_are_means_and_differences_are_paired(tmp_path, stubs):
    found = judge(make_run(tmp_path), stubs)
    assert {label: by["method"]["value"] for label, by in found["methods"].items()} == {
        "plain": 120, "sparke": 230, "sparke@25": 220, "cads": 320,
    }  # fmt: skip
    plain, difference = found["methods"]["plain"]["method"], found["differences"]["cads"]["method"]
    assert plain["low"] < 120 < plain["high"]
    assert (difference["value"], difference["low"], difference["high"]) == pytest.approx((200, 200, 200))
    assert difference["p"] < 0.05
    assert found["methods"]["plain"]["flat"] == {"value": 1.0, "low": None, "high": None}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_most_diverse_strength_of_equal_quality_is_chosen_and_named_without_its_strength(tmp_path, stubs, monkeypatch):
    assert judge(make_run(tmp_path / "a"), stubs)["chosen"] == {"sparke": "50"}
    falls = stub("flat", "agreement", "image", lambda s: torch.full((len(s),), -channel(s[0], 0)), tolerance=105.0)
    monkeypatch.setitem(METRICS, "flat", falls)
    found = judge(make_run(tmp_path / "b"), stubs)
    assert found["chosen"] == {"sparke": "25"}
    assert list(found["methods"]) == ["plain", "sparke", "sparke@50", "cads"]
    run = make_run(tmp_path / "c")
    run.settings["methods"][1]["chosen"] = "50"
    assert judge(run, stubs)["chosen"] == {"sparke": "50"}


def test_gain_at_equal_quality_is_relative_to_plain_sampling(tmp_path, stubs):
    found = judge(make_run(tmp_path), stubs)
    front = found["fronts"]["method"]
    assert front["methods"]["cads"]["gain"] == pytest.approx(200 / 120)
    assert front["methods"]["sparke"]["gain"] == pytest.approx(110 / 120)
    assert front["reference"] == "sparke"
    assert found["verdict"].startswith("At equal flat, cads gains most in method: +167% over plain sampling")
    assert found["verdict"].endswith("; next is sparke with +92%.")
    assert found["cost"]["cads"] == {"seconds": 3.0, "added_seconds": 2.0, "peak_bytes": 2**20}


def test_draws_of_a_score_of_a_set_have_the_jackknifes_variance():
    """For a mean of independent prompts that is the variance of a mean, whatever the number of groups."""
    rng = np.random.default_rng(0)
    for prompts in (8, 40):
        draws, values = judging._Draws(prompts, 3), rng.normal(size=prompts)
        metric = stub("mean", "diversity", "set", None)
        groups = judging._groups(metric, prompts, 3)
        parts = [values.mean(), *(values[groups != g].mean() for g in range(groups.max() + 1))]
        found = draws.of(metric, np.array(parts))
        means = np.array([values[groups == g].mean() for g in range(groups.max() + 1)])
        assert found[0] == pytest.approx(values.mean())
        assert found.std() == pytest.approx(means.std(ddof=1) / len(means) ** 0.5, rel=0.1)
        of_prompts = draws.of(stub("mean", "diversity", "prompt", None), values)
        assert of_prompts.std() == pytest.approx(values.std() / prompts**0.5, rel=0.1)


def test_draws_of_images_cover_prompts_and_seeds_and_leave_unknown_ones_out():
    draws, metric = judging._Draws(6, 4), stub("image", "agreement", "image", None, tolerance=1.0)
    by_seed = np.tile(np.arange(4.0), (6, 1))
    assert draws.of(metric, by_seed).std() == pytest.approx(np.arange(4).std() / 2, rel=0.1)
    by_seed[2] = np.nan
    assert draws.of(metric, by_seed)[0] == pytest.approx(1.5)
    assert np.ptp(draws.of(metric, np.where(np.isnan(by_seed), np.nan, 1.0))) == 0


def test_large_sets_are_scored_on_evenly_spaced_prompts_in_groups_of_equal_size():
    groups = judging._groups(stub("set", "diversity", "set", None, most=100), 1000, 4)
    assert (groups >= 0).sum() == 25
    assert set(np.bincount(groups[groups >= 0])) == {2, 3}


def test_a_score_that_fails_or_is_absent_is_named_and_the_others_finish(tmp_path, stubs, monkeypatch):
    def fails(samples):
        raise RuntimeError("out of memory\nmore")

    def absent(resources):
        raise Unavailable("pip install something")

    monkeypatch.setitem(METRICS, "dies", stub("dies", "realism", "set", fails, tolerance=1.0))
    monkeypatch.setitem(
        METRICS, "shape", stub("shape", "realism", "image", lambda s: torch.zeros(len(s), 2)[:1], tolerance=1.0)
    )
    monkeypatch.setitem(
        METRICS, "unknown", stub("unknown", "realism", "prompt", lambda s: torch.tensor(torch.nan), tolerance=1.0)
    )
    monkeypatch.setitem(METRICS, "absent", Metric("absent", "absent", "realism", "set", absent, tolerance=1.0))
    found = judge(make_run(tmp_path), ["dies", "shape", "unknown", "absent", *stubs])
    assert found["skipped"] == {
        "dies": "failed: RuntimeError: out of memory",
        "shape": "failed: ValueError: values of shape [1] for 3 images",
        "unknown": "is not known for these prompts",
        "absent": "pip install something",
    }
    assert set(found["methods"]["cads"]) == set(stubs)


def test_an_unfinished_run_is_scored_on_the_prompts_that_all_methods_have(tmp_path, stubs):
    run = make_run(tmp_path / "a", left_out=[("cads", None, 4), ("sparke", "25", 0)])
    found = judge(run, stubs)
    assert (found["prompts"], found["methods"]["plain"]["method"]["value"]) == (3, 120)
    assert "3 prompts are done for all methods, 5 for some" in " ".join(found["notes"])
    stopped = judge(make_run(tmp_path / "b", left_out=[("cads", None, k) for k in range(3)]), stubs)
    assert "left out, with images of less than half of 5 prompts: cads (2)" in stopped["notes"]
    assert (stopped["prompts"], list(stopped["methods"])) == (5, ["plain", "sparke", "sparke@25"])
    nothing = make_run(
        tmp_path / "c", 1, left_out=[(m, s, 0) for m in ("plain",) for s in (None,)], methods={"plain": [None]}
    )
    with pytest.raises(ValueError, match="no prompt is finished"):
        judge(nothing, stubs)


def test_values_are_measured_once_and_again_for_a_changed_image(tmp_path, stubs, monkeypatch):
    calls = []

    def counted(samples):
        calls.append(samples[0].path.name)
        return torch.ones(len(samples))

    monkeypatch.setitem(METRICS, "counted", stub("counted", "preference", "image", counted, tolerance=1.0))
    run = make_run(tmp_path)
    first = judge(run, ["counted", *stubs])
    assert len(calls) == 4 * 5
    assert judge(run, ["counted", *stubs]) == first
    assert len(calls) == 4 * 5
    os.utime(tmp_path / "images/cads/plain/000001-000.png", ns=(1, 1))
    judge(run, ["counted"])
    assert calls[20:] == ["000001-000.png"]
    (tmp_path / "scores" / "counted.json").write_text("damaged")
    assert judge(run, ["counted", *stubs]) == first


def test_without_plain_sampling_or_with_one_prompt_there_are_values_alone(tmp_path, stubs):
    found = judge(make_run(tmp_path / "a", methods={"cads": [None], "oscar": [None]}), stubs)
    assert (found["differences"], found["fronts"]) == ({}, {})
    assert "without plain sampling" in found["verdict"]
    one = judge(make_run(tmp_path / "b", prompts=1, images=1), stubs)
    assert one["methods"]["plain"]["method"] == {"value": 100.0, "low": None, "high": None}
    assert "p" not in one["differences"]["cads"]["method"]
    assert any("fewer than 20 prompts, here 1," in note for note in one["notes"])


def test_unknown_scores_and_references_without_images_are_errors(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"unknown score 'vendy'.*did you mean 'vendi'"):
        judge(run, ["vendy"])
    with pytest.raises(SourceError, match="not a folder of real images"):
        judge(run, ["fd"], reference=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="contains no images"):
        judge(run, ["fd"], reference=tmp_path / "empty")


def test_a_difference_that_may_be_chance_is_called_so(tmp_path, stubs, monkeypatch):
    def noisy(samples):
        method, k = samples[0].path.parts[-3], int(samples[0].path.stem[:6])
        return torch.tensor({"plain": 100.0, "a": 200.0 + 30 * (k % 2), "b": 201.0 + 30 * (1 - k % 2)}[method])

    monkeypatch.setitem(METRICS, "method", stub("method", "diversity", "prompt", noisy))
    run = make_run(tmp_path, methods={"plain": [None], "a": [None], "b": [None]})
    found = judge(run, stubs)
    assert found["fronts"]["method"]["order"] == ["b", "a"]
    assert found["fronts"]["method"]["ahead"][0] < 0 < found["fronts"]["method"]["ahead"][1]
    assert found["verdict"].endswith(", a difference that may be chance.")


@pytest.mark.parametrize(("names", "missing"), [(["method"], "a score of quality"), (["flat"], "a score of diversity")])
def test_the_verdict_names_what_a_comparison_lacks(tmp_path, stubs, names, missing):
    assert f"without {missing} nothing is compared" in judge(make_run(tmp_path), names)["verdict"]


def test_intervals_stay_within_the_bounds_of_their_score(tmp_path, monkeypatch):
    full = stub("full", "diversity", "set", lambda s: torch.tensor(1 - (channel(s[-1], 1) < 40) * 0.2), bounds=(0, 1))
    monkeypatch.setitem(METRICS, "full", full)
    found = judge(make_run(tmp_path), ["full"])["methods"]["plain"]["full"]
    assert (found["value"], found["high"]) == (1, 1)
    assert found["low"] < 1


def test_images_of_equal_size_and_time_of_two_methods_are_told_apart(tmp_path, stubs):
    """As in a folder that was copied or unpacked: times of whole seconds, names that are the same for each method."""
    run = make_run(tmp_path)
    size = max(path.stat().st_size for path in tmp_path.rglob("*.png"))
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(10**9, 10**9))
    found = judge(run, stubs)["methods"]
    assert (found["plain"]["method"]["value"], found["cads"]["method"]["value"]) == (120, 320)


@pytest.mark.parametrize(("method", "order"), [("sparke", ["10", "50", "100"]), ("lower-cfg", ["100", "50", "10"])])
def test_fronts_go_from_plain_sampling_to_the_strongest_setting(tmp_path, stubs, method, order):
    run = make_run(tmp_path, methods={"plain": [None], method: ["50", "100", "10"]})
    assert [s["strength"] for s in judge(run, stubs)["settings"]] == [None, *order]


@pytest.mark.parametrize(
    ("model", "emoji", "judged"), [("tiny", None, False), ("tiny", True, True), ("demo", False, False)]
)
def test_emoji_of_any_model_may_be_judged_by_the_emoji_classifier(tmp_path, model, emoji, judged):
    found = judge(make_run(tmp_path, model=model, names=["house", "ghost"], images=2), ["agreement"], emoji=emoji)
    assert ("agreement" in found["metrics"]) is judged
    assert ("--judge demo" in found["skipped"].get("agreement", "")) is not judged
