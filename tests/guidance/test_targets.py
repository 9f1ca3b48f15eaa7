"""A target raises the variety of each prompt from call to call until its images are as different, and a guard stops it."""

import json
from types import SimpleNamespace

import pytest
import torch

from kspec_guidance import SPARKE, MMDGuidance
from kspec_guidance.guidance import KernelGuidance, Term, VarietyTarget
from kspec_guidance.guidance.targets import FIRST, KEPT_PROMPTS, LARGEST, LARGEST_MOVE, SKETCH, STEP, _sketch
from kspec_guidance.loop.context import CallContext
from kspec_guidance.objectives import RKE
from tests import schedulers
from tests.emoji import generators, sample_latents
from tests.mixture import GaussianMixture, denoise

T = torch.eye(8)  # features of unrelated prompts


def context(prompts=None, texts=None, pipe=None):
    return SimpleNamespace(prompts=prompts, call=CallContext(pipe=pipe, texts=texts))


def alike_rows(n, cosine, seed=0, d=600):
    """Rows ``[n, d]`` of norm 1, of which two have about this cosine."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(1, d, generator=torch.Generator().manual_seed(99))
    return cosine**0.5 * common + (1 - cosine) ** 0.5 * torch.randn(n, d, generator=g)


def tell(target, samples, move=0.05, prompts=None, texts=None, pipe=None):
    """A run of the target's strengths that ends with these samples."""
    about = context(prompts, texts, pipe)
    used = target.varieties(about, len(samples))
    return used, target.observe(samples, [torch.full((len(samples),), move)], about)


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_a_target_reads_different_of_several():
    target = SPARKE(target="6.5 of 8").target
    assert (target.different, target.of, str(target)) == (6.5, 8, "6.5 of 8")
    assert "target='6.5 of 8'" in repr(SPARKE(target="6.5 of 8"))
    assert SPARKE(target=VarietyTarget(3, 4)).target.of == 4
    assert SPARKE(target="6 of 8").variety is None


@pytest.mark.parametrize(
    "value", ["8 of 8", "1 of 8", "9 of 8", "1 of 1", "6", 6, 0.75, "six of 8", "-6 of 8", True, (6, 8)]
)
def test_other_targets_are_refused(value):
    with pytest.raises(ValueError, match="a target is a"):
        SPARKE(target=value)


def test_one_strength_only():
    for other in ({"variety": 50}, {"scale": 1.0}):
        with pytest.raises(ValueError, match="both set the strength; give one of them"):
            SPARKE(target="6 of 8", **other)
    with pytest.raises(ValueError, match="fidelity= is the guard of a target"):
        SPARKE(fidelity=False)
    with pytest.raises(TypeError, match="fidelity must be a function"):
        SPARKE(target="6 of 8", fidelity=0.3)
    with pytest.raises(ValueError, match="unit 'spread'"):
        Term(RKE(), 1.0, target=VarietyTarget(6, 8))


# -- figures -------------------------------------------------------------------------------------------------------------


def test_different_of_as_many_images_is_what_the_report_counts(pipe):
    guide = SPARKE(target="6 of 8")
    sample_latents(pipe, n=8, guide=guide)
    (found,) = guide.target.prompts
    assert found.different == pytest.approx(guide.report().guided, rel=1e-6)


def test_images_of_later_calls_are_compared_with_earlier_ones():
    rows, one_by_one, at_once = alike_rows(8, 0.8), VarietyTarget(6, 8), VarietyTarget(6, 8)
    for row in rows:
        (found,) = tell(one_by_one, row[None])[1]
    assert found.different == pytest.approx(tell(at_once, rows)[1][0].different, rel=1e-5)
    assert found.images == 8


def test_more_images_do_not_change_what_is_counted():
    few, many = VarietyTarget(6, 8), VarietyTarget(6, 8)
    a, b = (tell(t, alike_rows(n, 0.8))[1][0].different for t, n in ((few, 8), (many, 64)))
    assert a == pytest.approx(b, rel=0.1)


def test_sketches_keep_distances(g):
    x = torch.nn.functional.normalize(torch.randn(6, 3 * SKETCH, generator=g, dtype=torch.float64), dim=1)
    assert _sketch(x).shape == (6, SKETCH)
    assert torch.pdist(_sketch(x)).numpy() == pytest.approx(torch.pdist(x).numpy(), rel=0.1)


def test_only_the_newest_prompts_keep_rows_but_all_keep_their_strength():
    target, n = VarietyTarget(6, 8), KEPT_PROMPTS + 2
    for k in range(n):
        tell(target, alike_rows(4, 0.9, d=6), prompts=torch.nn.functional.one_hot(torch.tensor([k] * 4), n).float())
    assert sum(p.rows is not None for p in target._prompts) == KEPT_PROMPTS
    assert {p.next_variety for p in target.prompts} == {FIRST + STEP}


# -- strengths -----------------------------------------------------------------------------------------------------------


