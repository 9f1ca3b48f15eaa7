"""``apart=``: moves that end once samples of a prompt are so far from each other."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, VendiGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.apart import missing_distance
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.loop.prediction import predict
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.objectives import ConditionalRKE, LogDet, Vendi
from tests.samples import normalize_rows, rows

OBJECTIVES = [
    ConditionalRKE(),
    Vendi(GaussianKernel(), 0.5, GaussianKernel(0.35)),
    LogDet(prompt_kernel=GaussianKernel(0.35)),
]


def brute(x, apart, kept, weights, memory_weights, normalize=True):
    """The same by loops, at norm 1 or relative to the norms' root mean square."""
    unit = x.norm(dim=1).square().mean().sqrt()
    a, b = (normalize_rows(x), normalize_rows(kept)) if normalize else (x / unit, kept / unit)
    found = torch.zeros(len(x), 1, dtype=x.dtype)
    for i in range(len(x)):
        near = [weights[i, j] * (apart - (a[i] - a[j]).norm()) for j in range(len(x)) if j != i]
        near += [memory_weights[i, j] * (apart - (a[i] - b[j]).norm()) for j in range(len(kept))]
        found[i] = max([0.0, *map(float, near)])
    return found


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("apart", [0.3, 0.9, 2.5])
@pytest.mark.parametrize("chunks", [1, 3])
def test_missing_distance_is_that_to_the_nearest_of_batch_and_memory(objective, apart, chunks):
    x, kept = rows(4, 5, 0) + 2, 3 * (rows(7, 5, 1) + 2)
    t, s = normalize_rows(rows(4, 3, 2) + 1), normalize_rows(rows(7, 3, 3) + 1)
    bank, kernel = MemoryBank(), GaussianKernel(0.35)
    for part, prompts in zip(kept.chunk(chunks), s.chunk(chunks), strict=True):
        bank.add(part, prompts)
    pairs = objective.pairs(normalize_rows(x), t, bank)
    expected = brute(x, apart, kept, kernel(t, t).square(), kernel(t, s).square())
    found = missing_distance(x, x.norm(dim=1, keepdim=True), pairs, apart)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # the memory keeps float32, and leaves out rows of 0.001
    assert expected.max() > 0 or apart < 0.5


