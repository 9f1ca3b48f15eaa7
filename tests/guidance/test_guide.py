"""Guidance on the analytic mixture, whose modes and likelihood are known."""

import threading

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MemoryBank, MMDGuidance, NoveltyGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.objectives import RKE
from tests import schedulers
from tests.mixture import ExactMixture, run

MODEL = ExactMixture()


def ddim():
    return schedulers.make("DDIM")


def sample(guide, scheduler=None, n=16, steps=30, seed=0):
    scheduler = scheduler or ddim()
    with guide.attach(scheduler):
        return run(MODEL, scheduler, n, steps, seed)


def found(make_guide, seeds=6):
    """Mean number of modes found by 16 samples, and the share of samples that lie in a mode."""
    modes, valid = 0.0, 0.0
    for seed in range(seeds):
        guide = make_guide()
        x = run(MODEL, ddim(), 16, 50, seed) if guide is None else sample(guide, steps=50, seed=seed)
        k, ok = MODEL.modes(x)
        modes, valid = modes + len(set(k[ok].tolist())) / seeds, valid + ok.float().mean().item() / seeds
    return modes, valid


def test_sparke_finds_more_modes_and_stays_on_the_data():
    plain, guided = found(lambda: None), found(lambda: SPARKE(3.0))
    assert plain[1] > 0.99
    assert guided[1] > 0.98
    assert guided[0] > plain[0] + 1


def test_the_published_step_on_x0_destroys_samples_that_the_default_keeps():
    published = found(lambda: SPARKE(0.3, GaussianKernel(0.7), transforms=("rescale",), stop=1.0), seeds=2)
    assert published[1] < 0.2
    assert found(lambda: SPARKE(0.3), seeds=2)[1] > 0.99


def test_mmd_guidance_reaches_the_reversed_weights():
    target = MODEL.weights.flip(0)

    def distance(guide):
        shares = torch.zeros(16)
        for seed in range(4):
            x = sample(guide, steps=50, seed=seed) if guide else run(MODEL, ddim(), 16, 50, seed)
            k, ok = MODEL.modes(x)
            shares += torch.bincount(k[ok], minlength=16) / 64
            if guide:
                assert ok.float().mean() > 0.9
        return (shares - target).abs().sum() / 2

    g = torch.Generator().manual_seed(0)
    reference = MODEL.sample(64, g, target).view(64, 1, 1, -1)
    guide = MMDGuidance(reference, 3.0)
    assert distance(guide) < distance(None) - 0.25
    assert len(guide.memory) == 64


def test_novelty_avoids_the_reference_mode():
    reference = MODEL.centres[:1].view(1, 1, 1, -1)
    share = lambda x: (MODEL.modes(x)[0] == 0).float().mean()  # noqa: E731
    plain, guided = run(MODEL, ddim(), 32, 50, 0), sample(NoveltyGuidance(reference, 3.0), n=32, steps=50)
    assert share(guided) < share(plain)


def test_the_memory_keeps_later_batches_away_from_earlier_ones():
    def modes(shared):
        seen, bank = set(), MemoryBank()
        for seed in range(8):
            x = sample(SPARKE(3.0, memory=bank if shared else None), n=2, steps=50, seed=seed)
            seen |= set(MODEL.modes(x)[0].tolist())
        return len(seen)

    assert modes(True) > modes(False)


@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_scale_zero_is_bit_identical_and_fills_the_memory_once_per_sample(name):
    plain = run(MODEL, schedulers.make(name), 3, 8, 0)
    guide = SPARKE(0.0)
    assert torch.equal(sample(guide, schedulers.make(name), 3, 8), plain)
    assert len(guide.memory) == 3
    assert torch.equal(guide.memory.x, plain)


@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_every_scheduler_is_guided_and_released(name):
    scheduler = schedulers.make(name)
    guide = SPARKE(1.0)
    x = sample(guide, scheduler, 8, 12)
    assert torch.isfinite(x).all()
    assert not torch.equal(x, run(MODEL, schedulers.make(name), 8, 12, 0))
    assert guide.report().steps_guided > 0
    assert "step" not in vars(scheduler)
    assert len(guide.memory) == 8


