"""What every method must do: states, errors, pending pulls, more arms, merging."""

import json
import math

import pytest
import torch

from kspec_guidance import selection
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.selection import MixtureGreedy, Uniform

REFERENCE = torch.randn(12, 4, generator=torch.Generator().manual_seed(9)).double()
MAKERS = {
    **{f"greedy-{o}": (lambda o=o, **k: selection.MixtureGreedy(3, o, **k)) for o in ("rke", "vendi", "reward")},
    **{f"greedy-{o}": (lambda o=o, **k: selection.MixtureGreedy(3, o, reference=REFERENCE, **k)) for o in ("kid", "fid")},
    "greedy-gauss": lambda **k: selection.MixtureGreedy(3, kernel=GaussianKernel(2.0), num_features=32, **k),
    "greedy-quality": lambda **k: selection.MixtureGreedy(3, quality=0.5, cost_weight=0.1, half_life=20.0, **k),
    "ucb-cab": lambda **k: selection.MixtureUCB(3, **k),
    "ucb-ogd": lambda **k: selection.MixtureUCB(3, "vendi", variant="ogd", **k),
    "fd": lambda **k: selection.FDUCB(3, REFERENCE, **k),
    "is": lambda **k: selection.ISUCB(3, **k),
    "pak": lambda **k: selection.PAKUCB(3, **k),
    "rff": lambda **k: selection.RFFUCB(3, num_features=32, **k),
    "dak": lambda **k: selection.DAKUCB(3, **k),
    "dak-mixture": lambda **k: selection.DAKUCB(3, mixture=True, **k),
    "dak-jkd": lambda **k: selection.DAKUCB(3, objective="jkd", **k),
    "promptwise": lambda **k: selection.PromptWise(3, [1.0, 2.0, 3.0], **k),
    "promptwise-kernel": lambda **k: selection.PromptWise(
        3, [1.0, 2.0, 3.0], kernel=GaussianKernel(1.0), num_features=16, **k
    ),
    "uniform": lambda **k: selection.Uniform(3, **k),
    "one": lambda **k: selection.OneArm(3, 1, **k),
    "mean": lambda **k: selection.Greedy(3, **k),
    "oracle": lambda **k: selection.Oracle(3, [0.2, 0.3, 0.5], **k),
}
every = pytest.mark.parametrize("name", MAKERS)


def event(s, arm, g):
    """What an arm yields in these tests."""
    x = torch.rand(4, generator=g).double() ** (1 + arm)
    more = {}
    if "features" in s.needs:
        more["features"] = x / x.sum() if isinstance(s, selection.ISUCB) else x
    if getattr(s, "objective", "") == "jkd":
        more["reference"] = torch.rand(4, generator=g).double()
    if "reward" in s.needs:
        more["reward"] = float(torch.rand(1, generator=g) < 0.3 + 0.2 * arm)
    if "context" in s.needs:
        more["context"] = torch.rand(2, generator=g).double()
    return more


def turn(s, g, n=1):
    """Choose and tell; returns the arms."""
    contexts = torch.rand(n, 2, generator=g).double() if "context" in s.needs else None
    arms = s.choose(n, contexts=contexts)
    for k, arm in enumerate(arms):
        if arm is not None:
            told = event(s, arm, g)
            if contexts is not None:
                told["context"] = contexts[k]
            s.tell(arm, cost=1.0 + arm, **told)
    return arms


def played(name, turns=12, seed=5, n=1):
    s, g = MAKERS[name](seed=seed), torch.Generator().manual_seed(seed)
    for _ in range(turns):
        turn(s, g, n)
    return s


@every
def test_a_loaded_state_chooses_bit_for_bit_the_same(name):
    s = played(name)
    contexts = torch.rand(2, 2, generator=torch.Generator().manual_seed(1)).double()
    s.choose(2, contexts=contexts if "context" in s.needs else None)  # pending
    other = type(s).load(json.loads(json.dumps(s.state())))
    assert json.dumps(other.state()) == json.dumps(s.state())
    for n in (1, 3, 1, 2, 5):
        g, h = torch.Generator().manual_seed(n), torch.Generator().manual_seed(n)
        assert turn(s, g, n) == turn(other, h, n)
    assert json.dumps(other.state()) == json.dumps(s.state())


@every
def test_the_same_seed_makes_the_same_choices(name):
    assert json.dumps(played(name).state()) == json.dumps(played(name).state())


@every
def test_choose_returns_an_integer_or_a_list(name):
    s = MAKERS[name]()
    one, two = ([0.1, 0.2], [[0.1, 0.2], [0.3, 0.4]]) if "context" in s.needs else (None, None)
    assert type(s.choose(contexts=one)) is int
    found = s.choose(2, contexts=two)
    assert type(found) is list
    assert len(found) == 2
    assert float(s.pending.sum()) == 3


