import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler

from kspec_guidance.loop.prediction import (
    UNGUIDABLE,
    UnsupportedSchedulerError,
    parametrisation_of,
    predict,
    supported_schedulers,
)
from tests import schedulers
from tests.tiny import scheduler_checks

# their step returns no x0; check_scheduler compares with what they compute inside
WITHOUT_X0 = {"DEIS", "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE", "LCM", "PNDM", "TCD", "UniPC"}


def model_output(kind, x0, noise, alpha, sigma):
    if kind == "v_prediction":  # the Euler family divides its sample by sqrt(sigma^2 + 1)
        scale = (alpha**2 + sigma**2) ** 0.5
        return (alpha * noise - sigma * x0) / scale
    return {"epsilon": noise, "sample": x0}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_x0_is_recovered_and_matches_scheduler(name, kind, g):
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
        prediction = predict(scheduler, m, t, x)
        torch.testing.assert_close(prediction.x0, x0, atol=2e-3, rtol=0)
        if sigma > 0.1:  # of a little noise, nothing but rounding is left in x - alpha x0
            cosine = torch.cosine_similarity(prediction.noise_direction.flatten(1), noise.flatten(1)).abs()
            torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-4, rtol=0)
        move = torch.randn(x0.shape, generator=g)
        repeated = predict(scheduler, prediction.moved(m, move), t, x)
        torch.testing.assert_close(repeated.x0, prediction.x0 + move, atol=2e-3, rtol=0)
        kwargs = {"generator": g} if "generator" in scheduler.step.__code__.co_varnames else {}
        result = scheduler.step(m, t, x, **kwargs)
        own = getattr(result, "pred_original_sample", None)
        assert (own is None) == (name in WITHOUT_X0), name
        if own is not None:
            torch.testing.assert_close(prediction.x0, own, atol=2e-3, rtol=0)


@pytest.mark.parametrize("steps", [2, 30])
@pytest.mark.parametrize("name", ["Heun", "KDPM2", "KDPM2 ancestral", *schedulers.FLOW])
def test_a_move_has_the_effect_of_one_euler_step_whatever_the_stages(name, steps, g):
    """``x' = x + (sigma' - sigma) (x - x0) / sigma``, so a move of x0 moves the result by ``1 - sigma' / sigma`` of it."""
    x, m, move = torch.randn(3, 2, 3, 4, 4, generator=g).double()  # results of two steps are large, rounding with them
    results = []
    for share in (0, 1):
        scheduler = schedulers.make(name) if name in schedulers.SETTINGS else getattr(diffusers, name)()
        scheduler.set_timesteps(steps)
        stages = 1 if name.endswith("EulerDiscreteScheduler") else 2
        now, result, noise = 0.0, x, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps[:stages]:
            prediction = predict(scheduler, m, t, result)
            now = now or prediction.sigma
            given = {"generator": noise} if "generator" in scheduler.step.__code__.co_varnames else {}
            result = scheduler.step(prediction.moved(m, share * prediction.share * move), t, result, **given)[0]
        results.append(result)
    after = float(scheduler.sigmas_down[0] if "ancestral" in name else scheduler.sigmas[stages])
    torch.testing.assert_close(results[1] - results[0], (1 - after / now) * move, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cls", schedulers.FLOW)
def test_flow_matching_x0_is_recovered(cls, g):
    scheduler = getattr(diffusers, cls)()
    scheduler.set_timesteps(6)
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=g)
    for t in scheduler.timesteps:
        _, sigma = parametrisation_of(scheduler).levels(scheduler, t, {})
        x = (1 - sigma) * x0 + sigma * noise
        prediction = predict(scheduler, noise - x0, t, x)
        torch.testing.assert_close(prediction.x0, x0, atol=1e-4, rtol=0)
        torch.testing.assert_close(prediction.score, sigma * noise, atol=1e-4, rtol=0)
        scheduler.step(noise - x0, t, x)


def test_learned_variance_is_unchanged(g):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(4)
    x, m = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 6, 4, 4, generator=g)
    prediction = predict(scheduler, m, scheduler.timesteps[0], x)
    moved = prediction.moved(m, torch.ones_like(x))
    assert torch.equal(moved[:, 3:], m[:, 3:])
    assert not torch.equal(moved[:, :3], m[:, :3])


def test_unsupported_scheduler_raises():
    class CustomScheduler:
        pass

    with pytest.raises(UnsupportedSchedulerError, match=r"CustomScheduler is not supported; use one of .*DDIMScheduler"):
        predict(CustomScheduler(), torch.ones(1, 1), 0, torch.ones(1, 1))
    with pytest.raises(
        UnsupportedSchedulerError, match="DDIMInverseScheduler cannot be guided: it runs from images to noise"
    ):
        predict(DDIMInverseScheduler(), torch.ones(1, 1), 0, torch.ones(1, 1))
    assert len(supported_schedulers()) >= 35


@pytest.mark.parametrize("name", scheduler_checks.scheduler_names())
def test_scheduler_x0_matches_and_scale_zero_is_identical(name):
    verdict = scheduler_checks.check_scheduler(name)
    if verdict.evidence == "not applicable":
        assert name in UNGUIDABLE
        assert verdict.reason == UNGUIDABLE[name]
        return
    assert verdict.predictions
    assert verdict.error < 1e-4, verdict
    assert verdict.identical
