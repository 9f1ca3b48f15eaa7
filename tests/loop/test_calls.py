"""Whose call a step belongs to, what aborted calls leave behind, and calls whose batch or prompts change on the way."""

import contextlib
import threading
import warnings

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from kspec_guidance import SPARKE, guided, load_demo_pipeline
from tests.emoji import generators, sample_latents
from tests.tiny import build, call_kwargs

STEPS = {"num_inference_steps": 4, "output_type": "latent"}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def two_pipes(pipe):
    """A text-to-image and an image-to-image pipeline with one scheduler."""
    other = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    assert other.scheduler is pipe.scheduler
    return pipe, other


def from_image(pipe, **kwargs):
    settings = {"image": torch.zeros(2, 3, 64, 64), "strength": 0.5, "generator": generators(2)} | STEPS
    return pipe(["runner", "farmer"], **(settings | kwargs)).images


class Callback(PipelineCallback):
    """Calls a function at one step."""

    tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return (self.action(pipeline, callback_kwargs) or callback_kwargs) if step_index == self.step else callback_kwargs


def is_restored(pipe):
    names = ("encode_prompt", "check_inputs", "prepare_latents", "maybe_free_model_hooks")
    return "step" not in vars(pipe.scheduler) and not set(names) & set(vars(pipe))


# -- pipelines that share a scheduler ---------------------------------------------------------------------------------


def test_other_pipeline_with_the_same_scheduler_is_left_alone(two_pipes):
    pipe, other = two_pipes
    plain, guide = from_image(other), SPARKE(1.0)
    with guide.attach(pipe):
        sample_latents(pipe, steps=4)
        with pytest.warns(UserWarning, match="StableDiffusionImg2ImgPipeline shares its scheduler with the guided"):
            assert torch.equal(from_image(other), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            from_image(other)  # the warning is issued once
        sample_latents(pipe, steps=4)
    assert len(guide.memory) == 6
    assert is_restored(pipe)


def test_pipeline_called_from_a_callback_of_another_is_left_alone(two_pipes):
    pipe, other = two_pipes
    other.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        plain, inner = from_image(other), []
        guide, inner_guide = SPARKE(1.0), SPARKE(1.0)
        alone, inner_alone = sample_latents(pipe, guide=SPARKE(1.0), steps=4), None
        with inner_guide.attach(other):
            inner_alone = from_image(other)
        call = Callback(1, lambda p, kw: inner.append(from_image(other)))
        assert torch.equal(sample_latents(pipe, guide=guide, steps=4, callback_on_step_end=call), alone)
        assert torch.equal(inner[0], plain)
        assert len(guide.memory) == 3
        again = SPARKE(1.0)
        with again.attach(other):
            assert torch.equal(sample_latents(pipe, guide=SPARKE(1.0), steps=4, callback_on_step_end=call), alone)
        assert torch.equal(inner[1], inner_alone)
        assert len(again.memory) == 2
    finally:
        other.scheduler = pipe.scheduler


def test_pipeline_called_inside_its_own_guided_call_raises(pipe):
    guide = SPARKE(1.0)
    call = Callback(1, lambda p, kw: sample_latents(p, "cat face", steps=4))
    with pytest.raises(RuntimeError, match="called inside its own guided call"):
        sample_latents(pipe, guide=guide, steps=4, callback_on_step_end=call)
    assert len(guide.memory) == 0
    assert is_restored(pipe)
    sample_latents(pipe, guide=guide, steps=4)  # the aborted call does not matter
    assert len(guide.memory) == 3


def test_combined_pipeline_guides_its_inner_pipeline():
    pipe = build("KandinskyV22CombinedPipeline")
    guide = SPARKE(1.0, stop=1.0)
    with warnings.catch_warnings(), guide.attach(pipe):
        warnings.simplefilter("error", UserWarning)
        pipe(**call_kwargs(pipe))
    assert guide.report().steps_guided > 0


# -- one guide and several pipelines ----------------------------------------------------------------------------------


def test_one_guide_on_two_pipelines_raises(two_pipes):
    pipe, other = two_pipes
    guide = SPARKE(1.0)
    with guide.attach(pipe):
        with pytest.raises(ValueError, match="attached to a StableDiffusionPipeline; detach"):
            guide.attach(other)
        with pytest.raises(ValueError, match="attached to a StableDiffusionPipeline; detach"):
            from_image(other, callback_on_step_end=guide)
        sample_latents(pipe, steps=4)
    assert len(guide.memory) == 3
    assert is_restored(pipe)


def test_callback_guide_in_a_nested_call_of_another_pipeline_raises(two_pipes):
    pipe, other = two_pipes
    guide = SPARKE(1.0)
    nested = Callback(1, lambda p, kw: from_image(other, callback_on_step_end=guide))
    with pytest.raises(RuntimeError, match="used by a call of a StableDiffusionPipeline in progress"):
        sample_latents(pipe, steps=4, callback_on_step_end=MultiPipelineCallbacks([guide, nested]))
    assert len(guide.memory) == 0
    from_image(other, callback_on_step_end=guide)  # that call is over
    assert len(guide.memory) == 2


def test_outermost_of_nested_blocks_detaches(pipe):
    plain, guide = sample_latents(pipe, steps=4), SPARKE(1.0)
    with guide.attach(pipe):
        with guide.attach(pipe):
            sample_latents(pipe, steps=4)
        assert not torch.equal(sample_latents(pipe, steps=4), plain)
    assert len(guide.memory) == 6
    assert torch.equal(sample_latents(pipe, steps=4), plain)


@pytest.mark.parametrize("way", ["inner block", "detach", "outer block"])
def test_block_that_ends_during_a_call_adds_no_unfinished_samples_to_the_memory(pipe, way):
    plain, alone = sample_latents(pipe, steps=4), sample_latents(pipe, guide=SPARKE(1.0), steps=4)
    guide, block = SPARKE(1.0), contextlib.ExitStack()

    def act(p, kwargs):
        if way == "inner block":
            with guide.attach(p):
                pass
        elif way == "detach":
            guide.detach()
        else:
            block.close()

    with block:
        block.enter_context(guide.attach(pipe))
        found = sample_latents(pipe, steps=4, callback_on_step_end=Callback(1, act))
    assert torch.equal(found, alone) == (way == "inner block")
    assert len(guide.memory) == (3 if way == "inner block" else 0)
    assert torch.equal(sample_latents(pipe, steps=4), plain)


def test_callback_guide_in_two_threads_raises(pipe):
    other, errors = quiet(load_demo_pipeline()), []
    guide, ready, release = SPARKE(1.0), threading.Event(), threading.Event()

    def wait(p, kw):
        ready.set()
        release.wait(60)

    def work():
        sample_latents(pipe, steps=4, callback_on_step_end=MultiPipelineCallbacks([guide, Callback(1, wait)]))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RuntimeError, match="in progress; use one guide for each pipeline"):
            sample_latents(other, steps=4, callback_on_step_end=guide)
    finally:
        release.set()
        thread.join()
    assert not errors
    assert len(guide.memory) == 3


