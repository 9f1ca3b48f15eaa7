import diffusers
import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.start import greedy_choice
from kspec_guidance.integrations.modular import insert_guidance
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import RKE, ConditionalRKE, Vendi
from tests import tiny
from tests.emoji import generators, sample_latents
from tests.tiny import requires_modular


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


MODULAR = ["FluxModularPipeline", "StableDiffusionXLModularPipeline", "LTX2ModularPipeline"]  # the last with sound beside


@pytest.mark.parametrize(
    "name",
    ["FluxPipeline", "StableDiffusionPipeline", "WanPipeline", *(pytest.param(m, marks=requires_modular) for m in MODULAR)],
)
def test_the_call_runs_from_chosen_noises(name):
    """In one step without guidance each result is what a plain call makes of the chosen noise."""
    modular = name in tiny.MODULAR
    pipe, guide = (tiny.build_modular if modular else tiny.build)(name), SPARKE(0.0)
    each = "num_videos_per_prompt" if name.startswith(("Wan", "LTX")) else "num_images_per_prompt"
    call_kwargs = tiny.modular_call_kwargs if modular else tiny.call_kwargs
    settings = call_kwargs(pipe, prompt="a red heart", num_inference_steps=1, **{each: 3})
    plain = first(pipe(**{**settings, "generator": torch.Generator().manual_seed(0)}))
    settings["generator"] = torch.Generator().manual_seed(0)
    found = guide.choose_start(pipe, candidates=3, **settings)
    result = first(found.result)
    assert found.extra_calls == 3
    assert found.chosen.tolist()[0] == 0
    assert len(found.chosen) == len(guide.memory) == 3
    assert [torch.equal(a, b) for a, b in zip(result, plain, strict=True)] == (found.chosen == 0).tolist()
    assert "3 candidates an image, 3 extra" in repr(found)
    assert torch.equal(first(pipe(**{**settings, "generator": torch.Generator().manual_seed(0)})), plain)


def first(result):
    found = getattr(result, "images", None)
    if isinstance(result, diffusers.modular_pipelines.PipelineState):
        found = result.get("images") if result.get("images") is not None else result.get("videos")
    return torch.as_tensor(result[0] if found is None else found)


@requires_modular
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("WanModularPipeline", {"prompt": ["a red heart", "two green cats"]}),
        ("FluxModularPipeline", {"generator": 4}),
    ],
)
def test_modular_pipelines_choose_as_classic_ones_with_the_same_weights(name, call):
    classic, pipe = tiny.build(tiny.MODULAR[name]), tiny.build_modular(name)
    parts = {spec.name for spec in pipe.blocks.expected_components}
    pipe.update_components(**{k: v for k, v in classic.components.items() if v is not None and k in parts})
    settings = tiny.modular_call_kwargs(pipe, **{k: v for k, v in call.items() if k != "generator"})
    of_classic = settings | {"output_type": "latent"} | ({"guidance_scale": 3.5} if "Flux" in name else {})
    guides = SPARKE(1.0, stop=1.0), SPARKE(1.0, stop=1.0)

    def noises():
        return generators(call["generator"]) if "generator" in call else torch.Generator().manual_seed(0)

    found = guides[0].choose_start(pipe, candidates=3, **settings | {"generator": noises()})
    expected = guides[1].choose_start(classic, candidates=3, **of_classic | {"generator": noises()})
    assert found.chosen.tolist() == expected.chosen.tolist()
    assert found.chosen.any()
    assert found.report.steps_guided == expected.report.steps_guided > 0
    torch.testing.assert_close(guides[0].memory.x, guides[1].memory.x)


@requires_modular
def test_modular_pipelines_are_restored_also_after_an_error(monkeypatch):
    pipe = tiny.build_modular("StableDiffusion3ModularPipeline")
    settings, guide = tiny.modular_call_kwargs(pipe, num_inference_steps=1), SPARKE(1.0, stop=1.0)
    guide.choose_start(pipe, candidates=2, **settings)
    assert len(guide.memory) == 4
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", None)
        with pytest.raises(TypeError):
            guide.choose_start(pipe, candidates=2, **settings)
    with monkeypatch.context() as patch:  # in the first candidate
        patch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(RuntimeError):
            guide.choose_start(pipe, candidates=2, **settings)
    for part in (pipe.scheduler, *every_block(vars(pipe)["_blocks"])):
        assert not {"step", "get_block_state"} & vars(part).keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


def every_block(blocks):
    return [blocks, *(found for block in blocks.sub_blocks.values() for found in every_block(block))]


@requires_modular
def test_pipelines_with_a_block_of_guidance_are_guided_once():
    guide, other = SPARKE(1.0, stop=1.0), SPARKE(1.0, stop=1.0)
    pipe = tiny.build_modular("FluxModularPipeline")
    settings = tiny.modular_call_kwargs(pipe)
    expected = guide.choose_start(pipe, candidates=2, **settings)
    blocks = insert_guidance(pipe.blocks, SPARKE(0.0))
    with_block = blocks.init_pipeline()
    with_block.update_components(**pipe.components)
    found = other.choose_start(with_block, candidates=2, **tiny.modular_call_kwargs(pipe))
    assert torch.equal(first(found.result), first(expected.result))
    assert len(other.memory) == 4


@requires_modular
def test_modular_pipelines_that_draw_noises_between_their_steps_are_refused():
    with pytest.raises(ValueError, match="blocks of a loop, and HeliosModularPipeline has neither"):
        SPARKE().choose_start(tiny.build_modular("HeliosModularPipeline"), "a red heart")


def test_one_candidate_is_an_ordinary_call(pipe):
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 2, "output_type": "latent"}
    guide = SPARKE(1.0)
    found = guide.choose_start(pipe, "heart", candidates=1, generator=generators(2), **settings)
    with SPARKE(1.0).attach(pipe):
        expected = pipe("heart", generator=generators(2), **settings).images
    assert torch.equal(found.result.images, expected)
    assert (found.extra_calls, found.chosen.tolist()) == (0, [0, 0])


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("listed", [False, True])
def test_generators_advance_as_by_an_ordinary_call(candidates, listed, pipe):
    """So a loop over one generator has other noises each time."""
    settings = {"num_images_per_prompt": 2, "num_inference_steps": 1, "output_type": "latent"}
    given, same = ([torch.Generator().manual_seed(3)] for _ in range(2))
    given, same = (2 * given, 2 * same) if listed else (given[0], same[0])
    found = [SPARKE(0.0).choose_start(pipe, "heart", candidates=candidates, generator=given, **settings) for _ in range(2)]
    for _ in range(2):
        pipe("heart", generator=same, **settings)
    states = [(g[0] if listed else g).get_state() for g in (given, same)]
    assert torch.equal(*states)
    assert not torch.equal(found[0].result.images, found[1].result.images)


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
    with pytest.raises(ValueError, match="and DDPMPipeline has neither; choose"):
        SPARKE().choose_start(tiny.build("DDPMPipeline"))
    assert sample_latents(pipe).isfinite().all()
