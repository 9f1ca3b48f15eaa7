"""Words of prompts that the embedded pipeline knows."""

from types import SimpleNamespace

from kspec_guidance.demo import unknown_words


def test_unknown_words_are_those_that_the_embedded_pipeline_never_saw(pipe):
    assert unknown_words(pipe, "Runner, dark skin tone") == []
    assert unknown_words(pipe, "a qwxz cat, qwxz 42") == ["qwxz"]


def test_of_other_pipelines_no_word_is_unknown(pipe):
    other = SimpleNamespace(unet=SimpleNamespace(config={"_name_or_path": "elsewhere/unet"}), tokenizer=pipe.tokenizer)
    assert unknown_words(other, "qwxz") == []
    assert unknown_words(None, "qwxz") == []
