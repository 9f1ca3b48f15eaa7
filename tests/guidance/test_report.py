"""The report counts different images among finished samples, and says in words what happened and what to change."""

import json
from types import SimpleNamespace

import pytest
import torch

from kspec_guidance import SPARKE, MemoryBank, MMDGuidance
from kspec_guidance import functional as F
from kspec_guidance.guidance import GuidanceReport
from kspec_guidance.guidance.spaces import Embedder
from kspec_guidance.kernels import IMAGE_BANDWIDTH, CosineKernel, GaussianKernel
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.statistics import jackknife
from tests import schedulers
from tests.emoji import sample_latents
from tests.mixture import GaussianMixture, denoise

KERNEL = GaussianKernel(IMAGE_BANDWIDTH)
REFERENCE = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def unit(x):
    return torch.nn.functional.normalize(x.flatten(1).double(), dim=1)


def finished(x, prompts=None, prompted=True, plain=None):
    """The report of a run with these samples."""
    report = GuidanceReport(total_steps=10)
    call = SimpleNamespace(prompted=prompted)
    report.context = SimpleNamespace(prompts=prompts, call=call, time=SimpleNamespace(seconds=0.0))
    report.finished, report.finished_plain = x, plain
    return report


def moved(x, size, scale=1.0, **settings):
    """The same, after one step with a move of this relative size."""
    report = finished(x, **settings)
    report.moves, report.strengths = [(0, torch.full((len(x),), size), 1.0)], [("scale", scale)]
    return report


def run_mixture(guide, n=8, steps=12):
    scheduler = schedulers.make("DDIM")
    with guide.attach(scheduler):
        return denoise(GaussianMixture(), scheduler, n, steps, 0)


# -- figures ---------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_finished_samples(g):
    guide = SPARKE(3.0)
    x = run_mixture(guide)
    report = guide.report()
    assert report.guided == pytest.approx(float(F.rke_score(unit(x), KERNEL)), abs=1e-6)
    expected = jackknife(lambda rows: F.rke_score(rows, KERNEL), unit(x))
    assert report.guided_interval == pytest.approx((max(expected.low, 1), min(expected.high, 8)), abs=1e-5)
    assert (report.plain, report.plain_interval) == (None, None)


def test_copies_count_as_one_image_and_unrelated_images_as_many():
    assert finished(torch.ones(5, 2, 3)).guided == pytest.approx(1)
    assert finished(torch.eye(6) * 7).guided == pytest.approx(6, rel=0.01)
    assert finished(torch.eye(6)[:1]).guided is None
    assert finished(torch.eye(6)[:3]).guided_interval is None
    low, high = finished(torch.eye(6)).guided_interval
    assert 1 <= low <= high <= 6


def test_images_of_different_prompts_are_not_compared(g):
    x, t = torch.randn(7, 20, generator=g), torch.eye(3)[[0, 1, 0, 1, 2, 0, 1]]
    report = finished(x, t)
    each = [float(F.rke_score(unit(x[t[:, k] == 1]), KERNEL)) for k in (0, 1)]  # the third has a single image
    assert report.prompts == 3
    assert report.guided == pytest.approx(sum(each) / 2)
    conditional = F.conditional_rke_score(unit(x[t[:, 2] == 0]), t[t[:, 2] == 0], KERNEL, CosineKernel())
    assert float(conditional) == pytest.approx(2 / sum(1 / score for score in each))  # the harmonic mean
    assert report.guided_interval is None
    assert finished(x[:3], torch.eye(3)).guided is None
    assert finished(x, None).guided == pytest.approx(float(F.rke_score(unit(x), KERNEL)))


def test_prompt_features_that_differ_by_rounding_are_of_one_prompt(g):
    t = unit(torch.randn(1, 64, generator=g)).expand(4, -1).bfloat16().float()
    t = t + 2e-4 * torch.randn(4, 64, generator=g)
    x = torch.randn(4, 8, generator=g)
    assert finished(x, t).prompts == 1