def test_strength_rises_until_the_target_is_reached_and_stays_there():
    target, seen = VarietyTarget(6, 8), []
    for k, cosine in enumerate((0.95, 0.9, 0.2, 0.2, 0.9)):
        used, (found,) = tell(target, alike_rows(4, cosine, seed=k), move=0.01)
        seen.append((used[0], found.status))
    assert [v for v, _ in seen[:3]] == [FIRST, FIRST + STEP, FIRST + 2 * STEP]
    assert all(later[0] == seen[2][0] for later in seen[3:4])
    many = VarietyTarget(3, 8)
    (reached,) = tell(many, alike_rows(8, 0.1))[1]
    assert (reached.status, reached.next_variety) == ("reached", FIRST)


def test_strength_stays_if_only_earlier_images_are_too_alike():
    target = VarietyTarget(6, 8)
    tell(target, alike_rows(8, 0.98))
    _, (found,) = tell(target, torch.randn(8, 600))
    assert (found.status, found.next_variety) == ("not reached", FIRST + STEP)
    assert "only earlier ones are not" in found.reason


def test_a_small_miss_raises_a_little():
    target = VarietyTarget(6, 8)
    miss = next(
        c for c in torch.linspace(0.3, 0.9, 61).tolist() if tell(VarietyTarget(6, 8), alike_rows(16, c))[1][0].different < 6
    )
    (found,) = tell(target, alike_rows(16, miss))[1]
    assert FIRST < found.next_variety < FIRST + STEP


def test_fewer_than_four_images_raise_nothing():
    target = VarietyTarget(6, 8)
    _, (found,) = tell(target, alike_rows(3, 0.99))
    assert (found.status, found.different, found.next_variety) == ("too few images", None, FIRST)
    assert "too few to tell" in target.describe(found)


def test_the_largest_variety_is_the_end():
    target = VarietyTarget(6, 8)
    for k in range(6):
        _, (found,) = tell(target, alike_rows(4, 0.99, seed=k))
    assert (found.status, found.next_variety, found.reason) == ("stopped", LARGEST, "100 is the largest variety")


def test_each_prompt_has_its_own_strength(pipe):
    guide = SPARKE(target="6 of 8")
    alike, unrelated = T[:1].expand(4, -1), T[1:2].expand(4, -1)
    tell(guide.target, torch.cat([alike_rows(4, 0.95), torch.randn(4, 600)]), prompts=torch.cat([alike, unrelated]))
    used = guide.target.varieties(context(torch.stack([T[0], T[1], T[2], T[0]])), 4)
    assert used == [FIRST + STEP, FIRST, FIRST, FIRST + STEP]


def test_samples_of_one_batch_move_by_the_strength_of_their_prompt():
    """Two prompts with the same samples: the moves of the one that is raised are larger in proportion."""
    found = []
    for raised in (False, True):
        guide = SPARKE(target="6 of 8")
        if raised:
            tell(guide.target, torch.zeros(4, 32) + alike_rows(4, 0.99, d=32))
        scheduler = schedulers.make("DDIM")
        with guide.attach(scheduler):
            denoise(GaussianMixture(), scheduler, 6, 12, 0)
        found.append(guide.report().moves[0][1].mean())
    assert float(found[1] / found[0]) == pytest.approx((FIRST + STEP) / FIRST, rel=1e-5)


def test_the_first_call_is_that_of_the_same_variety(pipe):
    assert torch.equal(
        sample_latents(pipe, guide=SPARKE(target="6 of 8")), sample_latents(pipe, guide=SPARKE(variety=FIRST))
    )


def run(pipe, guide, first, last):
    """Latents of calls ``first`` to ``last`` of of one prompt alone, and of two at once."""
    out = []
    with guide.attach(pipe):
        for k in range(first, last):
            for prompt in ("heart, twemoji style", ["heart, twemoji style", "person"]):
                n = 4 * (len(prompt) if isinstance(prompt, list) else 1)
                call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
                out.append(pipe(prompt, num_images_per_prompt=4, generator=generators(n, 100 * k), **call).images)
    return torch.cat(out)