@every
def test_refused_arguments_change_nothing(name):
    s, g = played(name), torch.Generator().manual_seed(2)
    told = event(s, 0, g)
    before = json.dumps(s.state())
    for arm in (-1, 3, 1.0, "0", True):
        with pytest.raises(ValueError, match="unknown arm"):
            s.tell(arm, **told)
    for part in s.needs:
        with pytest.raises(ValueError, match=f"needs {part}"):
            s.tell(0, **{k: v for k, v in told.items() if k != part})
    for part in {"features", "context"} & set(s.needs):
        with pytest.raises(ValueError, match="numbers"):
            s.tell(0, **{**told, part: torch.ones(9)})
        with pytest.raises(ValueError, match="NaN"):
            s.tell(0, **{**told, part: torch.full_like(told[part], math.nan)})
    if "reward" in s.needs:
        with pytest.raises(ValueError, match="reward must be finite"):
            s.tell(0, **{**told, "reward": math.nan})
    with pytest.raises(ValueError, match="at least 0"):
        s.tell(0, **told, cost=-1.0)
    with pytest.raises(ValueError, match="number of pulls"):
        s.choose(0)
    if "context" in s.needs:
        with pytest.raises(ValueError, match="chooses by context"):
            s.choose()
        with pytest.raises(ValueError, match="2 rows for 3 pulls"):
            s.choose(3, contexts=[[0.0, 1.0], [1.0, 0.0]])
    assert json.dumps(s.state()) == before


@every
def test_an_added_arm_is_pulled_as_often_as_others_at_the_start(name):
    if name == "oracle":
        return
    s, g = played(name, turns=15), torch.Generator().manual_seed(3)
    assert s.add_arm(cost=1.0) == 3
    for _ in range(15):
        turn(s, g, 2)
    if name != "one":
        assert float(s.told[3]) >= s.start
    other = type(s).load(json.loads(json.dumps(s.state())))
    assert turn(s, torch.Generator().manual_seed(1), 3) == turn(other, torch.Generator().manual_seed(1), 3)


@every
def test_merging_adds_what_was_told(name):
    a, b, both = MAKERS[name](), MAKERS[name](), MAKERS[name]()
    g = torch.Generator().manual_seed(4)
    for k in range(24):
        told = event(a, k % 3, g)
        (a if k < 12 else b).tell(k % 3, cost=2.0, **told)
        both.tell(k % 3, cost=2.0, **told)
    a.merge(b)
    if "half_life" not in a.settings() or a.half_life is None:
        equal(a.state()["arrays"], both.state()["arrays"], type(a).load)
    assert float(a.told.sum()) == 24


def equal(a, b, load):
    from kspec_guidance.utils.json_tensors import from_json

    def compare(x, y, path):
        assert type(x) is type(y)
        if isinstance(x, dict):
            for k in x:
                if k != "theta":  # the start of the next fit
                    compare(x[k], y[k], [*path, k])
        elif isinstance(x, list):
            for k, (u, v) in enumerate(zip(x, y, strict=True)):
                compare(u, v, [*path, k])
        elif isinstance(x, torch.Tensor):
            assert torch.allclose(x, y, atol=1e-9), path
        else:
            assert x == pytest.approx(y)

    compare(from_json(a), from_json(b), [])


def test_selectors_of_other_kinds_or_settings_are_not_merged():
    with pytest.raises(TypeError, match="only a MixtureGreedy"):
        selection.MixtureGreedy(2).merge(selection.MixtureUCB(2))
    with pytest.raises(ValueError, match="other settings cannot be merged: objective"):
        selection.MixtureGreedy(2).merge(selection.MixtureGreedy(2, "vendi"))
    with pytest.raises(ValueError, match="other references"):
        selection.MixtureGreedy(2, "fid", reference=REFERENCE).merge(
            selection.MixtureGreedy(2, "fid", reference=REFERENCE + 1)
        )


def test_states_of_other_classes_or_versions_are_refused():
    state = selection.MixtureGreedy(2).state()
    with pytest.raises(ValueError, match="state of a MixtureGreedy"):
        selection.MixtureUCB.load(state)
    with pytest.raises(ValueError, match="version 2"):
        selection.MixtureGreedy.load({**state, "version": 2})
    with pytest.raises(ValueError, match="no state of a selector"):
        selection.MixtureGreedy.load({})