@pytest.mark.parametrize("cls", schedulers.FLOW)
def test_flow_matching_is_guided(cls):
    plain = run(MODEL, getattr(diffusers, cls)(), 16, 20, 0)
    assert torch.equal(sample(SPARKE(0.0), getattr(diffusers, cls)(), steps=20), plain)
    x = sample(SPARKE(1.0), getattr(diffusers, cls)(), steps=20)
    k, ok = MODEL.modes(x)
    assert ok.float().mean() > 0.9
    assert len(set(k[ok].tolist())) >= len(set(MODEL.modes(plain)[0].tolist()))


def test_same_seeds_same_images_and_no_global_state():
    before, mode = torch.get_rng_state(), torch.is_grad_enabled()
    a, b = sample(SPARKE(1.0)), sample(SPARKE(1.0))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled() is mode


def test_random_features_and_the_exact_sum_guide_alike():
    kernel = GaussianKernel(1.5)
    phi = RandomFourierFeatures(kernel, MODEL.dim, 8192)
    exact = KernelGuidance(RKE(kernel), 1.0, stop=0.6)
    coarse = KernelGuidance(RKE(kernel, phi), 1.0, stop=0.6)
    a, b = sample(exact), sample(coarse)
    assert (a - b).norm() < 0.5 * (a - run(MODEL, ddim(), 16, 30, 0)).norm()
    assert coarse.memory.total.numel() == 8192


def test_start_stop_every_and_the_sigma_interval_choose_the_steps():
    def steps(**settings):
        guide = SPARKE(1.0, **settings)
        sample(guide, n=4, steps=20)
        return [s.step for s in guide.report().steps]

    assert steps() == list(range(13))
    assert steps(start=0.2, stop=0.5) == list(range(4, 10))
    assert steps(start=0.2, stop=1.0, every=5) == [4, 9, 14, 19]
    chosen = SPARKE(1.0, stop=1.0, sigma_interval=(0.5, 5.0))
    sample(chosen, n=4, steps=20)
    assert all(0.5 <= s.noise_to_signal <= 5 for s in chosen.report().steps)
    assert 0 < chosen.report().steps_guided < 20


def test_a_sum_of_guides_shares_one_memory_and_applies_both():
    reference = MODEL.centres.view(16, 1, 1, -1)
    both = SPARKE(1.0) + MMDGuidance(reference, 0.5)
    x = sample(both)
    assert len(both.memories) == 1
    assert len(both.memory) == 16
    assert not torch.equal(x, sample(SPARKE(1.0)))


def test_latents_can_be_moved_as_published():
    x = sample(SPARKE.published(0.1))
    assert torch.isfinite(x).all()
    assert not torch.equal(x, run(MODEL, ddim(), 16, 30, 0))
    reference = MODEL.centres.view(16, 1, 1, -1)
    assert torch.isfinite(sample(MMDGuidance.published(reference))).all()


def test_the_report_says_what_was_done():
    guide = SPARKE(0.3)
    sample(guide)
    report = guide.report()
    assert (report.steps_guided, report.total_steps) == (20, 30)
    assert 0 < report.mean_relative_move <= 0.3
    assert report.after["vendi"] > report.before["vendi"]
    assert report.after["conditional_rke"] > report.before["conditional_rke"]
    assert set(report.as_dict()["final"]) == {"vendi", "conditional_rke"}
    assert "guided 20 of 30 steps" in str(report)
    idle = SPARKE(0.0)
    sample(idle)
    assert "no step of 30 was guided" in str(idle.report())


def test_gradient_is_the_ascent_direction_in_the_samples_shape(g):
    guide = SPARKE()
    x, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 5, generator=g)
    assert guide.gradient(x, t).shape == x.shape
    guide.memory.add(x, t)
    moved = guide.gradient(x[:1], t[:1])  # an exact duplicate of a memory entry
    assert moved.norm() > 0
    assert torch.equal(moved, guide.gradient(x[:1], t[:1]))
    assert guide.gradient(x[:1].half(), t[:1]).dtype == torch.float16


# -- nothing is left behind --------------------------------------------------------------------------------------------


def test_an_exception_leaves_the_scheduler_untouched_and_the_memory_empty():
    scheduler, guide = ddim(), SPARKE(1.0)
    plain = run(MODEL, ddim(), 4, 10, 0)

    class Breaks(ExactMixture):
        calls = 0

        def x0(self, x, alpha, sigma):
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().x0(x, alpha, sigma)

    with pytest.raises(KeyboardInterrupt), guide.attach(scheduler):
        run(Breaks(), scheduler, 4, 10, 0)
    assert "step" not in vars(scheduler)
    assert len(guide.memory) == 0
    assert torch.equal(run(MODEL, scheduler, 4, 10, 0), plain)
    sample(guide, scheduler, 4, 10)
    assert len(guide.memory) == 4


