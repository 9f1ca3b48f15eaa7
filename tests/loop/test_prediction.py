import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler

from kspec_guidance.loop.prediction import UnsupportedSchedulerError, parametrisation_of, predict, supported_schedulers
from tests import schedulers
from tests.tiny import scheduling


def model_output(kind, x0, noise, alpha, sigma):
    if kind == "v_prediction":  # the Euler family sees its sample divided by sqrt(sigma^2 + 1)
        scale = (alpha**2 + sigma**2) ** 0.5
        return (alpha * noise - sigma * x0) / scale
    return {"epsilon": noise, "sample": x0}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_x0_is_recovered_at_every_step_and_agrees_with_the_scheduler(name, kind, g):
    scheduler = schedulers.make(name, kind)
    scheduler.set_timesteps(8)
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=g)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        alpha, sigma = parametrisation_of(scheduler).levels(scheduler, t, {})
        if sigma == 0:
            continue
        x = alpha * x0 + sigma * noise
        m = model_output(kind, x0, noise, alpha, sigma)
        seen = predict(scheduler, m, t, x)
        torch.testing.assert_close(seen.x0, x0, atol=2e-3, rtol=0)
        move = torch.randn(x0.shape, generator=g)
        again = predict(scheduler, seen.moved(m, move), t, x)
        torch.testing.assert_close(again.x0, seen.x0 + move, atol=2e-3, rtol=0)
        step = {"generator": g} if "generator" in scheduler.step.__code__.co_varnames else {}
        result = scheduler.step(m, t, x, **step)
        own = getattr(result, "pred_original_sample", None)
        if own is not None and not name.startswith(("LCM", "TCD")):
            torch.testing.assert_close(seen.x0, own, atol=2e-3, rtol=0)


@pytest.mark.parametrize("cls", schedulers.FLOW)
def test_flow_matching_x0(cls, g):
    scheduler = getattr(diffusers, cls)()
    scheduler.set_timesteps(6)
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=g)
    for t in scheduler.timesteps:
        _, sigma = parametrisation_of(scheduler).levels(scheduler, t, {})
        x = (1 - sigma) * x0 + sigma * noise
        seen = predict(scheduler, noise - x0, t, x)
        torch.testing.assert_close(seen.x0, x0, atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.score, sigma * noise, atol=1e-4, rtol=0)
        scheduler.step(noise - x0, t, x)


def test_a_learned_variance_stays_as_it_is(g):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(4)
    x, m = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 6, 4, 4, generator=g)
    seen = predict(scheduler, m, scheduler.timesteps[0], x)
    moved = seen.moved(m, torch.ones_like(x))
    assert torch.equal(moved[:, 3:], m[:, 3:])
    assert not torch.equal(moved[:, :3], m[:, :3])


def test_an_unknown_scheduler_is_named_with_the_known_ones():
    class Mine:
        pass

    with pytest.raises(UnsupportedSchedulerError, match=r"Mine is not supported; use one of .*DDIMScheduler"):
        predict(Mine(), torch.ones(1, 1), 0, torch.ones(1, 1))
    with pytest.raises(
        UnsupportedSchedulerError, match="DDIMInverseScheduler cannot be guided: it runs from images to noise"
    ):
        predict(DDIMInverseScheduler(), torch.ones(1, 1), 0, torch.ones(1, 1))
    assert len(supported_schedulers()) >= 35


@pytest.mark.parametrize("name", scheduling.scheduler_names())
def test_x0_agrees_with_the_scheduler_and_scale_zero_changes_nothing(name):
    verdict = scheduling.check_scheduler(name)
    if verdict.evidence == "not applicable":
        assert len(verdict.reason) > 10
        return
    assert verdict.predictions
    assert verdict.error < 1e-4, verdict
    assert verdict.identical