@every
def test_a_pull_without_a_sample_counts_with_its_cost(name):
    s, g = MAKERS[name](), torch.Generator().manual_seed(0)
    s.tell(0, cost=5.0, kept=False, **({"context": [0.1, 0.2]} if "context" in s.needs else {}))
    assert float(s.told[0]) == 1
    assert float(s.kept[0]) == 0
    for _ in range(10):
        turn(s, g, 2)


def test_an_arm_that_yields_nothing_is_let_go():
    s = selection.MixtureGreedy(2, start=3)
    for _ in range(60):
        arm = s.choose()
        s.tell(arm, **({"kept": False} if arm == 0 else {"features": torch.eye(4)[int(s.kept[1]) % 4]}))
    assert float(s.told[0]) == 4 * 3
    assert float(s.weights()[0]) == 0


def test_pulls_of_a_batch_are_within_one_of_their_share():
    s = selection.Oracle(3, [0.15, 0.25, 0.6])
    for _ in range(20):
        found = s.choose(10)
        for arm, share in enumerate([0.15, 0.25, 0.6]):
            assert abs(found.count(arm) - 10 * share) < 1


@pytest.mark.parametrize("make", [lambda: selection.PAKUCB(2), lambda: selection.RFFUCB(2, num_features=64)])
def test_pending_pulls_lower_the_deviation_and_leave_the_mean(make):
    s, c = make(), [0.3, 0.7]
    for arm in (0, 1):
        s.tell(arm, reward=0.5, context=[1.0, 0.0])
    mean, deviation = s.predict(c)
    arm = s.choose(contexts=c)
    later_mean, later = s.predict(c)
    assert torch.equal(mean, later_mean)
    assert float(later[arm]) < float(deviation[arm]) - 0.1
    assert float(later[1 - arm]) == float(deviation[1 - arm])
    s.tell(arm, reward=0.5, context=c)
    assert float(s.predict(c)[1][arm]) == pytest.approx(float(later[arm]))


def test_pending_pulls_spread_a_batch_of_equal_contexts():
    s = selection.PAKUCB(3, exploration=1.0)
    assert sorted(s.choose(6, contexts=[[0.0, 1.0]] * 6)) == [0, 0, 1, 1, 2, 2]


def test_arguments_out_of_range_are_refused():
    for make, message in [
        (lambda: selection.MixtureGreedy(0), "number of arms"),
        (lambda: selection.MixtureGreedy(2, "fidd", reference=REFERENCE), "did you mean 'fid'"),
        (lambda: selection.MixtureGreedy(2, "fid"), "give reference="),
        (lambda: selection.MixtureGreedy(2, "rke", reference=REFERENCE), "uses no reference"),
        (lambda: selection.MixtureGreedy(2, costs=[1.0]), "costs has 1 numbers for 2 arms"),
        (lambda: selection.MixtureGreedy(2, quality=-1), "quality must be at least 0"),
        (lambda: selection.MixtureGreedy(2, kernel=GaussianKernel()), "bandwidth"),
        (lambda: selection.MixtureUCB(2, variant="x"), "unknown variant"),
        (lambda: selection.PAKUCB(2, kernel=GaussianKernel()), "bandwidth"),
        (lambda: selection.PromptWise(2, budget=0), "number of tries"),
        (lambda: selection.ISUCB(2, start=1), "at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    s = selection.MixtureGreedy(2, "fid", reference=REFERENCE)
    with pytest.raises(ValueError, match="the reference has 4"):
        s.tell(0, features=torch.ones(5))
    with pytest.raises(ValueError, match="probabilities"):
        selection.ISUCB(2).tell(0, features=[1.0, 1.0])
    with pytest.raises(ValueError, match="0 to 1"):
        selection.PromptWise(2).tell(0, reward=3.0, context=[1.0])
    with pytest.raises(ValueError, match="reference output"):
        selection.DAKUCB(2, objective="jkd").tell(0, features=[1.0], reward=1.0, context=[1.0])


def test_contexts_that_are_not_used_still_count_pulls():
    assert len(Uniform(3).choose(contexts=torch.zeros(4, 2))) == 4
    assert isinstance(Uniform(3).choose(contexts=torch.zeros(2)), int)
    with pytest.raises(ValueError, match="has 2 rows for 3 pulls"):
        Uniform(3).choose(3, contexts=torch.zeros(2, 2))


def test_complex_rows_are_refused():
    with pytest.raises(TypeError, match="real numbers"):
        MixtureGreedy(2).tell(0, features=torch.zeros(3, dtype=torch.complex64))


@pytest.mark.parametrize("cut", [{"arrays": {}}, {"settings": {"arms": 2, "junk": 1}}, {"widths": None}])
def test_states_that_were_cut_are_refused(cut):
    with pytest.raises(ValueError, match="altered or cut"):
        MixtureGreedy.load({**MixtureGreedy(2).state(), **cut})
