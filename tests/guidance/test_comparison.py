"""``guide.compare``: the same call, plain and guided, from the same noise."""

import numpy as np
import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, MMDGuidance, guided, load_demo_pipeline
from kspec_guidance import functional as F
from kspec_guidance.guidance.comparison import _columns
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel
from kspec_guidance.plotting import side_by_side
from tests import schedulers
from tests.emoji import generators, sample_latents
from tests.tiny import build, build_modular, call_kwargs, modular_call_kwargs

CALL = {"num_images_per_prompt": 3, "num_inference_steps": 4, "guidance_scale": 4.0}
LATENT = CALL | {"output_type": "latent"}


def equal(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def unpatched(pipe):
    return "step" not in vars(pipe.scheduler) and not {"encode_prompt", "check_inputs", "prepare_latents"} & set(vars(pipe))


def test_both_runs_are_the_pipelines_own_from_the_same_noise(pipe):
    guide = SPARKE(1.0)
    found = guide.compare(pipe, "heart", generator=generators(3), **LATENT)
    assert torch.equal(found.plain, sample_latents(pipe, steps=4))
    assert torch.equal(found.guided, sample_latents(pipe, steps=4, guide=SPARKE(1.0)))
    rows = [torch.nn.functional.normalize(x.flatten(1).double(), dim=1) for x in (found.plain, found.guided)]
    plain, guided = (float(F.rke_score(r, GaussianKernel(IMAGE_BANDWIDTH))) for r in rows)
    assert (found.report.plain, found.report.guided) == pytest.approx((plain, guided), abs=1e-6)
    assert found.report is guide.report()
    assert unpatched(pipe)


@pytest.mark.slow
def test_number_of_different_images_rises_on_the_embedded_pipeline(pipe):
    call = {"num_images_per_prompt": 8, "num_inference_steps": 12, "generator": generators(8), "output_type": "latent"}
    reports = [SPARKE(scale).compare(pipe, "heart", **call).report for scale in (0.0, 1.0, 3.0)]
    assert reports[0].guided == reports[0].plain == reports[1].plain == reports[2].plain
    assert reports[0].plain + 1 < reports[1].guided < reports[2].guided - 1
    assert "Clearly more." in str(reports[1])


def test_scale_zero_gives_identical_images(pipe):
    found = SPARKE(0.0).compare(pipe, "heart", **CALL)
    assert equal(found.plain, found.guided)
    assert found.report.guided == found.report.plain


def test_without_a_generator_one_seed_is_drawn_and_kept(pipe):
    found, again = (SPARKE(1.0).compare(pipe, "heart", **LATENT) for _ in range(2))
    assert found.seed != again.seed
    plain = pipe("heart", generator=torch.Generator().manual_seed(found.seed), **LATENT).images
    assert torch.equal(plain, found.plain)
    torch.manual_seed(5)
    first = SPARKE(1.0).compare(pipe, "heart", **LATENT).seed
    torch.manual_seed(5)
    assert SPARKE(1.0).compare(pipe, "heart", **LATENT).seed == first


def test_given_generators_do_not_advance_and_one_listed_twice_stays_one(pipe):
    g = torch.Generator().manual_seed(3)
    torch.randn(5, generator=g)  # not at its beginning
    state = g.get_state()
    found = SPARKE(0.0).compare(pipe, "heart", generator=[g, g, g], **LATENT)
    assert torch.equal(g.get_state(), state)
    assert torch.equal(found.plain, found.guided)
    assert not torch.equal(found.plain[0], found.plain[1])
    assert torch.equal(pipe("heart", generator=[g, g, g], **LATENT).images, found.plain)


def test_global_random_state_is_that_of_one_draw(pipe):
    torch.manual_seed(1)
    SPARKE(1.0).compare(pipe, "heart", **LATENT)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.randint(2**31, ())
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("attached", [False, True])
def test_memory_is_used_and_filled_by_the_guided_run_alone(pipe, attached):
    guide, single = SPARKE(1.0), LATENT | {"num_images_per_prompt": 1}
    sample_latents(pipe, n=2, steps=4, guide=guide)
    expected = sample_latents(pipe, n=1, steps=4, guide=SPARKE(1.0, memory=guide.memory.empty_copy().merge(guide.memory) or guide.memory))
    assert len(guide.memory) == 3
