"""The guider in integrations/diffusers, at its place in diffusers: its own tests, and the images of SPARKE."""

import importlib.util
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
from packaging.version import Version

if Version(diffusers.__version__) < Version("0.42"):
    pytest.skip("requires the guiders of diffusers 0.42", allow_module_level=True)

from diffusers import ClassifierFreeGuidance

from kspec_guidance import SPARKE
from tests.integrations.test_guider import build, generate

FOLDER = Path(__file__).parents[2] / "integrations" / "diffusers"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DiversityGuidance = load("diffusers.guiders.diversity_guidance", FOLDER / "diversity_guidance.py").DiversityGuidance
TestDiversityGuidance = load("test_diversity_guidance", FOLDER / "test_diversity_guidance.py").TestDiversityGuidance
SLOW = ["Flux2KleinBaseModularPipeline", "WanModularPipeline", "ErnieImageModularPipeline"]


@pytest.mark.parametrize(
    "name",
    ["StableDiffusion3ModularPipeline", "ZImageModularPipeline", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)],
)
def test_it_makes_the_images_of_sparke(name):
    pipe = build(name)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    plain = generate(pipe)
    with SPARKE(0.4).attach(pipe):
        expected = generate(pipe)
    pipe.update_components(guider=DiversityGuidance(guidance_scale=3.0))
    found = generate(pipe)
    assert not np.array_equal(found, plain)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    pipe.update_components(guider=DiversityGuidance(guidance_scale=3.0, diversity_scale=0.0))
    assert np.array_equal(generate(pipe), plain)
