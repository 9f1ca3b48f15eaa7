"""Guidance on a Gaussian mixture, whose modes are known."""

import threading

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MemoryBank, MMDGuidance, NoveltyGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.objectives import RKE
from tests import schedulers
from tests.mixture import GaussianMixture, denoise

MODEL = GaussianMixture()


def ddim():
    return schedulers.make("DDIM")


def sample(guide, scheduler=None, n=16, steps=30, seed=0):
    scheduler = scheduler or ddim()
    with guide.attach(scheduler):
        return denoise(MODEL, scheduler, n, steps, seed)


def mode_coverage(make_guide, seeds=6):
    """Mean number of modes covered by 16 samples, and the share of samples within a mode."""
    modes, valid = 0.0, 0.0
    for seed in range(seeds):
        guide = make_guide()
        x = denoise(MODEL, ddim(), 16, 50, seed) if guide is None else sample(guide, steps=50, seed=seed)
        k, ok = MODEL.modes(x)
        modes, valid = modes + len(set(k[ok].tolist())) / seeds, valid + ok.float().mean().item() / seeds
    return modes, valid


def test_sparke_increases_mode_coverage_and_keeps_samples_valid():
    plain, guided = mode_coverage(lambda: None), mode_coverage(lambda: SPARKE(3.0))
    assert plain[1] > 0.99
    assert guided[1] > 0.98
    assert guided[0] > plain[0] + 1


def test_default_keeps_samples_valid_unlike_published_step_on_x0():
    published = mode_coverage(lambda: SPARKE(0.3, GaussianKernel(0.7), transforms=("rescale",), stop=1.0), seeds=2)
    assert published[1] < 0.2
    assert mode_coverage(lambda: SPARKE(0.3), seeds=2)[1] > 0.99


def test_mmd_guidance_moves_mode_shares_toward_reference():
    target = MODEL.weights.flip(0)

    def distance(guide):
        shares = torch.zeros(16)
        for seed in range(4):
            x = sample(guide, steps=50, seed=seed) if guide else denoise(MODEL, ddim(), 16, 50, seed)
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


def test_novelty_reduces_share_of_reference_mode():
    reference = MODEL.centres[:1].view(1, 1, 1, -1)
    share = lambda x: (MODEL.modes(x)[0] == 0).float().mean()  # noqa: E731
    plain = sum(share(denoise(MODEL, ddim(), 32, 50, seed)) for seed in range(4)) / 4
    guided = sum(share(sample(NoveltyGuidance(reference, 3.0), n=32, steps=50, seed=seed)) for seed in range(4)) / 4
    assert plain > 0.15
    assert guided < plain / 3


def test_shared_memory_increases_modes_across_batches():
    def count_modes(shared, first_seed):
        modes, bank = set(), MemoryBank()
        for seed in range(first_seed, first_seed + 8):
            x = sample(SPARKE(3.0, memory=bank if shared else None), n=2, steps=50, seed=seed)
            modes |= set(MODEL.modes(x)[0].tolist())
        return len(modes)

    gains = [count_modes(True, seed) - count_modes(False, seed) for seed in (0, 100, 200)]
    assert sum(gains) >= 6


@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_scale_zero_is_bit_identical_and_fills_memory(name):
    plain = denoise(MODEL, schedulers.make(name), 3, 8, 0)
    guide = SPARKE(0.0)
    assert torch.equal(sample(guide, schedulers.make(name), 3, 8), plain)
    assert len(guide.memory) == 3
    assert torch.equal(guide.memory.x, plain)


@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_scheduler_is_guided_and_restored(name):
    scheduler = schedulers.make(name)
    guide = SPARKE(1.0)
    x = sample(guide, scheduler, 8, 12)
    assert torch.isfinite(x).all()
    assert not torch.equal(x, denoise(MODEL, schedulers.make(name), 8, 12, 0))
    assert guide.report().steps_guided > 0
    assert "step" not in vars(scheduler)
    assert len(guide.memory) == 8


@pytest.mark.parametrize("cls", schedulers.FLOW)
def test_flow_matching_scheduler_is_guided(cls):
    def valid_modes(x):
        k, ok = MODEL.modes(x)
        assert ok.float().mean() > 0.9
        return len(set(k[ok].tolist()))

    plain_modes = guided_modes = 0
    for seed in (1, 2, 3):  # the noise of seed 0 coincides with the centres of the modes
        plain = denoise(MODEL, getattr(diffusers, cls)(), 16, 20, seed)
        assert torch.equal(sample(SPARKE(0.0), getattr(diffusers, cls)(), steps=20, seed=seed), plain)
        guided = sample(SPARKE(3.0), getattr(diffusers, cls)(), steps=20, seed=seed)
        assert not torch.equal(guided, plain)
        plain_modes, guided_modes = plain_modes + valid_modes(plain), guided_modes + valid_modes(guided)
    assert guided_modes >= plain_modes + 3