def test_interval_of_several_prompts_is_narrower_than_that_of_one(g):
    x = torch.randn(60, 3, generator=g)
    widths = []
    for prompts in (1, 10):
        report = finished(x[: 6 * prompts], torch.eye(10)[torch.arange(6 * prompts) // 6])
        low, high = report.guided_interval
        assert low < report.guided < high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_half_precision_and_samples_of_any_shape_are_counted(g):
    x = torch.randn(4, 3, 2, 5, 5, generator=g)
    for dtype in (torch.float16, torch.bfloat16):
        assert finished(x.to(dtype)).guided == pytest.approx(finished(x.to(dtype).float()).guided, abs=1e-6)


def test_dictionary_is_json_and_keeps_unknown_figures_as_none():
    guide = SPARKE(1.0)
    run_mixture(guide, n=2)
    found = json.loads(json.dumps(guide.report().to_dict()))
    assert found["plain"] is None
    assert found["guided_interval"] is None
    assert (found["images"], found["prompts"], found["steps_guided"], found["total_steps"]) == (2, 1, 8, 12)
    assert guide.report().as_dict() == guide.report().to_dict()


@pytest.mark.slow
def test_number_of_different_hearts_rises_with_the_scale(pipe):
    found = []
    for scale in (0.0, 0.5, 1.0, 3.0):
        guide = SPARKE(scale)
        z = sample_latents(pipe, n=8, steps=12, guide=guide, guidance_scale=7.5)
        found.append(guide.report().guided)
        assert found[-1] == pytest.approx(float(F.rke_score(unit(z), KERNEL)), abs=1e-6)
    assert found == sorted(found)
    assert found[2] > found[0] + 1.5


def test_a_single_image_is_counted_among_the_earlier_ones_of_its_prompt(pipe):
    guide, hearts = SPARKE(1.0), []
    for seed in range(4):
        for prompt in ("heart", "house"):
            z = sample_latents(pipe, prompt, n=1, guide=guide, generator=[torch.Generator().manual_seed(seed)])
            if prompt == "heart":
                hearts.append(z[0])
                report = guide.report()
    assert report.earlier_images == 3
    assert report.guided is None
    assert report.with_earlier == pytest.approx(float(F.rke_score(unit(torch.stack(hearts)), KERNEL)), abs=1e-5)
    assert report.earlier_alone == pytest.approx(float(F.rke_score(unit(torch.stack(hearts[:3])), KERNEL)), abs=1e-5)
    assert f"with 3 earlier images of its prompt it looks like {report.with_earlier:.1f} different ones" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["earlier_images"] == 3
    sample_latents(pipe, n=2, guide=guide)
    assert guide.report().earlier_images == 0  # images of one call are compared with each other
    assert guide.report().to_dict()["with_earlier"] is None


@pytest.mark.parametrize("settings", [{"space": "pooled"}, {"memory": CentroidMemory()}])
def test_a_memory_without_samples_as_they_are_has_none_to_count(settings):
    guide = SPARKE(1.0, **settings)
    for _ in range(2):
        run_mixture(guide, n=1)
    assert guide.report().earlier_images == 0
    assert "from two images on" in str(guide.report())


def test_without_prompts_all_earlier_images_count_and_of_very_many_the_newest(monkeypatch):
    guide = SPARKE(1.0)
    for _ in range(4):
        run_mixture(guide, n=1)
    assert guide.report().earlier_images == 3
    assert "with 3 earlier images it looks like" in str(guide.report())
    monkeypatch.setattr("kspec_guidance.guidance.report.EARLIER_IMAGES", 2)
    run_mixture(guide, n=1)
    assert torch.equal(guide.report().earlier, guide.memory.newest(3)[0][:2])


def test_published_steps_are_reported():
    guide = SPARKE.published(0.1, every=2)
    run_mixture(guide)
    assert "noisy sample" in str(guide.report())
    assert "weak" not in str(guide.report())


# -- words -----------------------------------------------------------------------------------------------------------------


def test_text_has_few_lines_and_the_table_is_separate():
    guide = SPARKE(1.0)
    run_mixture(guide)
    text = str(guide.report())
    assert len(text.splitlines()) <= 4
    assert "These 8 images look like" in text
    assert "Guided 8 of 12 steps" in text
    assert "guide.compare(pipe" in text
    assert len(guide.report().table().splitlines()) == 9


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0.01, ("too weak to see", "raise scale, now 1, to about 4")),
        (0.05, ("weak", "raise scale, now 1, to about 4")),
        (0.2, ("moderate", "lower scale, now 1; for a larger effect, raise it")),
        (0.6, ("strong", "lower scale, now 1")),
        (0.9, ("off the scale", "nearly as large as the images", "lower scale, now 1, to about 0.2")),
        (20.0, ("20 times the norm", "larger than the images", "lower scale, now 1, to about 0.01")),
    ],
)
def test_size_of_the_move_is_said_in_words_with_what_to_do(size, words, g):
    text = str(moved(torch.randn(4, 9, generator=g), size))
    for expected in words:
        assert expected in text