def test_saved_in_the_middle_a_guide_goes_on_as_it_would_have(pipe, tmp_path):
    guide, other = SPARKE(target="7 of 8"), SPARKE(target="7 of 8")
    whole = run(pipe, guide, 0, 3)
    run(pipe, other, 0, 1)
    other.save_config(tmp_path)
    again = KernelGuidance.from_config(tmp_path)
    again.terms[0].memory = other.memory
    assert again.target.prompts == other.target.prompts
    assert torch.equal(run(pipe, again, 1, 3), whole[len(whole) // 3 :])
    assert again.target.prompts == guide.target.prompts
    assert max(p.next_variety for p in guide.target.prompts) > FIRST


def test_a_target_in_a_sum_of_guides_works_on(pipe):
    guide = SPARKE(target="7 of 8") + MMDGuidance(torch.randn(4, *sample_latents(pipe, n=1).shape[1:]))
    sample_latents(pipe, n=4, guide=guide)
    assert guide.report().to_dict()["targets"][0]["images"] == 4


def test_plain_runs_of_comparisons_do_not_count(pipe):
    guide = SPARKE(target="7 of 8")
    call = {"num_images_per_prompt": 4, "num_inference_steps": 4, "output_type": "latent"}
    guide.compare(pipe, "heart", **call)
    assert [p.images for p in guide.target.prompts] == [4]


# -- guards --------------------------------------------------------------------------------------------------------------


def test_large_moves_stop_the_rise_and_take_it_back():
    target = VarietyTarget(6, 8)
    tell(target, alike_rows(4, 0.95), move=0.2)
    _, (found,) = tell(target, alike_rows(4, 0.95, seed=1), move=2 * LARGEST_MOVE)
    assert (found.status, found.next_variety) == ("stopped", (FIRST + STEP) / 2)
    assert "moves were 80% of the image" in found.reason
    near = VarietyTarget(6, 8)
    _, (found,) = tell(near, alike_rows(4, 0.95), move=LARGEST_MOVE / 1.2)
    assert found.next_variety == pytest.approx(1.2 * FIRST)
    assert tell(near, alike_rows(4, 0.95, seed=1), move=LARGEST_MOVE)[1][0].status == "stopped"
    free = VarietyTarget(6, 8, fidelity=False)
    assert tell(free, alike_rows(4, 0.95), move=2.0)[1][0].next_variety == FIRST + STEP


def test_prompts_of_unknown_words_stay_at_the_first_strength_and_say_so(pipe):
    guide = SPARKE(target="7 of 8")
    with guide.attach(pipe):
        for seed in range(2):
            pipe(["qwxz blorp", "rocket"], num_images_per_prompt=4, num_inference_steps=4, generator=generators(8, seed))
    unknown, known = guide.report().to_dict()["targets"]
    assert (unknown["prompt"], unknown["status"], unknown["varieties"]) == ("qwxz blorp", "stopped", [FIRST])
    assert known["varieties"] == [FIRST, FIRST + STEP]
    assert "stopped at variety 25: this model has never seen 'qwxz', 'blorp'." in str(guide.report())
    assert json.dumps(guide.report().to_dict())


def test_a_fall_of_fidelity_takes_the_strength_back(pipe):
    seen, scores = [], iter([0.9, 0.9, 0.5, 0.9])

    def fidelity(images, prompts):
        seen.append((images[0].size, prompts))
        return [next_score] * len(images)

    guide = SPARKE(target="7.9 of 8", fidelity=fidelity)
    with guide.attach(pipe):
        for seed, next_score in enumerate(scores):  # noqa: B007, the function reads it
            pipe("heart", num_images_per_prompt=4, num_inference_steps=4, generator=generators(4, seed))
    (found,) = guide.target.prompts
    assert found.status == "stopped"
    assert found.varieties == [FIRST, FIRST + STEP, FIRST + 2 * STEP, FIRST + STEP]
    assert found.reason == "at 75 fidelity fell from 0.9 to 0.5"
    assert found.fidelity == pytest.approx(0.9)
    assert seen[0] == ((64, 64), ["heart"] * 4)


def test_low_fidelity_from_the_start_is_a_prompt_that_the_model_does_not_know(pipe):
    guide = SPARKE(target="7 of 8", fidelity=lambda images, prompts: [0.02 if p == "zzkj" else 0.6 for p in prompts])
    with guide.attach(pipe):
        pipe(["zzkj", "rocket"], num_images_per_prompt=4, num_inference_steps=4, generator=generators(8))
    unknown, known = guide.target.prompts
    assert (unknown.status, unknown.next_variety) == ("stopped", FIRST)
    assert "does not know this prompt" in unknown.reason
    assert known.next_variety == FIRST + STEP


@pytest.mark.parametrize("scores", [[0.5], [2.0] * 4, [float("nan")] * 4])
def test_scores_outside_their_range_are_refused(pipe, scores):
    guide = SPARKE(target="7 of 8", fidelity=lambda images, prompts: scores)
    with pytest.raises(ValueError, match=r"fidelity must return 4 numbers in 0..1"):
        sample_latents(pipe, n=4, steps=2, guide=guide)


def test_unknown_texts_are_said_and_moves_are_limited_instead(pipe):
    embeds, negative = pipe.encode_prompt("heart", "cpu", 1, True)
    guide = SPARKE(target="7 of 8", fidelity=lambda images, prompts: [1.0] * len(images))
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_images_per_prompt": 4}
    with guide.attach(pipe), pytest.warns(UserWarning, match="fidelity= cannot judge these images"):
        pipe(num_inference_steps=2, generator=generators(4), **call)
    assert guide.target.prompts[0].next_variety == FIRST + STEP


def test_functions_cannot_be_saved_and_need_a_pipeline():
    guide = SPARKE(target="7 of 8", fidelity=lambda images, prompts: [1.0] * len(images))
    with pytest.raises(TypeError, match="fidelity= function cannot be saved"):
        guide.to_config()
    scheduler = schedulers.make("DDIM")
    with guide.attach(scheduler), pytest.raises(ValueError, match="has no decoder; attach to a pipeline"):
        denoise(GaussianMixture(), scheduler, 4, 4, 0)
