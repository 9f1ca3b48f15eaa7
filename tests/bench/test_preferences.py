"""Bradley-Terry strengths against closed forms and simulated participants."""

import json
import math

import numpy as np
import pytest

from kspec_guidance.bench.preferences import analyse, bradley_terry, read_answers


def test_two_methods_have_the_log_odds_of_their_wins():
    for w, l in ((3, 1), (5, 0), (2, 2)):
        s = bradley_terry(np.array([[0, w], [l, 0]]))
        assert s[0] - s[1] == pytest.approx(math.log((w + 0.5) / (l + 0.5)))


def test_strengths_of_expected_wins_are_recovered_in_batches():
    s = np.array([0.8, -0.2, -0.6, 0.0])
    s -= s.mean()
    p = 1 / (1 + np.exp(s[None] - s[:, None]))
    chain = p * (np.abs(np.subtract.outer(range(4), range(4))) == 1)  # neighbours alone were compared
    found = bradley_terry(np.stack([70 * p * (1 - np.eye(4)), 200 * chain]), prior=0)
    np.testing.assert_allclose(found, [s, s], atol=1e-6)


def test_wins_without_a_chain_of_comparisons_are_an_error():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 3
    with pytest.raises(ValueError, match="never compared"):
        bradley_terry(wins)
    with pytest.raises(ValueError, match="at least 0"):
        bradley_terry(-wins)


KEY = {
    "form": "f", "methods": {"plain": None, "sparke": "50"}, "questions": {"variety": "?"},
    "items": [{"prompt": k, "left": ("plain", "sparke")[k % 2], "right": ("sparke", "plain")[k % 2]} for k in range(30)],
}  # fmt: skip


def participant(name, choose):
    return {
        "form": "f",
        "participant": name,
        "answers": [{"item": k, "answers": {"variety": choose(k)}} for k in range(30)],
    }


def simulated(seed, people=6, preferred=0.7):
    rng = np.random.default_rng(seed)
    sides = lambda k: ("left", "right") if KEY["items"][k]["left"] == "sparke" else ("right", "left")  # noqa: E731
    return [participant(f"{n}", lambda k: sides(k)[int(rng.random() > preferred)]) for n in range(people)]


def test_the_interval_of_what_participants_prefer_covers_the_truth():
    covered, found = 0, None
    for seed in range(40):
        found = analyse(KEY, simulated(seed))["questions"]["variety"]["methods"]
        covered += found["sparke"]["preferred"]["low"] < 0.7 < found["sparke"]["preferred"]["high"]
    assert covered >= 34
    assert found["plain"]["preferred"]["value"] == pytest.approx(0.5)
    assert found["sparke"]["wins"] + found["sparke"]["losses"] == 180


def test_ties_and_open_answers_count_as_halves_and_not_at_all():
    answers = [participant("a", lambda k: "equal"), {"form": "f", "participant": "b", "answers": []}]
    found = analyse(KEY, answers)["questions"]["variety"]
    assert (found["answers"], found["methods"]["sparke"]["ties"]) == (30, 30)
    assert found["methods"]["sparke"]["strength"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([participant("a", lambda k: "left"), participant("a", lambda k: "left")], "same participant: a"),
        ([participant("a", lambda k: "left") | {"form": "g"}], "to the form 'g'"),
        ([participant("a", lambda k: "top")], "answer 'top' to item 0"),
        ([], "nobody has answered"),
    ],
)
def test_answers_that_cannot_be_are_errors(answers, words):
    with pytest.raises(ValueError, match=words):
        analyse(KEY, answers)


def test_files_that_are_no_answers_are_errors(tmp_path):
    (tmp_path / "key.json").write_text(json.dumps(KEY))
    with pytest.raises(ValueError, match="holds no answers to a form"):
        read_answers(tmp_path / "key.json")
    (tmp_path / "a.json").write_text(json.dumps(participant("a", lambda k: "left")))
    assert read_answers(tmp_path / "a.json")["participant"] == "a"
