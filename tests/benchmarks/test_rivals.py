"""The arena's methods on start noises and inside transformer blocks, against exact results."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import Bed, Case
from kspec_guidance.bench.methods import METHODS
from kspec_guidance.bench.methods.base import Method, Moment, norms
from kspec_guidance.bench.methods.blockguidance import similarity_gradient
from kspec_guidance.bench.methods.cno import contrast, pooled
from kspec_guidance.bench.methods.diverseflow import dpp, squared_distances
from kspec_guidance.bench.methods.gass import main_direction
from kspec_guidance.bench.methods.noiseopt import norm_score
from kspec_guidance.guidance.spaces.pixels import Pixels
from kspec_guidance.loop.context import CallContext
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

    def shape(self) -> tuple[int, ...]:
        config = self.pipe.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

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


def test_guidance_of_a_step_is_what_the_prompt_adds() -> None:
    bed, seen = Analytic(8, skewed=True), []

    class Look(Method):
        def move(self, m: Moment) -> None:
            both, found = m.call.outputs[0][0].chunk(2), m.guidance()  # type: ignore[union-attr]
            seen.append((found, both))

    bed.sample(Look(), Case("prompt 3", 0))
    assert len(seen) == bed.steps
    for found, (uncond, cond) in seen:
        assert torch.allclose(found.direction, cond - uncond, atol=1e-6)
    assert float(seen[0][0].weight) == pytest.approx(bed.guidance_scale, rel=1e-3)  # later both predictions are equal
    seen.clear()
    bed.guidance_scale = 1.0
    bed.sample(Look(), Case("prompt 3", 0))
    assert all(found is None for found, _ in seen)


def test_main_direction_is_the_widest_one_off_the_axis(g: torch.Generator) -> None:
    axis, wide, narrow = torch.linalg.qr(torch.randn(7, 3, generator=g, dtype=torch.float64)).Q.T
    a, b, c = (scale * torch.randn(50, 1, generator=g, dtype=torch.float64) for scale in (9.0, 3.0, 0.0))
    v = main_direction(5.0 + a * axis + b * wide + c * narrow, axis)
    assert float((v @ wide).abs()) == pytest.approx(1.0, abs=1e-9)


def spread_of(step: int, x0: torch.Tensor) -> Moment:
    return Moment(x0, x0, 0.8, 0.6, step, 10, None, None, None, None)


def test_text_axis_spread_is_the_formula(g: torch.Generator) -> None:
    x0 = 1 + torch.randn(5, 2, 3, 3, generator=g, dtype=torch.float64)
    method = METHODS["text-axis spread"](r=0.4)
    method.begin()
    move = method.move(spread_of(0, x0))
    assert move is not None
    rows, moved = x0.flatten(1), (x0 + move).flatten(1)
    assert torch.allclose(norms(rows), norms(moved))
    u = rows.mean(0) / rows.mean(0).norm()  # no classifier-free guidance here
    v = main_direction(rows, u)
    plane = torch.stack([u, v])
    # before renormalisation the images move in that plane, by at most 0.4 of their norms along each direction
    length = (moved - moved @ plane.T @ plane).norm(dim=1) / (rows - rows @ plane.T @ plane).norm(dim=1)
    draws = ((moved / length[:, None] - rows) / norms(rows)) @ plane.T
    assert torch.allclose(rows + norms(rows) * (draws @ plane), moved / length[:, None])
    assert float(draws.abs().max()) < 0.4
    assert float(draws.std(0).min()) > 0.05


def test_moves_of_text_axis_spread_agree_at_all_steps_and_differ_between_runs(g: torch.Generator) -> None:
    x0 = 1 + torch.randn(5, 2, 3, 3, generator=g)
    method = METHODS["text-axis spread"](r=0.4)
    method.begin()
    first = method.move(spread_of(0, x0))
    assert torch.allclose(method.move(spread_of(1, x0)), first)  # type: ignore[arg-type]
    assert torch.allclose(method.move(spread_of(2, x0 + 1e-3 * torch.randn(x0.shape, generator=g))), first, atol=0.05)  # type: ignore[arg-type]
    assert method.move(spread_of(6, x0)) is None
    method.begin()
    assert not torch.allclose(method.move(spread_of(0, x0)), first)  # type: ignore[arg-type]


@pytest.mark.parametrize("cfg", [3.0, 0.0])
@pytest.mark.parametrize(
    ("name", "off", "on"),
    [("text-axis spread", {"r": 0.0}, {"r": 0.5}), ("noise optimisation", {"rounds": 0}, {"rate": 0.1})],
)
def test_spread_and_optimised_noise_move_samples_and_leave_the_pipeline_as_it_was(
    name: str, off: dict, on: dict, cfg: float, bed: Transformer
) -> None:
    bed.guidance_scale = cfg
    case = Case("a red heart", 4)
    with torch.no_grad():  # as the arena runs
        before = bed.run(case, 3)
        assert torch.allclose(bed.sample(METHODS[name](**off), case), before, atol=1e-5)
        moved = bed.sample(METHODS[name](**on), case)
        assert moved.isfinite().all()
        assert not torch.allclose(moved, before, atol=1e-4)
        assert torch.equal(bed.run(case, 3), before)
    assert all(p.grad is None for p in bed.pipe.transformer.parameters())


def test_norm_score_is_the_gradient_of_the_log_density_of_a_chi_distribution(g: torch.Generator) -> None:
    z = torch.randn(3, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    size = z.flatten(1).norm(dim=1)
    (expected,) = torch.autograd.grad((7 * size.log() - size.square() / 2).sum(), z)
    assert torch.allclose(norm_score(z.detach()), expected, atol=1e-12)


def test_first_round_of_noise_optimisation_follows_the_sign_of_the_gradient(g: torch.Generator) -> None:
    z = torch.randn(4, 1, 1, 6, generator=g, dtype=torch.float64)
    model = torch.randn(6, 6, generator=g, dtype=torch.float64)
    unit = 2.0
    m = Moment(z, unit * z, 0.1, 1.0, 0, 4, None, SimpleNamespace(vae=None), SimpleNamespace(init_noise_sigma=unit), None)
    m.denoise = lambda x: (x @ model).tanh()  # type: ignore[method-assign]
    method = METHODS["noise optimisation"](rate=0.01, rounds=1, prior=0.3)
    got = method.optimised(m)  # type: ignore[attr-defined]
    leaf = z.clone().requires_grad_()
    size = leaf.flatten(1).norm(dim=1)
    value = dpp(m.denoise(unit * leaf), 1.0) + 0.3 * (5 * size.log() - size.square() / 2).sum()
    (expected,) = torch.autograd.grad(value, leaf)
    assert torch.allclose(got, z + 0.01 * expected.sign(), atol=1e-5)


@pytest.mark.parametrize("cfg", [3.0, 0.0])
def test_noise_optimisation_spreads_decoded_first_predictions(cfg: float, bed: Transformer) -> None:
    bed.guidance_scale = cfg
    case, rows = Case("a red heart", 5), []

    class Look(METHODS["CNO"]):  # type: ignore[misc]
        def move(self, m: Moment) -> torch.Tensor | None:
            rows.append(Pixels(chunk=2).final(m.x0, CallContext(m.pipe)))
            return super().move(m)

    start = bed.start(case, 3)
    for z in (start, METHODS["noise optimisation"](rate=0.05, rounds=4).choose(bed, case)):  # type: ignore[attr-defined]
        Look().predictions(bed, case, z)
    median = squared_distances(rows[0])[1]
    assert float(dpp(rows[1], 1.0, median)) > float(dpp(rows[0], 1.0, median)) + 0.1
