"""Arms that are chosen by prompt: one arm a batch, choices that follow from the records, and rewards."""

import json

import pytest
import torch

from kspec_guidance.selection import DAKUCB, PAKUCB, Oracle, PromptWise
from kspec_guidance.synthesis import Arm, RunFailedError, SynthesisError
from kspec_guidance.synthesis.arms import BY_PROMPT, make_selector
from kspec_guidance.synthesis.reproduction import read_recipe
from kspec_guidance.synthesis.store import Store
from tests.synthesis.small_runs import contents, make, quiet_pipeline, rows_of
from tests.synthesis.test_arms import Stop, stopping

ARMS = [Arm("low", {"guidance_scale": 1.0}, cost=1.0), Arm("high", {"guidance_scale": 8.0}, guide=0, cost=1.0)]
MODELS = [ARMS[0], ARMS[1], Arm("steps", {"num_inference_steps": 2}, cost=1.0)]


@pytest.fixture(scope="module")
def pipe():
    return quiet_pipeline()


def good(image, row):
    """Arm "low" is good for hearts, and "high" for all else."""
    return (row["arm"] == "low") == ("heart" in row["prompt"])


def good_number(image, row):
    return 0.2 + 0.5 * good(image, row) + 0.01 * (row["seed"] % 7)


@pytest.mark.parametrize("select", ["pak-ucb", pytest.param("rff-ucb", marks=pytest.mark.slow)])
def test_each_prompt_gets_the_arm_that_is_good_for_it(select, pipe, tmp_path):
    make(tmp_path, pipe, ["heart", "runner"], 14, 4, arms=ARMS, select=select, reward=good_number)
    records = list(Store(tmp_path).records())
    assert all({row["arm"] for row in r.rows} == {r.arm["arm"]} for r in records)
    rows = rows_of(tmp_path)
    assert len(rows) == 28
    late = [row for row in rows if row["attempt"] >= 7]
    assert sum(good(None, row) for row in late) / len(late) > 0.7
    assert all(row["reward"] == pytest.approx(good_number(None, row)) for row in rows)


RUNS = {
    "pak-ucb": {"reward": good_number},
    "rff-ucb": {"filter": good, "duplicates": 0.999},
    "dak-ucb": {"reward": good_number, "memory_by": "group"},
    "promptwise": {"filter": good},
    "mixture": {"select": DAKUCB(3, mixture=True), "filter": good, "candidates": 2, "batch_size": 4},
}
PROMPTS = [{"prompt": p, "group": p[-1]} for p in ("heart", "red heart", "runner", "cat face")]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_again_and_again_chooses_as_one_that_is_not(name, pipe, tmp_path):
    settings = {"select": name, "arms": MODELS, **RUNS[name]}
    make(tmp_path / "whole", pipe, PROMPTS, **settings)
    for after in (0, 1, 2, 0):
        with pytest.raises(Stop):
            make(tmp_path / "stopped", pipe, PROMPTS, progress_callback=stopping(after), **settings)
    make(tmp_path / "stopped", pipe, PROMPTS, **settings)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_batches_are_full_until_the_end_and_hold_one_memory(pipe, tmp_path):
    settings = {"select": "pak-ucb", "arms": ARMS, "reward": good_number, "memory_by": "group"}
    make(tmp_path, pipe, PROMPTS, 6, 4, **settings)
    records = list(Store(tmp_path).records())
    groups = [{row["prompt"][-1] for row in r.rows} for r in records]
    assert all(len(g) == 1 for g in groups)
    for name in ("t", "r", "e"):  # of twelve, six and six images: one batch of each arm may be smaller
        sizes = [len(r.rows) for r, g in zip(records, groups, strict=True) if g == {name}]
        assert sum(size < 4 for size in sizes) <= 2


def test_a_prompt_on_which_no_further_try_pays_is_given_up(pipe, tmp_path):
    def never(image, row):
        return "heart" in row["prompt"]

    select = PromptWise(2, [1.0, 1.0], cost_weight=0.3, exploration=0.5, budget=3)
    result = make(tmp_path, pipe, ["heart", "runner"], 6, 1, arms=ARMS, select=select, filter=never)
    assert result.images == 6
    assert result.stopped == {"all images made": 1, "no further try pays": 1}
    assert result.rejected["filter"] <= 3


