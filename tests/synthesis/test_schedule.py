import pytest
import torch

from kspec_guidance.synthesis import Prompt, SynthesisError, Target
from kspec_guidance.synthesis.records import unpack_tensors
from kspec_guidance.synthesis.schedule import goals, image_seed
from kspec_guidance.synthesis.store import Store
from tests.synthesis.small_runs import make


def test_goals_and_seeds():
    prompts = [Prompt("a", "x"), Prompt("b", "x"), Prompt("c", "y", images=7), Prompt("d", times=3)]
    assert goals(prompts, 4, {}) == [4, 4, 7, 12]
    assert goals(prompts, 4, {"x": 9}) == [5, 4, 7, 12]
    with pytest.raises(SynthesisError, match="no prompt has group z; groups are x, y"):
        goals(prompts, 4, {"z": 1})
    assert len({image_seed(s, p, k) for s in range(3) for p in "abc" for k in range(50)}) == 450
    assert image_seed(0, "heart", 0) == 244453267764549  # seeds must stay: they decide images


def test_a_target_stops_a_prompt_early_and_gives_the_reason(tmp_path, pipe):
    settings = {"prompts": ["heart", "cat face"], "images_per_prompt": 40, "batch_size": 4, "target": "vendi>=3"}
    result = make(tmp_path / "a", pipe, **settings)
    assert result.stopped == {"target reached": 2}
    assert result.images < 40
    records = [r for r in Store(tmp_path / "a").records(tensors=True) if r.rows[0]["prompt"] == "heart"]
    features = torch.cat([unpack_tensors(r.tensors).features for r in records])
    target = Target.parse("vendi>=3")
    assert target.reached(features, 4) == "target reached"
    assert target.reached(features[:-4], 4) is None
    again = make(tmp_path / "a", pipe, **settings)
    assert (again.made, again.stopped) == (0, {"target reached": 2})
    high = make(tmp_path / "b", pipe, ["heart"], images_per_prompt=12, batch_size=4, target="vendi>=12")
    assert sum(high.stopped.values()) == 1
    assert "target reached" not in high.stopped


def test_small_gains_stop_a_prompt(g):
    target = Target("vendi", 10.0, gain=0.05)
    modes = torch.randn(3, 8, generator=g)
    x = modes[torch.arange(40) % 3] + 1e-3 * torch.randn(40, 8, generator=g)
    assert target.reached(x, 8) == "more images add little"
    assert target.reached(torch.randn(40, 400, generator=g), 8) == "target reached"
    assert target.reached(x[:7], 4) is None


@pytest.mark.parametrize("text", ["vendi", "vendi>12", "fid>=3", "vendi>=0.5", "vendi>=1.2.3", "vendi>=", ""])
def test_invalid_targets_are_refused(text):
    with pytest.raises(SynthesisError):
        Target.parse(text)
