import pytest
import torch
import typer

from kspec_guidance import SPARKE
from kspec_guidance.cli import arguments
from kspec_guidance.evaluation.embedders.names import IMAGE_NAMES, TEXT_NAMES
from kspec_guidance.evaluation.judges import JUDGE_NAMES
from kspec_guidance.synthesis.arms import SELECTORS
from kspec_guidance.synthesis.engines import ENGINES
from kspec_guidance.synthesis.export import FORMATS
from kspec_guidance.synthesis.settings import MEMORY_KINDS


def test_names_are_those_of_the_library():
    assert tuple(SPARKE.PRESETS) == arguments.PRESETS
    assert set(arguments.FORMATS) == set(FORMATS)
    assert set(arguments.ENGINES) == set(ENGINES)
    assert arguments.MEMORY_KINDS == MEMORY_KINDS
    assert arguments.SELECT == SELECTORS
    assert arguments.IMAGE_EMBEDDERS == IMAGE_NAMES
    assert arguments.TEXT_EMBEDDERS == TEXT_NAMES
    assert arguments.JUDGES == JUDGE_NAMES
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in arguments.DTYPES)


def test_named_takes_names_and_forms():
    check = arguments.named(*arguments.IMAGE_EMBEDDERS)
    for name in ("demo", "open_clip:ViT-B-32:laion2b", "transformers:some/folder", r"transformers:C:\models"):
        assert check(name) == name
    for name in ("Demo", "open_clip:ViT-B-32", "open_clip::x", "transformers:", ""):
        with pytest.raises(typer.BadParameter, match="choose one of auto, efficientnet-lite0, demo"):
            check(name)
