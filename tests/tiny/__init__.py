"""Every diffusers pipeline with tiny random weights: real classes, real loops, nothing downloaded.

``build(name)`` makes a pipeline, ``call(pipe)`` its arguments, ``check(name)`` a verdict on guidance in it. What is shared
by all pipelines is in ``models``, ``encoders`` and ``inputs``; what a family needs beside that is a rule in ``families``.
"""

from tests.tiny.checking import Verdict, check
from tests.tiny.making import build, call, pipeline_names

__all__ = ["Verdict", "build", "call", "check", "pipeline_names"]
