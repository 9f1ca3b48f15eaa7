"""Words of prompts that the embedded pipeline knows."""

from types import SimpleNamespace

import pytest

from benchmarks.arena.networks import emoji_pipeline
from kspec_guidance import SPARKE, MemoryBank
from kspec_guidance.demo import unknown_words
from kspec_guidance.utils.hashing import fingerprint, same_network
from tests.emoji import sample_latents


def test_unknown_words_are_those_that_the_embedded_pipeline_never_saw(pipe):
    assert unknown_words(pipe, "Runner, dark skin tone") == []
    assert unknown_words(pipe, "a qwxz cat, qwxz 42") == ["qwxz"]


def test_of_other_pipelines_no_word_is_unknown(pipe):
    other = SimpleNamespace(unet=SimpleNamespace(config={"_name_or_path": "elsewhere/unet"}), tokenizer=pipe.tokenizer)
    assert unknown_words(other, "qwxz") == []
    assert unknown_words(None, "qwxz") == []


@pytest.fixture(scope="module")
def earlier():
    """The embedded pipeline with the denoiser and the decoder of 1.0.0rc1."""
    return emoji_pipeline()


def test_memory_file_of_the_earlier_weights_is_continued(pipe, earlier, tmp_path):
    guide = SPARKE(1.0)
    sample_latents(earlier, guide=guide, steps=2)
    guide.memory.save(tmp_path / "memory.safetensors")
    again = SPARKE(1.0, memory=MemoryBank.load(tmp_path / "memory.safetensors"))
    sample_latents(pipe, guide=again, steps=2)
    assert len(again.memory) == 6


def test_what_is_kept_by_denoiser_is_not_shared_with_the_earlier_weights(pipe, earlier):
    assert not same_network(fingerprint(pipe.unet), fingerprint(earlier.unet))  # baselines, calibrations, folders of runs
    assert same_network(fingerprint(pipe.text_encoder), fingerprint(earlier.text_encoder))


def test_latents_of_an_image_are_those_of_the_earlier_weights(pipe, earlier):
    for name, weights in pipe.vae.encoder.state_dict().items():
        assert weights.equal(earlier.vae.encoder.state_dict()[name])
    assert pipe.vae.config.scaling_factor == earlier.vae.config.scaling_factor
