"""The arithmetic of guidance does not depend on the precision that the caller has set for its networks."""

import contextlib
import threading

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.features import RandomProjection
from kspec_guidance.utils.precision import full_precision

from .loops import Loop, noise


@contextlib.contextmanager
def products(setting):
    """One setting of torch that makes float32 products less precise; the setting is restored."""
    if setting == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif setting == "all backends":
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")
    else:
        matmul = getattr(torch.backends.mkldnn, "matmul", None)
        if matmul is None:
            pytest.skip("this torch has no settings per backend")
        before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


SETTINGS = ["autocast", "all backends", "one backend"]


def product():
    x = noise(0, 64, 512)
    return x @ x.mT


@pytest.mark.parametrize("setting", SETTINGS)
def test_full_precision_applies_within_its_context_alone(setting):
    expected = product()
    with products(setting):
        reduced = product()
        with full_precision(torch.device("cpu")):
            assert torch.equal(product(), expected)
            with full_precision(torch.device("cpu")):
                assert torch.equal(product(), expected)
            assert torch.equal(product(), expected)
        assert torch.equal(product(), reduced)


@pytest.mark.parametrize("setting", SETTINGS)
def test_random_projection_does_not_depend_on_precision_of_products(setting):
    project = RandomProjection(64, 32)
    expected = project(noise(0, 4, 64))
    with products(setting):
        assert torch.equal(project(noise(0, 4, 64)), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("preset", ["default", "vivid"])
def test_images_do_not_depend_on_precision_of_products(setting, preset):
    def images():
        guide = SPARKE.preset(preset, stop=1.0)
        return [Loop(guide, diffusers.DDIMScheduler(), seed=seed)() for seed in (0, 1)]

    expected = images()
    with products(setting):
        found = images()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_setting_is_restored_when_threads_overlap():
    torch.set_float32_matmul_precision("high")
    try:
        inside, leave = threading.Event(), threading.Event()

        def work():
            with full_precision(torch.device("cpu")):
                inside.set()
                leave.wait(60)

        thread = threading.Thread(target=work)
        with full_precision(torch.device("cpu")):
            thread.start()
            assert inside.wait(60)
        assert torch.get_float32_matmul_precision() == "highest"  # the other thread is still inside
        leave.set()
        thread.join(60)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
