"""Samples of three numbers or fewer: default guides move them in any direction, and compare them as they are."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks.arena.beds.analytic import Analytic
from kspec_guidance import SPARKE, KernelGuidance, NoveltyGuidance, VendiGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance import DEFAULT_TRANSFORMS, Term
from kspec_guidance.kernels import ExpCosineKernel, GaussianKernel
from kspec_guidance.loop.prediction import predict
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.objectives import ConditionalRKE, LogDet, Vendi

FREE = ("bound", "fade")
GUIDES: dict[str, Callable[..., KernelGuidance]] = {
    "SPARKE, scale 1": lambda **k: SPARKE(1.0, **k),
    "SPARKE, variety 50": lambda **k: SPARKE(variety=50, **k),
    "vivid": lambda **k: SPARKE.preset("vivid", **k),
    "log det": lambda **k: VendiGuidance(order="logdet", **k),
}


def run(dim: int, guide: KernelGuidance, images: int = 4) -> Tensor:
    bed = Analytic(dim)
    with torch.no_grad(), guide.attach(bed.pipe):
        return bed.run(bed.cases("report", 1)[0], images)


def one_step(guide: KernelGuidance, samples: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Clean predictions ``[n, d]`` of one step of a bare scheduler, and how the guide moved them."""
    scheduler = DDIMScheduler(500, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    before = predict(scheduler, output, t, samples).x0
    with guide.attach(scheduler):
        after = scheduler.step(output, t, samples).pred_original_sample
    return before.flatten(1).double(), (after.double() - before).flatten(1)


def batch(numbers: int, n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, n, 1, 1, numbers, generator=g)
    return x, e


@pytest.mark.parametrize("numbers", [1, 2, 3])
@pytest.mark.parametrize("name", GUIDES)
def test_move_of_few_numbers_is_along_the_gradient_at_predictions_as_they_are(name: str, numbers: int) -> None:
    guide = GUIDES[name]()
    x0, move = one_step(guide, *batch(numbers))
    objective = {
        "vivid": Vendi(GaussianKernel(), 0.5, normalize=False),
        "log det": LogDet(GaussianKernel(), normalize=False),
    }.get(name, ConditionalRKE(normalize=False))
    rows = x0.clone().requires_grad_()
    g = torch.autograd.grad(objective.fit(x0).value(rows), rows)[0]
    wanted = g * x0.norm(dim=1, keepdim=True)  # bound: each in proportion to its gradient and its norm
    assert move.norm() > 0
    torch.testing.assert_close(move / move.norm(), wanted / wanted.norm(), atol=1e-4, rtol=1e-3)


def along(move: Tensor, direction: Tensor) -> float:
    """The largest part of a move along a direction, relative to the largest move."""
    unit = direction.flatten(1) / direction.flatten(1).norm(dim=1, keepdim=True)
    return float((move * unit).sum(1).abs().max() / move.norm(dim=1).max())


@pytest.mark.parametrize("name", GUIDES)
def test_move_of_four_numbers_is_off_the_score(name: str) -> None:
    x, e = batch(4)
    assert along(one_step(GUIDES[name](), x, e)[1], e) < 1e-4


@pytest.mark.parametrize("name", GUIDES)
def test_move_of_three_numbers_is_not(name: str) -> None:
    x, e = batch(3)
    assert along(one_step(GUIDES[name](), x, e)[1], e) > 0.05


@pytest.mark.parametrize("numbers", [4, 8])
@pytest.mark.parametrize("name", GUIDES)
def test_default_transforms_of_more_numbers_are_those_that_can_be_given(name: str, numbers: int) -> None:
    default, given = GUIDES[name](), GUIDES[name](transforms=DEFAULT_TRANSFORMS)
    assert torch.equal(run(numbers, default), run(numbers, given))
    assert torch.equal(run(numbers, default), run(numbers, given))  # with a memory of the first call


@pytest.mark.parametrize("name", GUIDES)
def test_given_transforms_of_few_numbers_are_kept_and_say_that_no_direction_is_left(name: str) -> None:
    guide = GUIDES[name](transforms=DEFAULT_TRANSFORMS)
    x, e = batch(3)
    with pytest.warns(UserWarning, match=r"samples of 3 numbers.*leave transforms= out"):
        _, move = one_step(guide, x, e)
    assert along(move, e) < 1e-4


@pytest.mark.parametrize("name", ["SPARKE, scale 1", "vivid", "log det"])
def test_scale_is_the_move_of_the_largest_gradient_relative_to_its_prediction(name: str) -> None:
    x0, move = one_step(GUIDES[name](**({} if name == "SPARKE, scale 1" else {"scale": 1.0})), *batch(2))
    torch.testing.assert_close((move.norm(dim=1) / x0.norm(dim=1)).max().item(), 1.0, atol=1e-3, rtol=0)


def test_variety_of_few_numbers_does_not_depend_on_their_unit() -> None:
    x, e = batch(2)
    (_, move), (_, move_10) = (one_step(SPARKE(variety=50), s * x, s * e) for s in (1.0, 10.0))
    torch.testing.assert_close(move_10 / 10, move, atol=1e-6, rtol=1e-4)


def test_memory_repels_points_of_the_plane_as_they_are() -> None:
    """A remembered point on the ray of a sample, of norm 1 both, repels along the ray."""
    guide = SPARKE(1.0)
    x, e = batch(2, 1)
    x0, _ = one_step(SPARKE(0.0), x, e)
    guide.memory.bind((1, 1, 2), "x0", None)
    guide.memory.add((0.8 * x0).view(1, 1, 1, 2).float())
    _, move = one_step(guide, x, e)
    assert torch.nn.functional.cosine_similarity(move, x0).item() > 1 - 1e-6


@pytest.mark.parametrize("name", GUIDES)
def test_less_classifier_free_guidance_of_few_numbers(name: str) -> None:
    guide = GUIDES[name](cfg_share=0.5, ease_cfg=1.0)
    assert torch.isfinite(run(2, guide)).all()
    assert guide.report().eased


@pytest.mark.parametrize("transforms", [None, DEFAULT_TRANSFORMS, FREE])
def test_settings_keep_whether_transforms_were_given(transforms: Any, tmp_path: Any) -> None:
    guide = SPARKE(1.0, transforms=transforms)
    guide.save_config(tmp_path)
    found = KernelGuidance.from_config(tmp_path)
    assert found.terms[0].own_transforms is (transforms is not None)
    assert found.terms[0].for_numbers(2).transforms == (DEFAULT_TRANSFORMS if transforms == DEFAULT_TRANSFORMS else FREE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(2, guide), run(2, found))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": GaussianKernel(0.5)},
        {"memory": CentroidMemory(8)},
        {"recall": "nearest"},
        {"feature_map": RandomFourierFeatures(GaussianKernel(0.5), 2, 64),
         "prompt_feature_map": RandomFourierFeatures(GaussianKernel(0.35), 12, 64)},
    ],
)  # fmt: skip
def test_what_depends_on_norm_1_keeps_it(settings: dict[str, Any]) -> None:
    term = SPARKE(1.0, **settings).terms[0]
    few = term.for_numbers(2)
    assert few.transforms == FREE
    assert few.objective is term.objective