# -- aborted calls ----------------------------------------------------------------------------------------------------


def abort(error):
    def action(pipe, kwargs):
        raise error

    return action


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_leftovers_of_an_aborted_callback_run_yield_to_other_guides(pipe, error):
    plain, guide = sample_latents(pipe, steps=4), SPARKE(1.0)
    with pytest.raises(type(error)):
        sample_latents(pipe, steps=4, callback_on_step_end=MultiPipelineCallbacks([guide, Callback(1, abort(error))]))
    attached, by_callback = SPARKE(1.0), SPARKE(1.0)
    moved = sample_latents(pipe, guide=attached, steps=4)  # without a plain call in between
    assert len(attached.memory) == 3
    assert not torch.equal(moved, plain)
    with pytest.raises(type(error)):
        sample_latents(pipe, steps=4, callback_on_step_end=MultiPipelineCallbacks([guide, Callback(1, abort(error))]))
    sample_latents(pipe, steps=4, callback_on_step_end=by_callback)
    assert len(by_callback.memory) == 3
    with pytest.raises(type(error)):
        sample_latents(pipe, steps=4, callback_on_step_end=MultiPipelineCallbacks([guide, Callback(1, abort(error))]))
    assert torch.equal(sample_latents(pipe, steps=4), plain)
    assert is_restored(pipe)
    assert len(guide.memory) == 0


def test_call_that_fails_before_its_first_step_leaves_nothing_in_the_way(pipe):
    guide = SPARKE(1.0)
    with pytest.raises(ValueError, match="has to be of type"):
        pipe(7, callback_on_step_end=guide)
    sample_latents(pipe, guide=SPARKE(1.0), steps=4)
    with pytest.raises(ValueError, match="has to be of type"):
        pipe(7, callback_on_step_end=guide)
    plain = sample_latents(pipe, steps=4)
    assert torch.equal(sample_latents(pipe, steps=4), plain)
    assert is_restored(pipe)


