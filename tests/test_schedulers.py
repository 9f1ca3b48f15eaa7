"""Every scheduler class that diffusers exports: x0 as it sees it, and nothing changed at scale 0."""

import pytest
from tiny import scheduling


@pytest.mark.parametrize("name", scheduling.scheduler_names())
def test_x0_agrees_with_the_scheduler_and_scale_zero_changes_nothing(name):
    verdict = scheduling.check_scheduler(name)
    if verdict.evidence == "not applicable":
        assert len(verdict.reason) > 10
        return
    assert verdict.predictions
    assert verdict.error < 1e-4, verdict
    assert verdict.identical
