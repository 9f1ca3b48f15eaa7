"""``guide.compare``: the same call, plain and guided, from the same noise."""

import copy
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, MMDGuidance, guided, insert_guidance, load_demo_pipeline, pipelines
from kspec_guidance import functional as F
from kspec_guidance.guidance import GuidanceComparison, GuidanceReport
from kspec_guidance.guidance.comparison import _columns
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel
from tests import schedulers
from tests.emoji import generators, sample_latents
from tests.tiny import build, build_modular, call_kwargs, modular_call_kwargs
from tests.tiny.pipeline_checks import as_array

CALL = {"num_images_per_prompt": 3, "num_inference_steps": 4, "guidance_scale": 4.0}
OTHERS = {  # and what they return
    "StableDiffusionXLPipeline": "pil",
    "FluxPipeline": "pil",
    "WanPipeline": "np",
    "StableAudioPipeline": None,
    "DiTPipeline": "pil",
    "StableVideoDiffusionPipeline": "pil",
    "KandinskyV22CombinedPipeline": "pil",
}
LATENT = CALL | {"output_type": "latent"}


def equal(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def unpatched(pipe):
    return "step" not in vars(pipe.scheduler) and not {"encode_prompt", "check_inputs", "prepare_latents"} & set(vars(pipe))


def test_both_runs_are_the_pipelines_own_from_the_same_noise(pipe):
    guide = SPARKE(1.0)
    found = guide.compare(pipe, "heart", generator=generators(3), **LATENT)
    assert torch.equal(found.plain, sample_latents(pipe, steps=4))
    assert torch.equal(found.guided, sample_latents(pipe, steps=4, guide=SPARKE(1.0)))
    rows = [torch.nn.functional.normalize(x.flatten(1).double(), dim=1) for x in (found.plain, found.guided)]
    plain, guided = (float(F.rke_score(r, GaussianKernel(IMAGE_BANDWIDTH))) for r in rows)
    assert (found.report.plain, found.report.guided) == pytest.approx((plain, guided), abs=1e-6)
    assert found.report is guide.report()
    assert unpatched(pipe)


@pytest.mark.slow
def test_number_of_different_images_rises_on_the_embedded_pipeline(pipe):
    call = {"num_images_per_prompt": 8, "num_inference_steps": 8, "generator": generators(8), "output_type": "latent"}
    reports = [SPARKE(scale).compare(pipe, "heart", **call).report for scale in (0.0, 1.0, 3.0)]
    assert reports[0].guided == reports[0].plain == reports[1].plain == reports[2].plain
    assert reports[0].plain + 1 < reports[1].guided < reports[2].guided <= 8  # of 8: little is left above scale 1


def test_scale_zero_gives_identical_images(pipe):
    found = SPARKE(0.0).compare(pipe, "heart", **CALL)
    assert equal(found.plain, found.guided)
    assert found.report.guided == found.report.plain


def test_without_a_generator_one_seed_is_drawn_and_kept(pipe):
    found, again = (SPARKE(1.0).compare(pipe, "heart", **LATENT) for _ in range(2))
    assert found.seed != again.seed
    plain = pipe("heart", generator=torch.Generator().manual_seed(found.seed), **LATENT).images
    assert torch.equal(plain, found.plain)
    torch.manual_seed(5)
    first = SPARKE(1.0).compare(pipe, "heart", **LATENT).seed
    torch.manual_seed(5)
    assert SPARKE(1.0).compare(pipe, "heart", **LATENT).seed == first


def test_given_generators_do_not_advance_and_one_listed_twice_stays_one(pipe):
    g = torch.Generator().manual_seed(3)
    torch.randn(5, generator=g)  # not at its beginning
    state = g.get_state()
    found = SPARKE(0.0).compare(pipe, "heart", generator=[g, g, g], **LATENT)
    assert torch.equal(g.get_state(), state)
    assert torch.equal(found.plain, found.guided)
    assert not torch.equal(found.plain[0], found.plain[1])
    assert torch.equal(pipe("heart", generator=[g, g, g], **LATENT).images, found.plain)


def test_global_random_state_is_that_of_one_draw(pipe):
    torch.manual_seed(1)
    SPARKE(1.0).compare(pipe, "heart", **LATENT)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.randint(2**31, ())
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("attached", [False, True])
def test_memory_is_used_and_filled_by_the_guided_run_alone(pipe, attached):
    guide, call = SPARKE(1.0), LATENT | {"num_images_per_prompt": 1, "generator": generators(1)}
    sample_latents(pipe, n=2, steps=4, guide=guide)
    expected = sample_latents(pipe, n=1, steps=4, guide=SPARKE(1.0, memory=copy.deepcopy(guide.memory)))
    if attached:
        guide.attach(pipe)
    try:
        found = guide.compare(pipe, "heart", **call)
        assert unpatched(pipe) is not attached  # as before
    finally:
        guide.detach()
    assert torch.equal(found.plain, sample_latents(pipe, n=1, steps=4))
    assert torch.equal(found.guided, expected)
    assert len(guide.memory) == 3
    assert torch.equal(guide.memory.x[2:], found.guided.flatten(1))


def test_inside_a_with_block_the_outer_block_detaches(pipe):
    guide = SPARKE(1.0)
    with guide.attach(pipe):
        first = guide.compare(pipe, "heart", generator=generators(3), **LATENT)
        assert not unpatched(pipe)
        guide.memory.clear()
        later = pipe("heart", generator=generators(3), **LATENT).images
    assert unpatched(pipe)
    assert torch.equal(first.guided, later)


@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_either_run_restores_everything(pipe, failing):
    guide, runs = SPARKE(1.0), []
    scheduler = set(vars(pipe.scheduler))

    def interrupt(pipeline, step, timestep, tensors):
        runs.append(step)
        if step == 2 and runs.count(0) == failing:
            raise KeyboardInterrupt
        return tensors

    with guide.attach(pipe), pytest.raises(KeyboardInterrupt):
        guide.compare(pipe, "heart", generator=generators(3), callback_on_step_end=interrupt, **LATENT)
    assert unpatched(pipe)
    assert set(vars(pipe.scheduler)) == scheduler
    assert len(guide.memory) == 0
    assert torch.equal(sample_latents(pipe, steps=4, guide=guide), sample_latents(pipe, steps=4, guide=SPARKE(1.0)))


@pytest.mark.parametrize("name", ["DPMSolverSDE", "EulerAncestralDiscrete", "LCM", "UniPCMultistep"])
def test_schedulers_with_noise_or_history_begin_alike(pipe, name):
    before = pipe.scheduler
    cls, settings = schedulers.SETTINGS.get(name, (f"{name}Scheduler", {}))
    pipe.scheduler = getattr(diffusers, cls).from_config(before.config, **settings)
    try:
        for generator in (generators(3), None):
            found = SPARKE(0.0).compare(pipe, "heart", generator=generator, **LATENT)
            assert torch.equal(found.plain, found.guided)
    finally:
        pipe.scheduler = before


def test_pipelines_that_carry_a_guide_compare_without_it(pipe):
    expected = SPARKE().compare(pipe, "heart", generator=generators(3), **LATENT)
    own = pipelines.SPARKEStableDiffusionPipeline(**pipe.components)
    plugged = guided(type(pipe))(**pipe.components)
    for guide, other in ((own.guide, own), (SPARKE(), own), (SPARKE(), plugged)):
        other.set_progress_bar_config(disable=True)
        found = guide.compare(other, "heart", generator=generators(3), **LATENT)
        assert torch.equal(found.plain, expected.plain)
        assert torch.equal(found.guided, expected.guided)
    assert len(own.guide.memory) == 3


def test_offloaded_pipelines_are_compared(pipe):
    from accelerate import cpu_offload

    expected = SPARKE(1.0).compare(pipe, "heart", generator=generators(3), **LATENT)
    offloaded = load_demo_pipeline()
    offloaded.set_progress_bar_config(disable=True)
    for module in (offloaded.unet, offloaded.vae, offloaded.text_encoder):  # as enable_sequential_cpu_offload, on CPU
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    found = SPARKE(1.0).compare(offloaded, "heart", generator=generators(3), **LATENT)
    assert torch.equal(found.plain, expected.plain)
    assert torch.equal(found.guided, expected.guided)


def test_user_subclasses_with_any_arguments_are_compared(pipe):
    class Wrapped(type(pipe)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    wrapped = Wrapped(**pipe.components)
    wrapped.set_progress_bar_config(disable=True)
    for arguments in ({"generator": generators(3)}, {}):
        found = SPARKE(0.0).compare(wrapped, "heart", **arguments, **LATENT)
        assert torch.equal(found.plain, found.guided)
    assert "'heart'" in repr(found)


def test_modular_pipelines_and_their_blocks_are_compared():
    pipe = build_modular("FluxModularPipeline")
    arguments = modular_call_kwargs(pipe) | {"output_type": "pil"}
    prompt = arguments.pop("prompt")
    expected = SPARKE(1.0).compare(pipe, prompt, **arguments)
    assert not equal(expected.plain, expected.guided)
    assert equal(
        expected.plain, pipe(prompt=prompt, **arguments | {"generator": torch.Generator().manual_seed(0)}).get("images")
    )
    with_block = insert_guidance(pipe.blocks, SPARKE(2.0)).init_pipeline()
    with_block.update_components(**{k: v for k, v in pipe.components.items() if v is not None})
    with_block.set_progress_bar_config(disable=True)
    found = SPARKE(1.0).compare(with_block, prompt=prompt, **arguments)
    assert equal(found.plain, expected.plain)
    assert equal(found.guided, expected.guided)
    assert isinstance(found.grid(), Image.Image)
    with pytest.raises(TypeError, match="need their names"):
        SPARKE().compare(pipe, prompt, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"generator": 7}, TypeError, "must be a torch.Generator"),
        ({"generator": [torch.Generator(), 7]}, TypeError, "got int"),
        ({"kspec_guidance": None}, ValueError, "leave kspec_guidance= out"),
        ({"callback_on_step_end": SPARKE()}, ValueError, "leave callback_on_step_end= out"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(pipe, call, error, message):
    guide = SPARKE()
    with pytest.raises(error, match=message):
        guide.compare(pipe, "heart", num_inference_steps=2, **call)
    assert unpatched(pipe)
    assert len(guide.memory) == 0


def test_what_cannot_be_called_or_is_guided_already_is_refused(pipe):
    with pytest.raises(TypeError, match="DDIMScheduler cannot be called"):
        SPARKE().compare(schedulers.make("DDIM"), "heart")
    with SPARKE().attach(pipe), pytest.raises(ValueError, match="already guided by another guide"):
        SPARKE().compare(pipe, "heart", **LATENT)
    guide = SPARKE()
    with guide.attach(schedulers.make("DDIM")), pytest.raises(ValueError, match="attached to a DDIMScheduler"):
        guide.compare(pipe, "heart", **LATENT)


# -- grids -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12])
def test_grid_has_two_blocks_that_fit(pipe, n):
    images = [Image.new("RGB", (64, 64), (255, 0, 0))] * n
    found = comparison(images, [Image.new("RGB", (64, 64), (0, 0, 255))] * n, "a heart " * 40)
    grid = np.asarray(found.grid())
    red, blue = ((grid == colour).all(-1).sum() for colour in ([255, 0, 0], [0, 0, 255]))
    assert red == blue == n * 96 * 96
    assert grid.shape[1] < 2400


def comparison(plain, guided_images, prompt=None, **call):
    """A comparison of given images."""
    repeated = SimpleNamespace(seed=None, kwargs={"prompt": prompt} | call, args=(), pipe=None)
    return GuidanceComparison(plain, guided_images, GuidanceReport(), repeated)


def test_many_images_and_prompts_stay_readable():
    images = [Image.new("RGB", (512, 512), (k, 0, 0)) for k in range(200)]
    wide, rows = comparison(images, images).grid(), comparison(images[:48], images[:48], ["a b " * 30] * 4).grid()
    assert wide.width < 2400
    assert wide.height < 1300
    assert rows.width < 2800
    assert rows.height < 1300


def test_pictures_keep_their_aspect_ratio():
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    grid = np.asarray(comparison([image], [image]).grid())
    assert (grid == [255, 0, 0]).all(-1).sum() == 2 * 200 * 100


def test_arrays_tensors_and_clips_are_shown_and_other_things_refused():
    array = np.zeros((2, 8, 8, 3), np.float32)
    clips = np.zeros((2, 5, 8, 8, 3), np.float32)
    clips[:, 2:, :, :, 0] = 1
    for content in (array, torch.zeros(2, 3, 8, 8), [array[0], array[1]]):
        assert comparison(content, content).grid().width > 100
    frames = [[Image.fromarray((frame * 255).astype("uint8")) for frame in clip] for clip in clips]
    for content in (clips, torch.from_numpy(clips).permute(0, 1, 4, 2, 3), frames):
        grid = np.asarray(comparison(content, content).grid())
        assert (grid == [255, 0, 0]).all(-1).sum() == (grid == [0, 0, 0]).all(-1).sum() == 4 * 96 * 96  # middle and first
    for content in (torch.zeros(2, 1, 1000), torch.zeros(2, 16, 8, 8), np.full((1, 8, 8, 3), 7.0), [], None):
        with pytest.raises(ValueError, match="no pictures"):
            comparison(content, content).grid()
    with pytest.raises(ValueError, match="latents are no pictures"):
        comparison(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), output_type="latent").grid()


def test_columns_leave_few_cells_empty():
    assert [_columns(n) for n in (1, 2, 3, 5, 6, 8, 64)] == [1, 2, 3, 3, 3, 4, 8]


def test_repr_is_one_line_with_both_figures(pipe):
    found = SPARKE(1.0).compare(pipe, ["heart", "runner"], num_inference_steps=2)
    assert repr(found) == "GuidanceComparison(StableDiffusionPipeline, '2 prompts', images=2, plain=None, guided=None)"
    assert found.grid().height > 200
    with pytest.raises(ValueError, match="latents are no pictures"):
        SPARKE(1.0).compare(pipe, "heart", **LATENT).grid()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_are_compared(name):
    pipe, content = build(name), OTHERS[name]
    arguments = call_kwargs(pipe) | ({} if content is None else {"output_type": content})
    found = SPARKE(0.0).compare(pipe, **arguments)
    assert np.array_equal(as_array(found.plain), as_array(found.guided))
    x = found.report.finished
    moved = MMDGuidance(torch.randn(5, *x.shape[1:]) * x.std(), 0.5, stop=1.0).compare(pipe, **arguments)
    assert not np.array_equal(as_array(moved.plain), as_array(moved.guided))
    assert np.array_equal(as_array(moved.plain), as_array(found.plain))
    if name == "StableAudioPipeline":
        with pytest.raises(ValueError, match="no pictures"):
            moved.grid()
    else:
        assert moved.grid().width > 200
