"""Pipelines from disk."""

import torch

from kspec_guidance.loop.components import load_pipeline
from tests.tiny import build


def test_a_pipeline_that_was_saved_without_a_component_is_loaded_without_it(tmp_path):
    pipe = build("StableDiffusion3Pipeline")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path), torch.float32).text_encoder_3 is None