def test_rows_as_they_are_count_relative_to_their_norms():
    objective, x, kept, bank = ConditionalRKE(normalize=False), rows(4, 3, 0), rows(5, 3, 1), MemoryBank()
    bank.add(kept)
    pairs = objective.pairs(x, None, bank)
    found = missing_distance(x, x.norm(dim=1, keepdim=True), pairs, 1.2, normalize=False)
    torch.testing.assert_close(found, brute(x, 1.2, kept, torch.ones(4, 4), torch.ones(4, 5), False), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_other_prompts_miss_nothing_and_equal_rows_miss_all(dtype):
    x = rows(1, 6, 0).repeat(3, 1).to(dtype).float()
    t = torch.eye(3)
    size = x.norm(dim=1, keepdim=True)
    assert missing_distance(x, size, ConditionalRKE().pairs(x, t), 0.7).abs().max() < 1e-4
    torch.testing.assert_close(missing_distance(x, size, ConditionalRKE().pairs(x), 0.7), torch.full((3, 1), 0.7))
    assert missing_distance(x[:1], size[:1], ConditionalRKE().pairs(x[:1]), 0.7).item() == 0  # alone
    zeros = torch.zeros(2, 6)
    assert torch.isfinite(missing_distance(zeros, zeros[:, :1], ConditionalRKE().pairs(zeros), 0.7)).all()


def one_step(guide, x):
    """Clean predictions ``[n, d]`` of one step of a bare scheduler, and how the guide moved them."""
    scheduler = DDIMScheduler(500, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(2)
    t, e = scheduler.timesteps[0], torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    before = predict(scheduler, e, t, x).x0
    with guide.attach(scheduler):
        after = scheduler.step(e, t, x).pred_original_sample
    return before.flatten(1).double(), (after.double() - before).flatten(1)


@pytest.mark.parametrize("make", [SPARKE, VendiGuidance])
def test_a_step_makes_up_a_share_of_what_is_missing(make):
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x0, move = one_step(make(scale=0.6, apart=1.25), x)
    u = normalize_rows(x0)
    near = torch.cdist(u, u).fill_diagonal_(math.inf).amin(1)
    expected = 0.6 * (1.25 - near).clamp_min(0)
    torch.testing.assert_close(move.norm(dim=1) / x0.norm(dim=1), expected, atol=1e-4, rtol=1e-3)
    assert 0 < (expected > 0).sum() < 5
    assert move[expected == 0].abs().max() < 1e-5


def test_an_image_of_memory_is_moved_away_from_and_a_different_one_is_not():
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    guide = SPARKE(apart=0.5)
    x0, move = one_step(guide, x)
    assert move.abs().max() < 1e-5  # nothing to differ from
    for kept, moved in ((x0.view(x.shape), True), (-x0.view(x.shape), False)):
        guide = SPARKE(apart=0.5)
        guide.memory.add(kept.float())
        assert (one_step(guide, x)[1].norm() > 0.1) == moved


def test_points_of_few_numbers_part_too():
    x0, move = one_step(VendiGuidance(0.5, apart=0.8), torch.randn(5, 1, 1, 2, generator=torch.Generator().manual_seed(0)))
    near = (torch.cdist(x0, x0) / x0.norm(dim=1).square().mean().sqrt()).fill_diagonal_(math.inf).amin(1)
    expected = 0.5 * (0.8 - near).clamp_min(0)
    torch.testing.assert_close(move.norm(dim=1) / x0.norm(dim=1), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SPARKE(apart=0.8, variety=50), "unit 'spread'"),
        (lambda: SPARKE(apart=0.8, target="6 of 8"), "unit 'spread'"),
        (lambda: SPARKE(space="pooled", apart=0.8), "space='x0', got 'pooled'"),
        (lambda: SPARKE(space="latents", apart=0.8), "space='x0', got 'latents'"),
        (lambda: SPARKE(memory=CentroidMemory(4), apart=0.8), "CentroidMemory"),
        (lambda: MMDGuidance(torch.ones(3, 8), apart=0.8), "MMD"),
        (lambda: SPARKE(apart=0), "distance above 0"),
        (lambda: SPARKE(apart="far"), "distance above 0"),
        (lambda: SPARKE(apart=math.inf), "distance above 0"),
        (
            lambda: SPARKE(
                apart=0.8,
                feature_map=RandomFourierFeatures(GaussianKernel(1.0), 16, 8),
                prompt_feature_map=RandomFourierFeatures(GaussianKernel(0.35), 16, 8),
            ),
            "RandomFeatureMemory",
        ),
    ],
)
def test_where_it_cannot_act_it_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_preset_settings_are_saved_and_shown(tmp_path):
    guide = SPARKE.preset("faithful")
    assert guide.terms[0].transforms == ("tangent", "off_score", "rescale")
    guide.save_config(tmp_path)
    loaded = KernelGuidance.from_config(tmp_path)
    assert (loaded.terms[0].apart, loaded.terms[0].transforms) == (guide.terms[0].apart, guide.terms[0].transforms)
    assert loaded.terms[0].own_transforms is False
    assert f"apart={guide.terms[0].apart:g}" in repr(guide)
    assert "transforms" not in repr(guide)
    own = VendiGuidance(apart=0.8, transforms=("tangent", "off_score", "rescale"))
    own.save_config(tmp_path)
    assert KernelGuidance.from_config(tmp_path).terms[0].own_transforms is True


def test_the_report_names_what_to_change():
    x = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    guide = SPARKE(apart=1.6)
    one_step(guide, x)
    assert "apart, now 1.6" in str(guide.report())
    guide = SPARKE(apart=1e-3)
    one_step(guide, x)
    assert "Nothing moved: the images of each prompt differ as much already as apart= asks for" in str(guide.report())
    guide = SPARKE(scale=0, apart=1.6)
    one_step(guide, x)
    assert "scale is 0" in str(guide.report())