def test_interrupted_callback_run_is_cleaned_up_and_not_remembered(pipe):
    guide = SPARKE(1.0)
    stop = Callback(1, lambda p, kw: setattr(p, "_interrupt", True))
    sample_latents(pipe, steps=4, callback_on_step_end=MultiPipelineCallbacks([guide, stop]))
    assert is_restored(pipe)
    assert len(guide.memory) == 0


def test_two_callback_guides_in_one_call_raise(pipe):
    with pytest.raises(ValueError, match=r"combine the two with `guide \+ other`"):
        sample_latents(pipe, steps=4, callback_on_step_end=MultiPipelineCallbacks([SPARKE(1.0), SPARKE(1.0)]))


# -- batches and prompts that change ----------------------------------------------------------------------------------


def drop(pipe, kwargs):
    """Keep the first two samples."""
    n = len(kwargs["latents"])
    embeds = kwargs["prompt_embeds"]
    keep = [k + half * n for half in range(len(embeds) // n) for k in range(2)]
    return kwargs | {"latents": kwargs["latents"][:2], "prompt_embeds": embeds[keep]}


@pytest.mark.parametrize("way", ["attach", "callback"])
def test_images_of_one_prompt_may_be_dropped_on_the_way(pipe, way, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", diffusers.DDIMScheduler.from_config(pipe.scheduler.config))  # it has no history
    guide, dropping = SPARKE(1.0, stop=1.0), Callback(1, drop)
    kwargs = {"generator": torch.Generator().manual_seed(0), "steps": 4}
    if way == "attach":
        final = sample_latents(pipe, guide=guide, callback_on_step_end=dropping, **kwargs)
    else:
        final = sample_latents(pipe, callback_on_step_end=MultiPipelineCallbacks([dropping, guide]), **kwargs)
    assert len(final) == len(guide.memory) == 2
    assert torch.equal(guide.memory.x.view_as(final), final)
    whole = SPARKE(0.0)
    sample_latents(pipe, guide=whole, **kwargs)
    assert torch.equal(guide.memory.prompts, whole.memory.prompts[:2])


def test_images_of_several_prompts_may_not_be_dropped(pipe):
    guide = SPARKE(1.0)
    with pytest.raises(ValueError, match="the batch changed from 4 to 2 samples at step 3 of 4, and its prompts differ"):
        sample_latents(pipe, ["heart", "runner"], n=2, guide=guide, steps=4, callback_on_step_end=Callback(1, drop))
    assert len(guide.memory) == 0


def test_prompts_edited_on_the_way_do_not_change_the_prompts_in_memory(pipe):
    embeds, negative = pipe.encode_prompt("runner", "cpu", 3, True, None)
    edit = Callback(1, lambda p, kw: kw | {"prompt_embeds": torch.cat([negative, embeds])})
    edited, plain = SPARKE(0.0), SPARKE(0.0)
    a = sample_latents(pipe, guide=edited, steps=4, callback_on_step_end=edit)
    b = sample_latents(pipe, guide=plain, steps=4)
    assert not torch.equal(a, b)
    assert torch.equal(edited.memory.prompts, plain.memory.prompts)
    assert torch.equal(edited.memory.x.view_as(a), a)


def test_latents_edited_between_steps_are_guided_on(pipe):
    edit = Callback(1, lambda p, kw: kw | {"latents": kw["latents"] * 0.5})
    guide = SPARKE(1.0)
    final = sample_latents(pipe, guide=guide, steps=4, callback_on_step_end=edit)
    assert guide.report().total_steps == 4
    assert torch.equal(guide.memory.x.view_as(final), final)


# -- prompts in every interface ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusionInstructPix2PixPipeline", "KolorsPipeline", "SanaPAGPipeline"])
def test_callback_and_attach_read_the_same_prompts(name):
    pipe, attached, by_callback = build(name), SPARKE(0.0), SPARKE(0.0)
    with attached.attach(pipe):
        pipe(**call_kwargs(pipe))
    pipe(**call_kwargs(pipe), callback_on_step_end=by_callback)
    assert torch.equal(attached.memory.prompts, by_callback.memory.prompts)
    assert attached.memory.prompt_encoder == by_callback.memory.prompt_encoder
    n = len(attached.memory) // 2
    assert torch.equal(attached.memory.prompts[0], attached.memory.prompts[n - 1])
    assert float(attached.memory.prompts[0] @ attached.memory.prompts[n]) < 0.999


def test_instruct_pix2pix_has_the_features_of_its_positive_prompts():
    pipe, features = build("StableDiffusionInstructPix2PixPipeline"), []
    for negative in (["", ""], ["ugly", "a grey dog"]):
        guide = SPARKE(0.0)
        with guide.attach(pipe):
            pipe(**call_kwargs(pipe, negative_prompt=negative))
        features.append(guide.memory.prompts)
    assert torch.equal(*features)


def test_callback_of_a_pipeline_that_hides_its_prompts_warns_once_a_run():
    pipe, guide = build("FluxPipeline"), SPARKE(1.0)

    class Wrapped(diffusers.FluxPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    wrapped = quiet(Wrapped(**pipe.components))
    for _ in range(2):
        with pytest.warns(UserWarning, match="prompts of this call of FluxPipeline cannot be read") as issued:
            pipe(**call_kwargs(pipe), callback_on_step_end=guide)
        assert sum("cannot be read" in str(w.message) for w in issued) == 1
        assert next(w for w in issued if "cannot be read" in str(w.message)).filename == __file__
    assert len(guide.memory) == 8
    with pytest.warns(UserWarning, match="prompts of this call of Wrapped cannot be read"):
        wrapped(**call_kwargs(pipe), callback_on_step_end=SPARKE(1.0))


def test_text_and_embeddings_of_a_prompt_are_not_mixed_unless_comparable(pipe):
    embeds, negative = pipe.encode_prompt("heart", "cpu", 1, True)
    guide = SPARKE(1.0)
    with guide.attach(pipe):
        pipe("heart", **STEPS)
        with pytest.raises(ValueError, match=r"memory holds prompts encoded by .* with padding"):
            pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **STEPS)
    only = SPARKE(1.0)
    with only.attach(pipe):
        pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, **STEPS)
        pipe(prompt_embeds=embeds, negative_prompt="cat face", **STEPS)  # tokens of the negative prompt are ignored
    assert torch.equal(only.memory.prompts[0], only.memory.prompts[1])


@pytest.mark.parametrize(
    ("name", "setting"),
    [("StableDiffusionXLPipeline", {"clip_skip": 1}), ("StableDiffusion3Pipeline", {"max_sequence_length": 32})],
)
@pytest.mark.parametrize("way", ["attach", "callback"])
def test_features_of_another_setting_of_the_encoder_are_not_mixed(name, setting, way):
    pipe, guide = build(name), SPARKE(0.0)
    arguments = call_kwargs(pipe)

    def call(**kwargs):
        if way == "callback":
            return pipe(**kwargs, callback_on_step_end=guide)
        with guide.attach(pipe):
            return pipe(**kwargs)

    call(**arguments)
    with pytest.raises(ValueError, match=rf"memory holds prompts encoded by .*{next(iter(setting))}"):
        call(**arguments | setting)


def test_class_conditional_transformer_has_one_row_per_image():
    pipe, guide = build("DiTPipeline"), SPARKE(1.0, stop=1.0)
    arguments = call_kwargs(pipe)
    plain = pipe(**arguments).images
    with guide.attach(pipe):
        images = pipe(**arguments | {"generator": torch.Generator().manual_seed(0)}).images
    assert len(images) == len(guide.memory) == 4
    assert len(guide.memory.x.unique(dim=0)) == 4
    assert guide.memory.prompts.argmax(1).tolist() == [1, 1, 2, 2]
    assert (images != plain).any()


def test_aborted_call_of_a_class_conditional_pipeline_leaves_no_labels(monkeypatch):
    pipe, guide = build("DiTPipeline"), SPARKE(1.0)
    arguments = call_kwargs(pipe)
    forward, calls = pipe.transformer.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    with guide.attach(pipe):
        monkeypatch.setattr(pipe.transformer, "forward", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            pipe(**arguments)
        monkeypatch.undo()
        pipe(**arguments | {"class_labels": [3, 3, 4, 4]})
    assert guide.memory.prompts.argmax(1).tolist() == [3, 3, 4, 4]


def test_guided_subclass_inside_a_block_of_the_same_guide(pipe):
    sub = quiet(guided(diffusers.StableDiffusionPipeline)(**pipe.components, requires_safety_checker=False))
    guide = SPARKE(1.0)
    with guide.attach(sub):
        sample_latents(sub, steps=4, kspec_guidance=guide)
        sample_latents(sub, steps=4)
    assert len(guide.memory) == 6