def test_guidance_is_deterministic_and_keeps_global_state():
    before, mode = torch.get_rng_state(), torch.is_grad_enabled()
    a, b = sample(SPARKE(1.0)), sample(SPARKE(1.0))
    assert torch.equal(a, b)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled() is mode


def test_random_feature_guidance_approximates_exact():
    kernel = GaussianKernel(1.5)
    phi = RandomFourierFeatures(kernel, MODEL.dim, 8192)
    exact = KernelGuidance(RKE(kernel), 1.0, stop=0.6)
    coarse = KernelGuidance(RKE(kernel, phi), 1.0, stop=0.6)
    a, b = sample(exact), sample(coarse)
    assert (a - b).norm() < 0.5 * (a - denoise(MODEL, ddim(), 16, 30, 0)).norm()
    assert coarse.memory.total.numel() == 8192


def test_start_stop_every_and_sigma_interval_select_steps():
    def steps(**settings):
        guide = SPARKE(1.0, **settings)
        sample(guide, n=4, steps=20)
        return [s.step for s in guide.report().steps]

    assert steps() == list(range(13))
    assert steps(start=0.2, stop=0.5) == list(range(4, 10))
    assert steps(start=0.2, stop=1.0, every=5) == [4, 9, 14, 19]
    guide = SPARKE(1.0, stop=1.0, sigma_interval=(0.5, 5.0))
    sample(guide, n=4, steps=20)
    assert all(0.5 <= s.noise_to_signal <= 5 for s in guide.report().steps)
    assert 0 < guide.report().steps_guided < 20


def test_combined_guides_share_memory():
    reference = MODEL.centres.view(16, 1, 1, -1)
    combined = SPARKE(1.0) + MMDGuidance(reference, 0.5)
    x = sample(combined)
    assert len(combined.memories) == 1
    assert len(combined.memory) == 16
    assert not torch.equal(x, sample(SPARKE(1.0)))


def test_published_guides_change_samples():
    x = sample(SPARKE.published(0.1))
    assert torch.isfinite(x).all()
    assert not torch.equal(x, denoise(MODEL, ddim(), 16, 30, 0))
    reference = MODEL.centres.view(16, 1, 1, -1)
    assert torch.isfinite(sample(MMDGuidance.published(reference))).all()


def test_gradient_has_sample_shape_and_dtype(g):
    guide = SPARKE()
    x, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 5, generator=g)
    assert guide.gradient(x, t).shape == x.shape
    guide.memory.add(x, t)
    moved = guide.gradient(x[:1], t[:1])  # an exact duplicate of a memory row
    assert moved.norm() > 0
    assert torch.equal(moved, guide.gradient(x[:1], t[:1]))
    assert guide.gradient(x[:1].half(), t[:1]).dtype == torch.float16


# -- attaching and errors ---------------------------------------------------------------------------------------------


def test_exception_restores_scheduler_and_keeps_memory_empty():
    scheduler, guide = ddim(), SPARKE(1.0)
    plain = denoise(MODEL, ddim(), 4, 10, 0)

    class InterruptedMixture(GaussianMixture):
        calls = 0

        def x0(self, x, alpha, sigma):
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().x0(x, alpha, sigma)

    with pytest.raises(KeyboardInterrupt), guide.attach(scheduler):
        denoise(InterruptedMixture(), scheduler, 4, 10, 0)
    assert "step" not in vars(scheduler)
    assert len(guide.memory) == 0
    assert torch.equal(denoise(MODEL, scheduler, 4, 10, 0), plain)
    sample(guide, scheduler, 4, 10)
    assert len(guide.memory) == 4


def test_attach_and_detach_are_idempotent():
    scheduler, guide = ddim(), SPARKE(1.0)
    guide.attach(scheduler)
    with guide.attach(scheduler):
        assert "step" in vars(scheduler)
    assert "step" not in vars(scheduler)
    guide.attach(scheduler)
    guide.detach()
    guide.detach()
    assert "step" not in vars(scheduler)


def test_detach_restores_replaced_step():
    scheduler = ddim()
    original = scheduler.step
    scheduler.step = lambda *args, **kwargs: original(*args, **kwargs)
    wrapper = scheduler.step
    with SPARKE(1.0).attach(scheduler):
        assert scheduler.step is not wrapper
    assert scheduler.step is wrapper


