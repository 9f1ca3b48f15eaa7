"""Runs with arms: choices follow from the records, and settings are those of the arm."""

import json

import pytest
import torch

from kspec_guidance.evaluation.embedders import image_embedder
from kspec_guidance.selection import MixtureGreedy, OneArm
from kspec_guidance.synthesis import Arm, SynthesisError, read_arms
from kspec_guidance.synthesis.arms import (
    ArmChoice,
    arm_differences,
    arm_lines,
    arm_summary,
    check_arms,
    make_selector,
)
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.records import Record, pack_tensors
from kspec_guidance.synthesis.report import _strips
from kspec_guidance.synthesis.store import Store
from tests.synthesis.small_runs import CALL, contents, make, quiet_pipeline, rows_of

ARMS = [
    Arm("low", {"guidance_scale": 1.0}, cost=1.0),
    Arm("high", {"guidance_scale": 8.0}, guide=0, cost=1.0),
    Arm("heun", {"num_inference_steps": 2}, scheduler="HeunDiscreteScheduler", cost=2.0),
]


@pytest.fixture(scope="module")
def pipe():
    return quiet_pipeline()


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("arms") / "set"
    return out, make(out, pipe, arms=ARMS)


class Stop(Exception):
    pass


def stopping(after):
    """A callback that stops the run after so many batches."""
    left = [after]

    def callback(progress):
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return callback


def test_each_batch_has_one_arm_and_all_arms_are_tried(whole):
    out, result = whole
    records = list(Store(out).records())
    assert {r.arm["arm"] for r in records} == {"low", "high", "heun"}
    assert all({row["arm"] for row in r.rows} == {r.arm["arm"]} for r in records)
    assert sum(a["images"] for a in result.arms.values()) == result.images == 25
    assert json.loads((out / "summary.json").read_text())["arms"] == result.arms
    assert sum(a["share"] for a in result.arms.values()) == pytest.approx(1, abs=1e-3)


def test_rows_say_what_the_arm_did(whole):
    rows = rows_of(whole[0])
    assert {row["guide"] for row in rows if row["arm"] == "high"} == {"none"}
    assert "none" not in {row["guide"] for row in rows if row["arm"] != "high"}


def test_images_of_an_arm_are_those_of_a_run_with_its_settings(pipe, tmp_path):
    make(tmp_path / "arm", pipe, ["heart"], 6, 3, arms=ARMS, select=OneArm(3, 1))
    make(tmp_path / "plain", pipe, ["heart"], 6, 3, call={**CALL, "guidance_scale": 8.0}, guide=plain())
    found = [row for row in rows_of(tmp_path / "arm") if row["arm"] == "high"]
    assert len(found) == 6
    for row in found:
        name = row["file_name"]
        assert (tmp_path / "arm" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def plain():
    from kspec_guidance import SPARKE

    return SPARKE(0)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["mixture-greedy", "mixture-ucb"])
def test_a_run_that_is_stopped_again_and_again_chooses_as_one_that_is_not(select, whole, pipe, tmp_path):
    expected = whole[0]
    if select != "mixture-greedy":
        expected = tmp_path / "whole"
        make(expected, pipe, arms=ARMS, select=select)
    out = tmp_path / "stopped"
    for after in (0, 1, 2, 0):
        with pytest.raises(Stop):
            make(out, pipe, arms=ARMS, select=select, progress_callback=stopping(after))
    make(out, pipe, arms=ARMS, select=select)
    assert contents(out) == contents(expected)


def test_the_records_give_the_state_of_the_selector(whole, pipe):
    states = []
    for _ in range(2):
        guide = plain()
        chosen = ArmChoice(ARMS, make_selector("mixture-greedy", ARMS, 0, 0), guide, Generator(pipe, guide, CALL))
        for record in Store(whole[0]).process_records(0):
            assert chosen.choose().name == record.arm["arm"]
            chosen.learn(record)
        states.append(json.dumps(chosen.selector.state()))
    assert states[0] == states[1]


