"""Other code that wraps the pipeline's methods while a guide is attached."""

import torch

from kspec_guidance import SPARKE
from tests import schedulers
from tests.mixture import GaussianMixture, denoise

MODEL = GaussianMixture()


def run(scheduler):
    return denoise(MODEL, scheduler, 8, 20, 0)


def wrap(owner, name):
    """Replace a method as other packages do, without knowing of ours; returns the list of calls and the undo function."""
    wrapped, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(name)
        return wrapped(*args, **kwargs)

    setattr(owner, name, wrapper)
    return calls, lambda: setattr(owner, name, wrapped)


def test_wrapper_installed_during_attach_does_not_keep_guidance_alive():
    scheduler = schedulers.make("DDIM")
    plain = run(scheduler)
    guide = SPARKE(2.0)
    with guide.attach(scheduler):
        calls, undo = wrap(scheduler, "step")
        guided = run(scheduler)
    assert not torch.equal(guided, plain)
    assert len(calls) == 20
    remembered = len(guide.memory)
    assert torch.equal(run(scheduler), plain)  # the wrapper still holds our hook, which passes through
    assert len(calls) == 40
    undo()
    assert torch.equal(run(scheduler), plain)
    assert len(guide.memory) == remembered


def test_guide_can_be_attached_again_below_a_foreign_wrapper():
    scheduler = schedulers.make("DDIM")
    with SPARKE(2.0).attach(scheduler):
        guided = run(scheduler)
        wrap(scheduler, "step")
    with SPARKE(2.0).attach(scheduler):
        assert torch.equal(run(scheduler), guided)  # guided once, not twice


def test_pipeline_wrapped_during_attach_is_unguided_afterwards(pipe):
    def generate():
        return pipe(
            "heart", num_images_per_prompt=3, num_inference_steps=4, output_type="latent",
            generator=[torch.Generator().manual_seed(k) for k in range(3)],
        ).images  # fmt: skip

    names = ("encode_prompt", "check_inputs", "prepare_latents")
    before = {name: vars(pipe).get(name) for name in names}
    plain = generate()
    guide = SPARKE(2.0)
    try:
        with guide.attach(pipe):
            undos = [wrap(pipe, name)[1] for name in names]
            undos.append(wrap(pipe.scheduler, "step")[1])
            guided = generate()
        assert not torch.equal(guided, plain)
        assert torch.equal(generate(), plain)
        assert len(guide.memory) == 3
        for undo in undos:
            undo()
        assert torch.equal(generate(), plain)
    finally:
        for name in names:
            vars(pipe).pop(name, None)
            if before[name] is not None:
                setattr(pipe, name, before[name])
        vars(pipe.scheduler).pop("step", None)
