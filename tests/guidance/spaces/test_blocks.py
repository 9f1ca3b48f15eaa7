import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance
from kspec_guidance.guidance import Term
from kspec_guidance.guidance.run import Run
from kspec_guidance.guidance.spaces import Block, Context
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.loop.blocks import Tokens, hook_block, transformer_blocks
from kspec_guidance.loop.context import CallContext, ComingStep
from kspec_guidance.objectives import RKE
from tests import tiny
from tests.tiny.models import build_model

# name: class and settings of a denoiser with a block whose text tokens a further one reads
FAMILIES = {
    "FluxPipeline": {},
    "StableDiffusion3Pipeline": {"transformer": ("SD3Transformer2DModel", {"num_layers": 3})},
    "QwenImagePipeline": {"transformer": ("QwenImageTransformer2DModel", {"num_layers": 3})},
    "ZImagePipeline": {},
    "PixArtSigmaPipeline": {},
    "SanaPipeline": {},
    "WanPipeline": {},
}
WITH_TEXT = ("FluxPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline")
_built = {}


def built(name):
    """The same pipeline in all tests: they leave it as it was."""
    if name not in _built:
        parts = {part: build_model(cls, **settings) for part, (cls, settings) in FAMILIES[name].items()}
        _built[name] = tiny.build(name, **parts)
    return _built[name]


def run(pipe, **settings):
    each = "num_videos_per_prompt" if type(pipe).__name__ == "WanPipeline" else "num_images_per_prompt"
    given = {"prompt": "a red heart", each: 3, "num_inference_steps": 2, **settings}
    found = pipe(**tiny.call_kwargs(pipe, **given))
    return torch.as_tensor(found[0] if not hasattr(found, "images") else found.images)


CASES = [(name, "block") for name in FAMILIES] + [(name, "context") for name in WITH_TEXT]