def test_dropped_images_are_events(pipe, tmp_path):
    result = make(tmp_path, pipe, ["heart"], 12, 3, arms=ARMS[:2], filter=lambda image, row: row["arm"] == "low")
    assert result.arms["high"]["images"] == 0
    assert result.arms["high"]["dropped"] == 12  # four pulls for each of three samples, then none
    assert result.arms["high"]["cost_per_image"] is None
    assert result.arms["low"]["cost_per_image"] == 1.0


def test_without_arms_records_and_settings_are_as_before(pipe, tmp_path):
    make(tmp_path, pipe, ["heart"], 3, 3)
    record = next(Store(tmp_path).records())
    assert record.arm is None
    assert not {"arms", "select"} & set(Store(tmp_path).settings(0))
    assert "arms" not in json.loads((tmp_path / "summary.json").read_text())


def test_other_arms_are_other_settings(whole, pipe):
    with pytest.raises(SynthesisError, match="other settings"):
        make(whole[0], pipe, arms=ARMS[:2])


def test_a_selector_of_the_users_own_is_copied(pipe, tmp_path):
    s = MixtureGreedy(2, "vendi", start=1)
    make(tmp_path, pipe, ["heart"], 6, 3, arms=ARMS[:2], select=s)
    assert float(s.told.sum()) == 0
    assert Store(tmp_path).settings(0)["select"][0] == "MixtureGreedy"


def test_a_report_has_a_line_for_each_arm(pipe, tmp_path):
    make(tmp_path, pipe, ["heart", "runner"], 8, 4, arms=ARMS[:2], report=True)
    page = (tmp_path / "report.html").read_text()
    assert "arm low:" in page
    assert "arm high:" in page
    assert 'aria-label="Shares of the arms"' in page


def test_strips_show_the_arms_side_by_side_with_images_of_common_prompts():
    arms = {"a": {"images": 4}, "b": {"images": 2}, "c": {"images": 0}}
    made = [("a", "x"), ("a", "y"), ("a", "y"), ("a", "z"), ("b", "y"), ("b", "z")]
    rows = [{"arm": arm, "prompt": p, "file_name": f"0000/{k}.png"} for k, (arm, p) in enumerate(made)]
    found = {name: samples for name, _, samples in _strips(rows, arms, [f"{k}.png" for k in range(6)], 3)}
    assert found == {"a": [1, 3, 0], "b": [4, 5], "c": []}


def test_the_page_of_arms_fits_wide_and_narrow_screens(pipe, tmp_path, browser):
    make(tmp_path, pipe, ["heart", "runner"], 12, 4, arms=ARMS, select="uniform", report=True)
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(f"file://{tmp_path}/report.html")
        page.wait_for_function("document.querySelector('section .row .strip img').naturalWidth > 0")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


def test_scores_and_shares_of_arms_are_summarised(whole):
    found = arm_summary(list(Store(whole[0]).records(tensors=True)), ["low", "high", "heun"], {0})
    for about in found.values():
        assert len(about["shares"]) == 4
        if about["images"] >= 8:
            value, low, high = about["rke"]
            assert low <= value <= high


def planted(counts, seed=0):
    """Records of arms "a" and "b" that differ on the first prompt alone; ``counts`` are images by arm and prompt."""
    g = torch.Generator().manual_seed(seed)
    modes, prompts = torch.eye(12), torch.eye(3)
    records = []
    for number, (arm, images) in enumerate(counts.items()):
        rows, x, t = [], [], []
        for prompt, n in enumerate(images):
            for _ in range(n):
                mode = 4 * prompt + int(torch.randint(2, (1,), generator=g)) + 2 * (arm == "b" and prompt == 0)
                rows.append({"prompt": f"prompt {prompt}", "file_name": f"{number}-{len(rows)}.png"})
                x.append(modes[mode] + 0.01 * torch.randn(12, generator=g))
                t.append(prompts[prompt])
        tensors = pack_tensors(torch.stack(x), torch.stack(t), None)
        records.append(Record(0, 0, number, rows, [], tensors, arm={"arm": arm, "cost": 1.0}))
    return records


