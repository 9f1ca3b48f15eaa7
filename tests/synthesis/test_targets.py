import pytest
import torch

from kspec_guidance.synthesis import SynthesisError, Target
from kspec_guidance.synthesis.records import Store
from tests.synthesis.small_runs import make


def test_a_target_stops_a_prompt_early_and_says_why(tmp_path, pipe):
    result = make(tmp_path / "a", pipe, ["heart", "cat face"], images=40, batch=4, target="vendi>=3")
    assert result.stopped == {"target reached": 2}
    assert result.images < 40
    from kspec_guidance.synthesis.worker import back

    rows = [r for r in Store(tmp_path / "a").records(tensors=True) if r.rows[0]["prompt"] == "heart"]
    features = torch.cat([back(r.tensors)[2] for r in rows])
    target = Target.parse("vendi>=3")
    assert target.reached(features, 4) == "target reached"
    assert target.reached(features[:-4], 4) is None
    again = make(tmp_path / "a", pipe, ["heart", "cat face"], images=40, batch=4, target="vendi>=3")
    assert (again.made, again.stopped) == (0, {"target reached": 2})
    high = make(tmp_path / "b", pipe, ["heart"], images=12, batch=4, target="vendi>=12")
    assert sum(high.stopped.values()) == 1
    assert "target reached" not in high.stopped


def test_returns_that_diminish_stop_too(g):
    target = Target("vendi", 10.0, gain=0.05)
    few = torch.randn(3, 8, generator=g)
    x = few[torch.arange(40) % 3] + 1e-3 * torch.randn(40, 8, generator=g)
    assert target.reached(x, 8) == "more images add little"
    assert target.reached(torch.randn(40, 400, generator=g), 8) == "target reached"
    assert target.reached(x[:7], 4) is None


@pytest.mark.parametrize("text", ["vendi", "vendi>12", "fid>=3", "vendi>=0.5", "vendi>=1.2.3", "vendi>=", ""])
def test_targets_that_mean_nothing_are_refused(text):
    with pytest.raises(SynthesisError):
        Target.parse(text)