def test_new_prompts_and_arms_of_earlier_settings_are_learned_from(pipe, tmp_path):
    settings = {"select": "pak-ucb", "reward": good_number}
    make(tmp_path, pipe, ["heart", "man"], 4, 2, arms=ARMS, **settings)
    result = make(tmp_path, pipe, ["heart", "runner"], 6, 2, arms=ARMS, force=True, **settings)
    assert result.images == 4 + 6 + 6


def test_rewards_that_cannot_be_are_refused(pipe, tmp_path):
    for settings, message in [
        ({"select": "pak-ucb"}, "pak-ucb compares rewards.*--reward"),
        ({"select": "greedy"}, "greedy compares rewards"),
        ({"select": PAKUCB(2)}, "PAKUCB compares rewards"),
        ({"select": "promptwise", "reward": good_number}, "whether an image is kept"),
        ({"select": DAKUCB(2, objective="jkd"), "reward": good_number}, "reference output"),
        ({"select": Oracle(2, lambda c: 0)}, "no state"),
        ({"select": "pak-ucb", "reward": 3}, "a function of an image and its row"),
        ({"select": "pak-ucb", "reward": "clip"}, "a reward is named module:function"),
        ({"select": "pak-ucb", "reward": "transformers:/no/such/folder"}, "cannot load the judge"),
        ({"arms": None, "reward": good_number}, "give arms="),
    ]:
        with pytest.raises(SynthesisError, match=message):
            make(tmp_path / "set", pipe, ["heart"], 2, 2, **{"arms": ARMS, **settings})
    assert not (tmp_path / "set").exists()
    for value in (float("nan"), "good", None):
        with pytest.raises(RunFailedError, match="must be a finite number"):
            make(tmp_path / "set", pipe, ["heart"], 2, 2, arms=ARMS, select="pak-ucb", reward=lambda i, r, v=value: v)
    with pytest.raises(RunFailedError, match=r"reward failed for an image of 'heart'.*ZeroDivisionError"):
        make(tmp_path / "set", pipe, ["heart"], 2, 2, arms=ARMS, select="pak-ucb", reward=lambda i, r: 1 / 0)


def test_a_pipeline_without_embeddings_of_prompts_is_refused(pipe, tmp_path):
    from kspec_guidance.synthesis.generator import Generator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "prompt_features", lambda *args: None)
        with pytest.raises(SynthesisError, match=r"gives no embeddings of prompts.*mixture-greedy"):
            make(tmp_path, pipe, ["heart"], 2, 2, arms=ARMS, select="pak-ucb", reward=good_number)


def test_a_judge_of_images_and_prompts_is_a_reward(pipe, tmp_path):
    make(tmp_path, pipe, ["heart"], 4, 2, arms=ARMS, select="pak-ucb", reward="demo")
    assert all(0 <= row["reward"] <= 1 for row in rows_of(tmp_path))
    assert Store(tmp_path).settings(0)["reward"] == "demo"
    assert read_recipe(tmp_path / "reproduce.yaml").arguments()["reward"] == "demo"


def test_columns_arm_and_reward_of_prompts_are_renamed(pipe, tmp_path):
    prompts = [{"prompt": "heart", "arm": "left", "reward": "gold"}]
    with pytest.warns(UserWarning, match="arm is written as source_arm"):
        make(tmp_path, pipe, prompts, 2, 2, arms=ARMS, select="uniform")
    (row, *_) = rows_of(tmp_path)
    assert (row["source_arm"], row["source_reward"]) == ("left", "gold")
    assert row["arm"] in ("low", "high")


@pytest.mark.parametrize("select", BY_PROMPT)
def test_pulls_that_are_given_up_are_no_longer_pending(select):
    s = make_selector(select, ARMS, 0, 0)
    rows = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    chosen = [s.choose(contexts=row) for row in rows]
    s.set_pending(chosen[:2], rows[:2])
    assert float(s.pending.sum()) == 2
    assert sum(map(len, s.waiting)) == 2
    assert json.dumps(type(s).load(s.state()).state()) == json.dumps(s.state())
    s.set_pending([])
    fresh = make_selector(select, ARMS, 0, 0)
    fresh.widths, fresh.draws = dict(s.widths), s.draws
    found, expected = (x.state()["arrays"] for x in (s, fresh))
    assert {k: v for k, v in found.items() if k != "theta"} == {k: v for k, v in expected.items() if k != "theta"}
    with pytest.raises(ValueError, match="unknown arm"):
        s.set_pending([2], rows[:1])
    with pytest.raises(ValueError, match="has 2 rows for 1 pulls"):
        s.set_pending([1], rows[:2])