@pytest.mark.parametrize(("name", "space"), CASES)
def test_space_guides_uses_its_memory_and_is_removed(name, space):
    pipe, guide = built(name), SPARKE(1.0, space=space, stop=1.0)
    plain = run(pipe)
    with SPARKE(0.0, space=space).attach(pipe):
        assert torch.equal(run(pipe), plain)
    with guide.attach(pipe):
        moved, again = run(pipe), run(pipe)
    assert moved.isfinite().all()
    assert not torch.equal(moved, plain)
    assert not torch.equal(again, moved)  # the memory of the first call repels the second
    assert len(guide.memory) == 6
    assert guide.memory.shape[0] == guide.report().steps_guided == 2
    assert guide.report().seconds > 0
    assert "of the hidden states" in str(guide.report())
    assert torch.equal(run(pipe), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


@pytest.mark.parametrize("space", [Block("transformer_blocks.0"), Context("transformer_blocks.0")], ids=str)
def test_move_is_the_gradient_of_the_objective_in_the_tokens(space, g):
    """The mean of l tokens has the gradient of each of them, l times."""
    objective = RKE(kernel=GaussianKernel(0.8))
    guide = KernelGuidance(objective, 0.5, space, transforms=("plain",))
    handler, transformer = Run(guide), build_model("FluxTransformer2DModel")
    (block,) = handler.blocks(transformer)
    image, text = (torch.randn(6, length, 8, generator=g, dtype=torch.float64) for length in (5, 7))
    tokens, rows = Tokens(image, text, lambda x: x), slice(3, 6)
    changed = handler.inside(block, tokens, ComingStep(CallContext(), None, 0, 2, rows))
    before = space.tokens_of(tokens)
    after = changed[0] if type(space) is Block else changed[1]
    leaf = before[rows].clone().requires_grad_()
    u = torch.nn.functional.normalize(leaf.mean(1), dim=1)
    (expected,) = torch.autograd.grad(objective.value(u), leaf)
    assert torch.allclose(after[rows] - before[rows], 0.5 * before.shape[1] * expected, atol=1e-12)
    assert torch.equal(after[:3], before[:3])  # without the prompt
    assert torch.equal(*((changed[1], text) if type(space) is Block else (changed[0], image)))


@pytest.mark.parametrize(
    ("name", "cfg", "moved_rows"),
    [
        ("StableDiffusion3Pipeline", {"guidance_scale": 4.0}, [[False] * 3 + [True] * 3]),  # one call
        ("ZImagePipeline", {"guidance_scale": 4.0}, [[True] * 3 + [False] * 3]),
        ("QwenImagePipeline", {"true_cfg_scale": 4.0, "negative_prompt": "blur"}, [[True] * 3, [False] * 3]),
        ("StableDiffusion3Pipeline", {"guidance_scale": 1.0}, [[True] * 3]),
    ],
)
def test_rows_with_the_prompt_move(name, cfg, moved_rows):
    pipe = built(name)
    (where,) = [b for b in transformer_blocks(pipe.transformer) if b.name == Block().block_of(pipe.transformer).name]
    found, cond = [], []

    def seen(into):
        def note(block, tokens):
            into.append(tokens.image.float().flatten(1).clone())

        return hook_block(where, note)

    guide, before, after = SPARKE(1.0, space="block", stop=1.0), [], []
    first = seen(before)  # hooks run in the order in which they are made
    with guide.attach(pipe):
        last = seen(after)
        run(pipe, num_inference_steps=1, **cfg)
        last.remove()
    first.remove()
    found = [(a != b).any(1).tolist() for a, b in zip(before, after, strict=True)]
    assert found == moved_rows
    with KernelGuidance(RKE(), 0.5, ease_cfg=1.0).attach(pipe) as easing:  # which half is conditional, from the outputs
        original = Run.output

        def output(self, *given):
            result = original(self, *given)
            if self._cfg is not None:
                outputs = torch.cat([torch.stack(list(o[0])).flatten(1) for o in given[2].denoiser_call.outputs])
                same = [float((half.abs() - self._cfg.cond.flatten(1).abs()).norm()) for half in outputs.chunk(2)]
                cond.append(same[0] < same[1])
            return result

        easing._run.output = output.__get__(easing._run)
        run(pipe, num_inference_steps=1, **cfg)
    assert cond == ([] if sum(map(len, moved_rows)) == 3 else [moved_rows[0][0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_inference_mode(dtype):
    pipe, guide = tiny.build("FluxPipeline").to(dtype=dtype), SPARKE(1.0, space="block", stop=1.0)
    with torch.inference_mode():
        plain = run(pipe)
        with (guide + SPARKE(0.5, space="context", stop=1.0)).attach(pipe) as both:
            moved = run(pipe)
    assert moved.isfinite().all()
    assert not torch.equal(moved, plain)
    assert [len(m) for m in both.memories] == [3, 3]
    assert both.memory.x.dtype == torch.float32


def test_blocks_and_predictions_are_guided_in_one_pass():
    pipe = built("FluxPipeline")
    both = SPARKE(1.0, space="block", stop=1.0) + SPARKE(1.0, stop=1.0)
    with both.attach(pipe):
        run(pipe)
    assert both.report().steps_guided == 2
    assert len(both.report().moves) == 4


def test_callback_guides_from_the_second_step_on():
    pipe, guide = built("FluxPipeline"), SPARKE(1.0, space="block", stop=1.0)
    plain = run(pipe)
    with pytest.warns(UserWarning, match="prompts of this call of FluxPipeline cannot be read"):
        assert not torch.equal(run(pipe, callback_on_step_end=guide), plain)
    assert [s.step for s in guide.report().steps] == [1]
    assert torch.equal(run(pipe), plain)


def test_comparison_runs_plainly_first():
    pipe, guide = built("FluxPipeline"), SPARKE(1.0, space="block", stop=1.0)
    found = guide.compare(pipe, **tiny.call_kwargs(pipe, prompt="a red heart", output_type="np"))
    assert found.report.steps_guided == 4
    assert found.report.plain is not None


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda net: net.enable_cache(tiny_cache()), r"a cache skips blocks \(here .*\); call denoiser.disable_cache"),
        (
            lambda net: setattr(net, "_compiled_call_impl", net._call_impl),
            "has a compiled denoiser, whose blocks cannot be reached",
        ),
        (lambda net: setattr(net, "_parallel_config", object()), "needs all tokens in one process"),
    ],
)
def test_denoisers_whose_blocks_are_not_run_as_written_are_refused(prepare, message):
    pipe, guide = tiny.build("FluxPipeline"), SPARKE(space="block")
    prepare(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        guide.attach(pipe)
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


def tiny_cache():
    import diffusers

    return diffusers.FirstBlockCacheConfig(threshold=0.1)


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("StableDiffusionPipeline", Block(), r"is for transformers: UNet2DConditionModel .* choose space='activations'"),
        ("PixArtSigmaPipeline", Context(), "and PixArtTransformer2DModel has none; choose space='block'"),
        ("FluxPipeline", Block("blocks.7"), r"has no block 'blocks.7' in .*; it has transformer_blocks.0, single"),
    ],
)
def test_networks_without_such_a_block_are_refused(name, space, message):
    with pytest.raises(ValueError, match=message):
        SPARKE(space=space).attach(built(name) if name in FAMILIES else tiny.build(name))


def test_a_guide_that_sees_no_denoiser_says_so():
    pipe, guide = built("FluxPipeline"), SPARKE(space="block")
    with guide.attach(pipe.scheduler), pytest.raises(ValueError, match="no such call was seen"):
        run(pipe)


def test_settings_that_need_a_prediction_are_refused():
    with pytest.raises(ValueError, match="a target limits moves of predictions"):
        SPARKE(target="2 of 3", space="block")
    with pytest.raises(ValueError, match="keep_prompt is for moves of predictions"):
        Term(RKE(), 1.0, "context", transforms=("keep_prompt", "bound"))


def test_settings_are_saved():
    config, tensors = SPARKE(space=Context("transformer_blocks.0")).to_config()
    term = KernelGuidance.from_config(config, tensors).terms[0]
    assert (term.space, term.transforms) == (Context("transformer_blocks.0"), ("tangent", "bound", "fade"))
