"""The arena's methods on start noises and inside transformer blocks, against exact results."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.arena.beds.base import Bed, Case
from kspec_guidance.bench.methods import METHODS
from kspec_guidance.bench.methods.blockguidance import similarity_gradient
from kspec_guidance.bench.methods.cno import contrast, pooled
from tests.tiny.builders import build, call_kwargs
from tests.tiny.models import build_model

BLOCKS = ["DAVE", "contextual repulsion", "feature self-guidance, blocks"]


class Transformer(Bed):
    """A tiny Stable Diffusion 3 of random weights."""

    images, steps, guidance_scale = 3, 4, 3.0
    has = frozenset({"blocks", "guidance", "images", "prompts"})

    def __init__(self) -> None:
        self.pipe = build("StableDiffusion3Pipeline", transformer=build_model("SD3Transformer2DModel", num_layers=4))
        self.pipe.set_progress_bar_config(disable=True)
        self.call = call_kwargs(self.pipe)

    def run(self, case: Case, n: int, latents: torch.Tensor | None = None) -> torch.Tensor:
        own = {
            "prompt": case.prompt,
            "num_images_per_prompt": n,
            "num_inference_steps": self.steps,
            "output_type": "latent",
        }
        start = {"generator": self.noise(case, n)} if latents is None else {"latents": latents, "generator": None}
        return self.pipe(**{**self.call, **own, **start, "guidance_scale": self.guidance_scale}).images


@pytest.fixture(scope="module")
def bed() -> Transformer:
    return Transformer()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("cfg", [3.0, 0.0])
def test_block_methods_move_the_samples_and_leave_the_pipeline_as_it_was(name: str, cfg: float, bed: Transformer) -> None:
    bed.guidance_scale = cfg
    case, method = Case("a red heart", 1), METHODS[name](stop=1.0)
    before = bed.run(case, 3)
    moved = bed.sample(method, case)
    assert moved.isfinite().all()
    assert not torch.allclose(moved, before, atol=1e-5)
    assert torch.equal(bed.run(case, 3), before)
    with pytest.raises(RuntimeError), METHODS[name]().attach(bed.pipe):
        raise RuntimeError
    assert all(not m._forward_hooks for m in bed.pipe.transformer.modules())


@pytest.mark.parametrize(
    ("name", "off"), [("DAVE", {"attenuation": 0.0}), ("contextual repulsion", {"weight": 0.0}), (BLOCKS[2], {"stop": 0.0})]
)
def test_block_methods_without_strength_are_plain_sampling(name: str, off: dict, bed: Transformer) -> None:
    case = Case("a red heart", 2)
    assert torch.equal(bed.sample(METHODS[name](**off), case), bed.run(case, bed.images))


def test_similarity_gradient_is_that_of_autograd(g: torch.Generator) -> None:
    rows = torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    u = torch.nn.functional.normalize(rows, dim=1)
    pairs = (u @ u.T / 0.3)[~torch.eye(4, dtype=torch.bool)]
    (expected,) = torch.autograd.grad(pairs.exp().mean().log(), rows)
    assert torch.allclose(similarity_gradient(rows.detach(), 0.3), expected, atol=1e-12)


def test_dave_subtracts_a_share_of_the_mean_token(g: torch.Generator) -> None:
    method, block = METHODS["DAVE"](attenuation=0.25), SimpleNamespace(depth=0.5)
    image = torch.randn(2, 5, 3, generator=g)
    tokens = SimpleNamespace(image=image, text=None, fraction=0.0)
    got, _ = method.change(block, tokens)  # type: ignore[attr-defined]
    assert torch.allclose(got.mean(1), 0.75 * image.mean(1), atol=1e-6)
    assert torch.allclose(got - got.mean(1, keepdim=True), image - image.mean(1, keepdim=True), atol=1e-6)


def test_pink_noise_has_unit_variance_and_the_spectrum_that_is_asked_for() -> None:
    n = 4000
    white = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    stub = SimpleNamespace(start=lambda case, k: white, images=n)
    case = Case("", 0)
    assert torch.allclose(METHODS["pink noise"](exponent=0.0).choose(stub, case), white, atol=1e-5)  # type: ignore[attr-defined]
    pink = METHODS["pink noise"](exponent=0.5).choose(stub, case)  # type: ignore[attr-defined]
    assert float(pink.var()) == pytest.approx(1.0, abs=0.02)
    power = torch.fft.fft2(pink).abs().square().mean((0, 1))
    assert float(power[0, 1] / power[0, 4]) == pytest.approx((0.5 / 0.125) ** 1.0, rel=0.1)  # f^-0.5 in amplitude
    assert float(power[1, 0] / power[0, 1]) == pytest.approx(1.0, rel=0.1)


def test_cno_descends_its_loss_and_keeps_predictions_near_their_first(g: torch.Generator) -> None:
    common = torch.randn(1, 2, 8, 8, generator=g)
    start = common + 0.3 * torch.randn(6, 2, 8, 8, generator=g)

    class Identity(METHODS["CNO"]):  # type: ignore[misc]
        def predictions(self, bed, case, start, look=1):
            return start

    stub = SimpleNamespace(start=lambda case, k: start, images=6)
    chosen = Identity(rate=0.05, rounds=5).choose(stub, Case("", 0))
    first, now = pooled(start), pooled(chosen)
    assert float(contrast(now, first, 0.1)) < float(contrast(first, first, 0.1))
    off = ~torch.eye(6, dtype=torch.bool)
    assert float((now @ now.T)[off].mean()) < float((first @ first.T)[off].mean())
    assert float((now * first).sum(1).min()) > 0.8


def test_contrast_of_orthogonal_rows_is_the_closed_form() -> None:
    x, tau, n = torch.eye(5), 0.1, 5
    expected = math.log(math.exp(1 / tau) + n - 1) - (tau * math.log(n - 1) + 1) / tau
    assert float(contrast(x, x, tau)) == pytest.approx(expected, rel=1e-6)
