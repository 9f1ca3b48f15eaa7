import pytest

from kspec_guidance.synthesis import Prompt, SynthesisError
from kspec_guidance.synthesis.jobs import goals, image_seed


def test_goals_and_seeds():
    prompts = [Prompt("a", "x"), Prompt("b", "x"), Prompt("c", "y", images=7), Prompt("d", times=3)]
    assert goals(prompts, 4, {}) == [4, 4, 7, 12]
    assert goals(prompts, 4, {"x": 9}) == [5, 4, 7, 12]
    with pytest.raises(SynthesisError, match="no prompt has group z; groups are x, y"):
        goals(prompts, 4, {"z": 1})
    assert len({image_seed(s, p, k) for s in range(3) for p in "abc" for k in range(50)}) == 450
