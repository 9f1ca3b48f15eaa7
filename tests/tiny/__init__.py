"""Diffusers pipelines with tiny random weights: the original classes and denoising loops, without downloads.

``build(name)`` makes a pipeline, ``call_kwargs(pipe)`` the arguments of its call, and ``check_pipeline(name)`` tests
guidance on it. ``models``, ``autoencoders``, ``encoders`` and ``inputs`` are shared by all pipelines; the ``rules`` modules
add what single classes need.
"""

import diffusers
import pytest
from packaging.version import Version

from tests.tiny.builders import (
    MODULAR,
    build,
    build_component,
    build_modular,
    call_kwargs,
    modular_call_kwargs,
    pipeline_names,
)
from tests.tiny.pipeline_checks import Verdict, check_pipeline

requires_modular = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"), reason="requires the modular interface of diffusers 0.42"
)

__all__ = [
    "MODULAR",
    "Verdict",
    "build",
    "build_component",
    "build_modular",
    "call_kwargs",
    "check_pipeline",
    "modular_call_kwargs",
    "pipeline_names",
    "requires_modular",
]
