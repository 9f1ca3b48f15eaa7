import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance import KernelGuidance, Term
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.objectives import RKE, ConditionalRKE, Vendi
from tests.samples import rows


def test_default_is_variety_50():
    guide = SPARKE()
    assert guide.variety == 50
    assert guide.terms[0].unit == "spread"
    assert SPARKE(variety=50).to_config() == guide.to_config()


def test_scale_is_a_fixed_strength_without_a_variety():
    guide = SPARKE(1.5)
    assert guide.variety is None
    assert (guide.terms[0].scale, guide.terms[0].unit) == (1.5, "norm")
    assert SPARKE.published().variety is None


@pytest.mark.parametrize("value", [-1, 100.5, float("nan"), float("inf"), "50", True, None])
def test_variety_is_a_number_from_0_to_100(value):
    if value is None:
        assert SPARKE(variety=None).variety == 50
        return
    with pytest.raises(ValueError, match=r"variety must be a number from 0 \(plain sampling\) to 100"):
        SPARKE(variety=value)


def test_variety_and_scale_exclude_each_other():
    with pytest.raises(ValueError, match="both set the strength; give one of them"):
        SPARKE(1.0, variety=50)


def test_variety_survives_saving(tmp_path):
    guide = SPARKE(variety=20)
    guide.calibration = 1.7
    guide.save_config(tmp_path)
    again = KernelGuidance.from_config(tmp_path)
    assert (again.variety, again.calibration) == (20, 1.7)


def test_settings_without_a_unit_are_relative_to_the_norm():
    config, _ = SPARKE(0.8).to_config()
    for term in config["terms"]:
        del term["unit"]
    assert SPARKE.from_config(config).terms[0].unit == "norm"


def test_unknown_units_and_objectives_without_spread_are_refused():
    with pytest.raises(ValueError, match="unit must be 'norm' or 'spread'"):
        Term(RKE(), 1.0, unit="pixels")
    with pytest.raises(ValueError, match=r"in the unit 'spread', got unit='norm'; give scale="):
        SPARKE(variety=50, unit="norm")
    with pytest.raises(ValueError, match="Vendi does not measure the spread"):
        Term(Vendi(GaussianKernel()), 1.0, unit="spread")


def test_spread_is_the_median_distance_of_the_pairs():
    x = l2_normalize(rows(6, 5))
    expected = torch.pdist(x).median()
    for objective in (RKE(), RKE(GaussianKernel(2.0))):
        assert objective.gradient(x).spread == pytest.approx(float(expected), rel=1e-6)
    prompts = torch.eye(6, dtype=x.dtype)[[0, 0, 0, 1, 2, 3]]
    found = ConditionalRKE().gradient(x, prompts).spread
    assert found == pytest.approx(float(torch.pdist(x[:3]).median()), rel=1e-6)


def test_spread_of_random_features_is_that_of_their_bandwidth():
    feature_map = RandomFourierFeatures(GaussianKernel(0.4), 5, 512)
    found = RKE(GaussianKernel(0.4), feature_map).gradient(l2_normalize(rows(6, 5, dtype=torch.float32))).spread
    assert found == pytest.approx(0.8)


@pytest.mark.parametrize("calibration", [1.0, 2.5])
def test_move_is_the_variety_times_the_squared_spread(pipe, calibration):
    settings = {"num_inference_steps": 4, "num_images_per_prompt": 3, "output_type": "latent"}

    def moves(guide):
        with guide.attach(pipe):
            pipe("heart", generator=torch.Generator().manual_seed(0), **settings)
        return guide.report().moves[0][1].max(), guide

    guide = SPARKE(variety=10, transforms=("bound",))
    guide.calibration = calibration
    by_variety, guide = moves(guide)
    x0 = guide.report().context  # the first guided step has the same prediction in both runs
    assert x0 is not None
    unit = moves(SPARKE(1e-3, transforms=("bound",)))[0] / 1e-3
    spread = (by_variety / (unit * 0.25 * calibration)).sqrt()
    assert 0.05 < float(spread) < 2
    fixed = moves(SPARKE(0.25 * calibration * float(spread) ** 2, transforms=("bound",)))[0]
    assert float(fixed) == pytest.approx(float(by_variety), rel=1e-4)


def test_variety_0_is_plain_sampling_bit_for_bit(pipe):
    settings = {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "latent"}

    def latents(guide=None):
        if guide is None:
            return pipe("heart", generator=torch.Generator().manual_seed(0), **settings).images
        with guide.attach(pipe):
            return pipe("heart", generator=torch.Generator().manual_seed(0), **settings).images

    assert torch.equal(latents(SPARKE(variety=0)), latents())
    assert not torch.equal(latents(SPARKE(variety=50)), latents())


def test_images_grow_apart_with_variety(pipe):
    settings = {"num_inference_steps": 6, "num_images_per_prompt": 4, "output_type": "latent"}
    alike = []
    for variety in (0, 25, 50, 100):
        guide = SPARKE(variety=variety)
        with guide.attach(pipe):
            pipe("heart", generator=torch.Generator().manual_seed(1), **settings)
        x = l2_normalize(guide.finished[0].features.flatten(1).double())
        alike.append(float((GaussianKernel(0.5)(x, x).square().sum() - 4) / 12))
    assert alike == sorted(alike, reverse=True)
    assert alike[2] < 0.9 * alike[0]


@pytest.mark.parametrize(("total", "steps"), [(1, 1), (2, 1), (4, 2), (6, 4), (8, 6), (30, 20)])
def test_the_guided_interval_of_short_runs_is_shorter(total, steps):
    term = SPARKE().terms[0]
    assert term.guided_steps(total) == frozenset(range(steps))
    assert term.interval(8) == (term.start, term.stop)
    assert term.interval(4)[1] == pytest.approx(0.5)
    assert SPARKE(1.0).terms[0].interval(4) == (0.0, 0.65)


def test_a_later_interval_of_short_runs_keeps_its_start():
    term = SPARKE(start=0.25, stop=0.9).terms[0]
    assert term.interval(4) == pytest.approx((0.25, 0.25 + 0.65 * 0.5 / 0.65))