def test_log_determinant_of_few_numbers_has_a_kernel_that_sees_norms() -> None:
    term = VendiGuidance(order="logdet").terms[0]
    assert isinstance(term.objective.kernel, ExpCosineKernel)
    assert term.for_numbers(2).objective.kernel == GaussianKernel()
    assert isinstance(term.objective.kernel, ExpCosineKernel)  # the guide's own is as before
    assert term.for_numbers(4) is term


@pytest.mark.parametrize("space", ["latents", "pooled"])
def test_other_spaces_are_as_before(space: str) -> None:
    term = Term(ConditionalRKE(), 1.0, space)
    assert term.for_numbers(2) is term


def test_references_are_compared_at_norm_1() -> None:
    guide = NoveltyGuidance(torch.randn(4, 1, 1, 2))
    few = guide.terms[0].for_numbers(2)
    assert few.transforms == FREE
    assert few.objective is guide.terms[0].objective


@pytest.mark.parametrize(
    ("dim", "guide"),
    [
        (2, SPARKE(0.0)),
        (2, SPARKE(1.0)),
        (2, KernelGuidance(Vendi(GaussianKernel(), 0.5, normalize=False), 1.0, transforms=FREE)),
        (8, SPARKE(1.0)),
    ],
)
def test_others_are_quiet(dim: int, guide: KernelGuidance) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(dim, guide)
    assert isinstance(guide.memory, MemoryBank)