def test_differences_of_the_best_two_arms_are_on_the_prompt_where_they_differ():
    records = planted({"a": [12, 12, 12], "b": [12, 24, 12], "rare": [1, 1, 1]})
    found = arm_differences(records, arm_summary(records, ["rare", "a", "b"], {0}), {0})
    sure = [d for d in found if d["p_value"] < 0.05]
    assert {(d["arm"], d["other"]) for d in sure} == {("a", "b"), ("b", "a")}
    assert {prompt for d in sure for prompt in d["prompts"]} == {"prompt 0"}
    assert "makes something of prompt 0 that arm" in arm_lines({}, found)[0]


def test_arms_that_make_other_prompts_are_not_said_to_differ():
    records = planted({"a": [0, 30, 5], "b": [0, 5, 30]})
    summary = arm_summary(records, ["a", "b"], {0})
    assert all(d["p_value"] > 0.05 for d in arm_differences(records, summary, {0}))
    assert arm_differences(records[:1], summary, {0}) == []
    records = planted({"a": [0, 20, 0], "b": [0, 0, 20]})
    assert arm_differences(records, summary, {0}) == []


def test_features_and_settings_of_earlier_epochs_count_only_if_they_are_the_same(pipe, tmp_path):
    settings = {"images_per_prompt": 6, "select": "uniform"}
    make(tmp_path, pipe, ["heart"], arms=ARMS[:2], **settings)
    high = Arm("high", {"guidance_scale": 7.0}, guide=0, cost=1.0)
    learned = []

    class Watched(ArmChoice):
        def learn(self, record, same=None):
            learned.append((record.arm["arm"], same))
            super().learn(record, same)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kspec_guidance.synthesis.run.ArmChoice", Watched)
        make(tmp_path, pipe, ["heart", "man"], arms=[ARMS[0], high], force=True, **settings)
    assert [same for _, same in learned if same is not None] == [{"low"}, {"low"}]
    embedder = image_embedder("demo")
    result = make(tmp_path, pipe, ["heart", "man", "runner"], arms=ARMS[:2], embedder=embedder, force=True, **settings)
    assert sum(about["images"] for about in result.arms.values()) == 18


def test_arms_are_read_from_a_file(tmp_path):
    path = tmp_path / "arms.toml"
    path.write_text("[low]\nguidance_scale = 1.0\n[off]\nguide = false\ncost = 2\nscheduler = 'DDIMScheduler'\n")
    low, off = read_arms(path)
    assert (low.name, low.call, low.guide) == ("low", {"guidance_scale": 1.0}, 1.0)
    assert (off.name, off.guide, off.cost, off.scheduler) == ("off", False, 2, "DDIMScheduler")
    path.write_text("guidance_scale = 1.0\n")
    with pytest.raises(SynthesisError, match="a table for each arm"):
        read_arms(path)
    path.write_text("[x\n")
    with pytest.raises(SynthesisError, match="cannot read"):
        read_arms(path)
    path.write_text("[x]\nguide = -1\n")
    with pytest.raises(SynthesisError, match="factor of at least 0"):
        read_arms(path)


def test_arms_that_cannot_be_are_refused(pipe):
    for arms, message in [
        ([Arm("a")], "two or more"),
        ([Arm("a"), Arm("a")], "different names"),
        ([Arm("a"), Arm("b", {"guidance_scal": 2})], "arm 'b'.*did you mean guidance_scale"),
        ([Arm("a"), Arm("b", scheduler="DDIMSchedulr")], "no scheduler 'DDIMSchedulr'"),
    ]:
        with pytest.raises(SynthesisError, match=message):
            check_arms(arms, pipe, CALL)
    with pytest.raises(SynthesisError, match="one size"):
        Arm("a", {"height": 32})
    with pytest.raises(SynthesisError, match="positive number"):
        Arm("a", cost=0)
    with pytest.raises(SynthesisError, match="unknown select"):
        make_selector("mixture", ARMS, 0, 0)
    with pytest.raises(SynthesisError, match="has 2 arms, and the run has 3"):
        make_selector(MixtureGreedy(2), ARMS, 0, 0)
    used = MixtureGreedy(3)
    used.choose()
    with pytest.raises(SynthesisError, match="used already"):
        make_selector(used, ARMS, 0, 0)