def test_second_guide_on_scheduler_raises():
    scheduler, first = ddim(), SPARKE(1.0)
    with first.attach(scheduler):
        with pytest.raises(ValueError, match=r"combine the two with `guide \+ other`"):
            SPARKE(1.0).attach(scheduler)
        assert "step" in vars(scheduler)
    assert "step" not in vars(scheduler)


def test_concurrent_use_of_one_guide_raises():
    scheduler, guide, errors = ddim(), SPARKE(1.0), []
    with guide.attach(scheduler):
        scheduler.set_timesteps(10)
        x = torch.randn(2, 1, 1, 32)
        x = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[0]

        def step_again():
            try:
                scheduler.step(x, scheduler.timesteps[1], x)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=step_again)
        thread.start()
        thread.join()
    assert "give each thread its own pipeline" in errors[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_prediction_raises_with_step(value):
    class NonFiniteMixture(GaussianMixture):
        calls = 0

        def x0(self, x, alpha, sigma):
            self.calls += 1
            return super().x0(x, alpha, sigma) + (value if self.calls == 4 else 0)

    scheduler, guide = ddim(), SPARKE(1.0)
    with pytest.raises(ValueError, match="at step 4 of 10"), guide.attach(scheduler):
        denoise(NonFiniteMixture(), scheduler, 4, 10, 0)
    assert len(guide.memory) == 0


def test_single_sample_is_unchanged_only_with_empty_memory():
    guide = SPARKE(1.0)
    x = sample(guide, n=1)
    assert torch.equal(x, denoise(MODEL, ddim(), 1, 30, 0))  # there is no other sample
    assert not torch.equal(sample(guide, n=1), x)  # the memory holds one now


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -0.1}, "use MMDGuidance"),
        ({"scale": float("inf")}, "finite number"),
        ({"start": 0.6, "stop": 0.4}, "start <= stop"),
        ({"stop": 1.5}, "fractions of the run"),
        ({"space": "pixel"}, "unknown space 'pixel'; choose one of x0, latents"),
        ({"every": 0}, r"every must be .*, got 0"),
        ({"transforms": ("sideways",)}, "unknown transforms"),
        ({"sigma_interval": (3.0, 1.0)}, "low <= high"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        SPARKE(**settings)


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (torch.zeros(4), None, r"tensor \[n, ...\]"),
        (torch.full((2, 4), float("nan")), None, "NaN"),
        (torch.zeros(2, 9), None, r"features of shape \(4,\), got \(9,\)"),
        (torch.randn(3, 4), torch.ones(2, 3), "3 samples cannot be divided evenly among 2 prompts"),
        (torch.randn(2, 4), torch.ones(2, 5), "width 5"),
    ],
)
def test_gradient_invalid_input_raises(x, t, message):
    guide = SPARKE()
    guide.memory.add(torch.ones(1, 4), torch.ones(1, 3))
    with pytest.raises(ValueError, match=message):
        guide.gradient(x, t)


def test_mismatched_memory_raises_without_side_effects():
    bank = MemoryBank()
    bank.add(torch.ones(2, 3, 8, 8))
    scheduler = ddim()
    with pytest.raises(ValueError, match=r"features of shape \(3, 8, 8\), this pipeline makes \(1, 1, 32\)"):
        sample(SPARKE(1.0, memory=bank), scheduler)
    assert len(bank) == 2
    assert "step" not in vars(scheduler)


@pytest.mark.parametrize("name", ["reference", "baseline"])
def test_references_in_another_order_are_refused_at_the_first_step(name):
    portrait, flat = torch.randn(5, 2, 4, 4), torch.randn(5, 32)
    make = {
        "reference": lambda rows: MMDGuidance(rows, start=0.5),
        "baseline": lambda rows: NoveltyGuidance(torch.ones(3, 1, 1, 32), baseline=rows, start=0.5),
    }[name]
    scheduler = ddim()
    with pytest.raises(ValueError, match=r"of shape \[2, 4, 4\], and those of this call have \[1, 1, 32\]"):
        sample(make(portrait), scheduler)
    assert "step" not in vars(scheduler)
    assert torch.equal(sample(make(flat)), sample(make(flat.view(5, 32, 1))))


def test_samples_in_double_precision_are_guided():
    scheduler, guide = ddim(), SPARKE(1.0)
    scheduler.set_timesteps(4)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with guide.attach(scheduler):
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x).prev_sample
    assert x.dtype == torch.float64
    assert len(guide.memory) == 3
    assert max(float(size.max()) for _, size, _ in guide.report().moves) > 1e-3
