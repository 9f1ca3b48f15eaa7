"""The pipeline's calls: texts for each prompt, and what happens if a call fails."""

import inspect

import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.synthesis import RunFailedError, SynthesisError
from kspec_guidance.synthesis.generator import Generator, PipelineCaller
from kspec_guidance.synthesis.schedule import image_seed
from tests.synthesis.small_runs import CALL, make, rows_of


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_negative_prompt_is_given_for_each_prompt_of_a_batch(tmp_path, pipe, images):
    call = {**CALL, "negative_prompt": "blurry"}
    make(tmp_path / "set", pipe, ["heart", "runner"], images, 3, call=call, guide=SPARKE(0.0))
    assert len(rows_of(tmp_path / "set")) == 2 * images
    generator = torch.Generator().manual_seed(image_seed(0, "runner", 0))
    image = pipe("runner", **call, generator=generator).images[0]
    from PIL import Image

    with Image.open(tmp_path / "set" / "0000" / "000001-0000.png") as file:
        difference = torch.tensor(list(file.tobytes())) - torch.tensor(list(image.tobytes()))
    assert difference.abs().max() <= 1  # of 255


class OtherTexts:
    """A pipeline that takes other texts as well."""

    def __call__(
        self, prompt=None, prompt_2: str | list[str] | None = None,
        style: "str | list[str]" = "", negative_prompt: str = "",
        system_prompt: str | None = None, num_images_per_prompt=1, mode: str = "", tags: list[str] | None = None, **kwargs,
    ):  # fmt: skip
        """Makes nothing."""


def test_texts_of_each_prompt_are_found_by_their_types_and_names():
    call = dict.fromkeys(("prompt_2", "style", "negative_prompt", "system_prompt", "mode"), "x")
    generator = Generator(OtherTexts(), SPARKE(), call)
    assert generator._arguments(["a", "a"]) == {**call, "prompt": "a", "num_images_per_prompt": 2}
    each = {k: ["x", "x"] for k in ("prompt_2", "style", "negative_prompt")}
    assert generator._arguments(["a", "b"]) == {**call, **each, "prompt": ["a", "b"], "num_images_per_prompt": 1}
    for value in (["x"], 1984):
        with pytest.raises(SynthesisError, match="style must be one text, which is given for all images; got"):
            Generator(OtherTexts(), SPARKE(), {"style": value})
    with pytest.raises(SynthesisError, match="prompt, num_images_per_prompt cannot be set"):
        Generator(OtherTexts(), SPARKE(), {"num_images_per_prompt": 2, "prompt": "a"})


def test_a_subclass_that_passes_its_arguments_on_takes_those_of_its_base():
    class Forwarding(OtherTexts):
        def __call__(self, *args, style="flat", **kwargs):
            return super().__call__(*args, style=style, **kwargs)

    generator = Generator(Forwarding(), SPARKE(), {"negative_prompt": "x", "mode": "y"})
    assert generator._arguments(["a", "b"])["negative_prompt"] == ["x", "x"]
    assert generator.count == "num_images_per_prompt"
    with pytest.raises(SynthesisError, match="does not take steps"):
        Generator(Forwarding(), SPARKE(), {"steps": 2})


def failing(monkeypatch, pipe, when):
    """Let the pipeline raise an error of two lines if ``when`` holds for its arguments."""
    call = type(pipe).__call__

    def wrapped(self, *args, **kwargs):
        if when(kwargs):
            raise RuntimeError("out of\nluck")
        return call(self, *args, **kwargs)

    wrapped.__signature__ = inspect.signature(call)
    monkeypatch.setattr(type(pipe), "__call__", wrapped)


def test_an_error_of_the_pipeline_names_the_batch_and_the_run_can_be_resumed(tmp_path, pipe, monkeypatch):
    with monkeypatch.context() as patch:
        calls = iter(range(9))
        failing(patch, pipe, lambda kwargs: next(calls) == 1)
        with pytest.raises(SynthesisError) as error:
            make(tmp_path, pipe, ["heart", "runner"], 2, 2)
    seeds = [image_seed(0, "runner", k) for k in range(2)]
    message = str(error.value)
    assert f"in a batch of 2 images ('runner' with seeds {seeds[0]}, {seeds[1]}): RuntimeError: out of luck;" in message
    assert "the same command continues" in message
    assert isinstance(error.value.__cause__, RuntimeError)
    result = make(tmp_path, pipe, ["heart", "runner"], 2, 2)
    assert (result.images, result.made) == (4, 2)


def test_a_pipeline_that_fails_for_two_prompts_fails_before_the_first_image(tmp_path, pipe, monkeypatch):
    failing(monkeypatch, pipe, lambda kwargs: isinstance(kwargs["prompt"], list))
    with pytest.raises(SynthesisError, match=r"needs batches of several prompts, and .* failed in one step of 3 images"):
        make(tmp_path, pipe, ["heart", "runner"], 4, 3)
    assert not list(tmp_path.rglob("*.png"))
    assert make(tmp_path, pipe, ["heart", "runner"], 4, 2).images == 8  # and other settings are no matter yet


def test_an_error_of_the_filter_names_the_image(tmp_path, pipe):
    with pytest.raises(
        SynthesisError, match=r"filter failed for an image of 'heart', seed \d+: ZeroDivision.*test_generator"
    ):
        make(tmp_path, pipe, ["heart"], 1, filter=lambda image, row: 1 / 0)


def test_prompts_that_are_cut_are_counted_with_the_longest_limit(pipe):
    generator = Generator(pipe, SPARKE(), {})
    assert generator.count_cut(["heart", "heart " * 14, "heart " * 15, "\U0001f3a8" * 40]) == (2, 16)


def test_sizes_that_the_pipeline_ignores_are_told(tmp_path, pipe):
    with pytest.warns(UserWarning, match="height is 32, but StableDiffusionPipeline made images of 64 x 64"):
        make(tmp_path, pipe, ["heart"], 1, call={"num_inference_steps": 1, "height": 32})
    with pytest.raises(SynthesisError, match="guidance_scale must be a finite number, got nan"):
        Generator(pipe, SPARKE(), {"guidance_scale": float("nan")})


class Clips:
    """A pipeline for videos."""

    def __call__(self, prompt=None, num_videos_per_prompt=1, num_frames=9, generator=None, output_type="pil"):
        from types import SimpleNamespace

        from PIL import Image

        return SimpleNamespace(frames=[[Image.new("RGB", (4, 4))] * num_frames for _ in range(num_videos_per_prompt)])


def test_clips_of_one_frame_are_images_and_longer_ones_are_refused():
    assert len(PipelineCaller(Clips(), {"num_frames": 1}).images(["a", "a"], [0, 1])) == 2
    with pytest.raises(RunFailedError, match="clips of 9 frames; for images, give the option num_frames=1"):
        PipelineCaller(Clips(), {}).images(["a"], [0])
