import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.start import greedy_choice
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import RKE, ConditionalRKE, Vendi
from tests import tiny
from tests.emoji import generators, sample_latents


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("objective", [RKE(), RKE(kernel=GaussianKernel(0.4)), Vendi(order=0.5)], ids=str)
def test_each_candidate_raises_the_objective_most_given_those_before(objective, g):
    rows = unit(torch.randn(4, 3, 5, generator=g, dtype=torch.float64))
    chosen = greedy_choice(objective, rows)
    assert chosen[0] == 0  # alone all are equal
    fitted = objective.fit(rows.flatten(0, 1))
    for i in range(1, 3):
        before = torch.stack([rows[chosen[k], k] for k in range(i)])
        values = [float(fitted.value(torch.cat([before, rows[c, i : i + 1]]))) for c in range(4)]
        assert int(chosen[i]) == max(range(4), key=values.__getitem__)


def test_a_memory_repels_and_other_prompts_do_not():
    x = torch.eye(4, dtype=torch.float64)
    rows = torch.stack([x[:2], x[2:]])  # two candidates of two images
    objective = ConditionalRKE(kernel=GaussianKernel(0.5), prompt_kernel=GaussianKernel(0.05))
    bank, prompts = MemoryBank(), torch.eye(2, dtype=torch.float64)
    bank.add(x[:1], prompts[:1])
    assert greedy_choice(objective, rows, prompts, bank).tolist() == [1, 0]
    same = torch.stack([x[:1].expand(2, -1), x[2:]])
    assert greedy_choice(objective, same, prompts).tolist() == [0, 0]
    assert greedy_choice(objective, same, prompts[:1].expand(2, -1)).tolist() == [0, 1]


def test_an_open_bandwidth_is_set_once_for_all_candidates(g):
    x = unit(torch.randn(20, 6, generator=g))
    for objective in (RKE(), Vendi()):
        fitted = objective.fit(x)
        assert not fitted.kernel.open
        assert float(objective.value(x)) == pytest.approx(float(fitted.value(x)), rel=1e-5)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline", "WanPipeline"])
def test_the_call_runs_from_chosen_noises(name):
    """In one step without guidance each result is what a plain call makes of the chosen noise."""
    pipe, guide = tiny.build(name), SPARKE(0.0)
    each = "num_videos_per_prompt" if name == "WanPipeline" else "num_images_per_prompt"
    settings = tiny.call_kwargs(pipe, prompt="a red heart", num_inference_steps=1, **{each: 3})
    plain = first(pipe(**{**settings, "generator": torch.Generator().manual_seed(0)}))
    settings["generator"] = torch.Generator().manual_seed(0)
    found = guide.choose_start(pipe, candidates=3, **settings)
    again = SPARKE(0.0).choose_start(pipe, candidates=3, **settings)
    result = first(found.result)
    assert torch.equal(first(again.result), result)  # the generator did not advance
    assert found.extra_calls == 3
    assert found.chosen.tolist()[0] == 0
    assert len(found.chosen) == len(guide.memory) == 3
    assert [torch.equal(a, b) for a, b in zip(result, plain, strict=True)] == (found.chosen == 0).tolist()
    assert "3 candidates an image, 3 extra" in repr(found)
    assert torch.equal(first(pipe(**{**settings, "generator": torch.Generator().manual_seed(0)})), plain)


def first(result):
    return torch.as_tensor(result[0] if not hasattr(result, "images") else result.images)


def test_one_candidate_is_an_ordinary_call(pipe):
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 2, "output_type": "latent"}
    guide = SPARKE(1.0)
    found = guide.choose_start(pipe, "heart", candidates=1, generator=generators(2), **settings)
    with SPARKE(1.0).attach(pipe):
        expected = pipe("heart", generator=generators(2), **settings).images
    assert torch.equal(found.result.images, expected)
    assert (found.extra_calls, found.chosen.tolist()) == (0, [0, 0])


def test_images_made_one_by_one_differ_more_with_a_memory(pipe):
    """Each from the one of three noises whose prediction, here the result, the memory repels least."""
    from kspec_guidance import functional as F

    scores = []
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    for candidates in (1, 3):
        guide = SPARKE(0.0)
        for seed in range(4):
            guide.choose_start(pipe, "heart", candidates=candidates, generator=generators(1, seed), **settings)
        assert len(guide.memory) == 4
        scores.append(float(F.rke_score(unit(guide.memory.x), GaussianKernel(0.5))))
    assert scores[1] > scores[0]


def test_within_attach_and_with_spaces_of_blocks_beside():
    pipe = tiny.build("FluxPipeline")
    guide = SPARKE(1.0, stop=1.0) + SPARKE(1.0, space="block", stop=1.0)
    with guide.attach(pipe):
        found = guide.choose_start(pipe, candidates=2, **tiny.call_kwargs(pipe, prompt="a red heart"))
        assert found.report.steps_guided == 4
    assert not any(m._forward_hooks for m in pipe.transformer.modules())
    assert "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates must be an integer of at least 1, got 0"),
        ({"latents": torch.zeros(1)}, "draws the noises itself: leave latents= out"),
    ],
)
def test_wrong_arguments_are_refused(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        SPARKE().choose_start(pipe, "heart", **settings)


def test_spaces_and_pipelines_without_such_predictions_are_refused(pipe):
    with pytest.raises(ValueError, match="space='activations' differ from step to step"):
        SPARKE(space="activations").choose_start(pipe, "heart")
    with pytest.raises(ValueError, match="which DDPMPipeline has not; choose"):
        SPARKE().choose_start(tiny.build("DDPMPipeline"))
    assert sample_latents(pipe).isfinite().all()