def test_attaching_twice_is_harmless_and_detach_undoes():
    scheduler, guide = ddim(), SPARKE(1.0)
    guide.attach(scheduler)
    with guide.attach(scheduler):
        assert "step" in vars(scheduler)
    assert "step" not in vars(scheduler)
    guide.attach(scheduler)
    guide.detach()
    guide.detach()
    assert "step" not in vars(scheduler)


def test_a_step_replaced_by_someone_else_is_put_back():
    scheduler = ddim()
    own = scheduler.step
    scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    theirs = scheduler.step
    with SPARKE(1.0).attach(scheduler):
        assert scheduler.step is not theirs
    assert scheduler.step is theirs


def test_two_guides_on_one_scheduler_are_refused_with_the_cure():
    scheduler, first = ddim(), SPARKE(1.0)
    with first.attach(scheduler):
        with pytest.raises(ValueError, match=r"combine the two with `guide \+ other`"):
            SPARKE(1.0).attach(scheduler)
        assert "step" in vars(scheduler)
    assert "step" not in vars(scheduler)


def test_two_threads_on_one_guide_are_refused():
    scheduler, guide, errors = ddim(), SPARKE(1.0), []
    with guide.attach(scheduler):
        scheduler.set_timesteps(10)
        x = torch.randn(2, 1, 1, 32)
        x = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[0]

        def other():
            try:
                scheduler.step(x, scheduler.timesteps[1], x)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "give each thread its own pipeline" in errors[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_step(bad):
    class Overflows(ExactMixture):
        calls = 0

        def x0(self, x, alpha, sigma):
            self.calls += 1
            return super().x0(x, alpha, sigma) + (bad if self.calls == 4 else 0)

    scheduler, guide = ddim(), SPARKE(1.0)
    with pytest.raises(ValueError, match="at step 4 of 10"), guide.attach(scheduler):
        run(Overflows(), scheduler, 4, 10, 0)
    assert len(guide.memory) == 0


def test_a_batch_of_one_with_an_empty_memory_works():
    guide = SPARKE(1.0)
    x = sample(guide, n=1)
    assert torch.equal(x, run(MODEL, ddim(), 1, 30, 0))  # nothing to be different from yet
    assert not torch.equal(sample(guide, n=1), x)  # now there is


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": -0.1}, "use MMDGuidance"),
        ({"scale": float("inf")}, "finite number"),
        ({"start": 0.6, "stop": 0.4}, "start <= stop"),
        ({"stop": 1.5}, "fractions of the run"),
        ({"space": "pixel"}, "unknown space 'pixel'; choose one of x0, latents"),
        ({"every": 0}, "at least 1"),
        ({"transforms": ("sideways",)}, "unknown transforms"),
        ({"sigma_interval": (3.0, 1.0)}, "low <= high"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, words):
    with pytest.raises(ValueError, match=words):
        SPARKE(**settings)


@pytest.mark.parametrize(
    ("x", "t", "words"),
    [
        (torch.zeros(4), None, r"tensor \[n, ...\]"),
        (torch.full((2, 4), float("nan")), None, "NaN"),
        (torch.zeros(2, 9), None, r"features of shape \(4,\), got \(9,\)"),
        (torch.randn(3, 4), torch.ones(2, 3), "3 samples cannot be shared out over 2 prompts"),
        (torch.randn(2, 4), torch.ones(2, 5), "width 5"),
    ],
)
def test_gradient_refuses_what_does_not_fit(x, t, words):
    guide = SPARKE()
    guide.memory.add(torch.ones(1, 4), torch.ones(1, 3))
    with pytest.raises(ValueError, match=words):
        guide.gradient(x, t)


def test_a_memory_of_another_model_is_refused_before_anything_is_changed():
    bank = MemoryBank()
    bank.add(torch.ones(2, 3, 8, 8))
    scheduler = ddim()
    with pytest.raises(ValueError, match=r"features of shape \(3, 8, 8\), this pipeline makes \(1, 1, 32\)"):
        sample(SPARKE(1.0, memory=bank), scheduler)
    assert len(bank) == 2
    assert "step" not in vars(scheduler)
