import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.synthesis import SynthesisError
from kspec_guidance.synthesis.candidates import choose_candidates
from kspec_guidance.synthesis.estimate import estimate
from tests.synthesis.small_runs import CALL, contents, make, quiet_pipeline, rows_of

KINDS = torch.eye(4)
NONE = torch.zeros(0, 4)


def choose(kinds, candidates, usable=None, earlier=()):
    x, before = KINDS[torch.tensor(kinds)], KINDS[list(earlier)] if earlier else NONE
    usable = usable or [True] * len(x)
    found = choose_candidates(x, torch.ones(len(x), 2), usable, candidates, before, torch.ones(len(before), 2))
    return found, [kinds[k] for k in found]


def test_images_of_one_batch_choose_different_kinds():
    assert choose([0, 0, 0, 1, 0, 0, 0, 1], 4)[1] in ([0, 1], [1, 0])
    assert sorted(choose([0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2], 4)[1]) == [0, 1, 2]


def test_kinds_that_the_prompt_already_has_are_avoided():
    assert choose([0, 1, 2], 3, earlier=(0, 0, 1))[1] == [2]
    assert choose([0, 1, 2], 3, earlier=(2, 2, 1))[1] == [0]


def test_another_prompt_does_not_take_a_kind_away():
    prompts = torch.eye(2).repeat_interleave(3, 0)
    x, t = KINDS[[0, 1, 1, 0, 1, 1]], prompts
    earlier, of_earlier = KINDS[[1, 1]], prompts[[0, 0]]  # the first prompt has kind 1
    found = choose_candidates(x, t, [True] * 6, 3, earlier, of_earlier)
    assert found[0] == 0


def test_dropped_candidates_are_not_chosen_and_a_block_without_any_is_left_out():
    assert choose([0, 1, 2, 3], 2, usable=[False, True, True, False])[0] == [1, 2]
    assert choose([0, 1, 2, 3], 2, usable=[False, False, True, True])[0] == [2]
    assert choose([0, 1], 2, usable=[False, False])[0] == []


@pytest.mark.slow
def test_a_run_keeps_one_of_each_block_and_is_resumed_with_the_same_choices(tmp_path, pipe):
    settings = {"prompts": ["heart", "runner", "man"], "images_per_prompt": 2, "batch_size": 4, "candidates": 2}
    result = make(tmp_path / "whole", pipe, **settings)
    rows = rows_of(tmp_path / "whole")
    assert result.images == len(rows) == 6
    assert result.rejected == {"another candidate was kept": 6}
    assert {(row["prompt"], row["attempt"] // 2) for row in rows} == {(p, k) for p in settings["prompts"] for k in (0, 1)}

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.done >= 2:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "killed", pipe, progress_callback=stop, **settings)
    make(tmp_path / "killed", pipe, **settings)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_filter_drops_candidates_before_the_choice(tmp_path, pipe):
    make(
        tmp_path, pipe, prompts=["heart"], images_per_prompt=2, batch_size=4, candidates=2,
        filter=lambda image, row: row["attempt"] % 2 == 1,
    )  # fmt: skip
    assert [row["attempt"] for row in rows_of(tmp_path)] == [1, 3]


@pytest.mark.slow
def test_one_candidate_changes_nothing(tmp_path, pipe):
    make(tmp_path / "a", pipe, images_per_prompt=1)
    make(tmp_path / "b", pipe, images_per_prompt=1, candidates=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_more_candidates_than_a_batch_holds_are_refused(tmp_path, pipe):
    with pytest.raises(SynthesisError, match="raise it"):
        make(tmp_path, pipe, candidates=4)
    with pytest.raises(SynthesisError, match="candidates must be an integer"):
        make(tmp_path, pipe, candidates=0)


def test_the_estimate_counts_candidates(tmp_path):
    plan = estimate(["heart"], tmp_path, quiet_pipeline(), SPARKE(0), 6, 4, call=CALL, candidates=2)
    assert (plan.images, plan.batches) == (6, 3)


def test_start_noises_are_chosen_by_first_predictions_and_the_choice_is_repeated(tmp_path, pipe):
    settings = {"prompts": ["heart"], "images_per_prompt": 2, "batch_size": 2, "call": {"num_inference_steps": 1}}
    made = {}
    for name, n in (("plain", 1), ("chosen", 3), ("again", 3)):
        make(tmp_path / name, pipe, **settings, start_candidates=n)
        made[name] = contents(tmp_path / name)
    assert made["chosen"] == made["again"]
    images = [{k: v for k, v in files.items() if k.endswith(".png")} for files in made.values()]
    assert images[0] != images[1]
    with pytest.raises(SynthesisError, match="start_candidates must be an integer of at least 1, got 0"):
        make(tmp_path / "none", pipe, **settings, start_candidates=0)


@pytest.mark.slow
def test_an_estimate_times_the_choice_of_start_noises(tmp_path, pipe):
    plan = estimate(["heart"], tmp_path, pipe, SPARKE(), 3, 3, call=CALL, start_candidates=3)
    assert plan.batches == 1