def test_runs_without_effect_say_why():
    idle, outside, alone = SPARKE(0.0), SPARKE(1.0, sigma_interval=(1e6, 1e7)), SPARKE(1.0)
    for guide, n in ((idle, 3), (outside, 3), (alone, 1)):
        run_mixture(guide, n=n)
    assert "no step of 12, since scale is 0" in str(idle.report())
    assert "no step lies between start= and stop=" in str(outside.report())
    assert "one image and an empty memory" in str(alone.report())
    run_mixture(alone, n=1)
    assert "Nothing moved" not in str(alone.report())  # the memory holds an image now
    assert "no two images have related prompts" in str(moved(torch.eye(3), 0.0, prompts=torch.eye(3)))


def test_unknown_prompts_are_pointed_out():
    assert "prompts are unknown" in str(moved(torch.eye(3), 0.1))
    assert "prompts are unknown" not in str(moved(torch.eye(3), 0.1, prompted=False))
    assert "prompts are unknown" not in str(moved(torch.eye(3), 0.1, prompts=torch.ones(3, 1)))


def test_plain_figure_beside_the_guided_one_is_judged_by_their_difference(g):
    same, other = torch.randn(1, 30, generator=g) + 0.02 * torch.randn(8, 30, generator=g), torch.randn(8, 30, generator=g)
    more = moved(other, 0.2, plain=same)
    assert more.plain == pytest.approx(float(F.rke_score(unit(same), KERNEL)))
    assert "without guidance, from the same noise, 1.0 [1.0, 1.0]. Clearly more." in str(more)
    assert "Clearly fewer." in str(moved(same, 0.2, plain=other))
    assert "No clear change." in str(moved(other, 0.2, plain=other))
    little = same.mean(0) + 1.2 * (same - same.mean(0))  # certainly more varied, by less than anyone would see
    assert "[1.0, 1.0]. Slightly more: +0." in str(moved(little, 0.2, plain=same))
    assert "nearly all differ already" in str(moved(other, 0.2, plain=other))
    assert "guide.compare" not in str(more)
    assert "Clearly" not in str(moved(other[:3], 0.2, plain=same[:3]))  # too few for an interval


def test_report_before_and_during_a_run():
    guide = SPARKE()
    assert "No run yet" in str(guide.report())
    assert guide.report().to_dict()["guided"] is None
    unfinished = moved(torch.ones(2, 3), 0.1)
    unfinished.finished = None
    assert "has not ended" in str(unfinished)


def test_repr_of_a_report_is_one_line():
    guide = SPARKE()
    assert "\n" not in repr(guide.report())
    run_mixture(guide, n=3)
    assert "\n" not in repr(guide.report())
    assert f"guided={guide.report().guided:.3g}, plain=None" in repr(guide.report())


# -- repr of guides --------------------------------------------------------------------------------------------------------


def test_repr_of_a_guide_has_its_changed_settings_memory_and_pipeline():
    assert repr(SPARKE()) == "SPARKE(ConditionalRKE, variety=50, stop=0.65; MemoryBank with 0 entries; not attached)"
    text = repr(SPARKE(0.5, kernel=GaussianKernel(0.3), every=2, space="pooled"))
    for part in ("scale=0.5", "kernel=GaussianKernel(bandwidth=0.3)", "every=2", "space=Pooled("):
        assert part in text
    combined = repr(SPARKE(0.5) + MMDGuidance(REFERENCE, 0.7))
    assert "ConditionalRKE, scale=0.5" in combined
    assert "MMD, scale=0.7" in combined
    assert "reference=Tensor[5, 4, 8, 8]" in combined
    guide, scheduler = SPARKE(memory=MemoryBank()), schedulers.make("DDIM")
    guide.memory.add(torch.ones(2, 4))
    with guide.attach(scheduler):
        assert repr(guide).endswith("MemoryBank with 2 entries; attached to DDIMScheduler)")


def test_advice_names_the_dial_that_the_guide_has():
    report = GuidanceReport()
    report.strengths, report.moves = [("variety", 80.0)], [(0, torch.full((2,), 0.05), 1.0)]
    assert any("raise variety, now 80, to 100, or set a scale" in line for line in report._advice([], []))
    report.strengths = [("variety", 10.0)]
    assert any("raise variety, now 10, to about 40" in line for line in report._advice([], []))


def test_repr_of_a_guide_with_a_network_is_one_short_line():
    network = torch.nn.Sequential(*[torch.nn.Linear(2, 2)] * 20)
    text = repr(SPARKE(space=Embedder(embedder=network)))
    assert "space=Embedder(...)" in text
    assert "\n" not in text
    assert len(text) < 200
