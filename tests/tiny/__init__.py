"""Every diffusers pipeline with tiny random weights: real classes, real loops, nothing downloaded.

``build(name)`` makes a pipeline, ``call(pipe)`` its arguments, ``check(name)`` a verdict on guidance in it. What is shared
by all pipelines is in :mod:`tiny.models`, :mod:`tiny.encoders` and :mod:`tiny.inputs`; what a family needs beside that is a
rule in :mod:`tiny.families`.
"""

from tiny.checking import Verdict, check
from tiny.making import build, call, pipeline_names

__all__ = ["Verdict", "build", "call", "check", "pipeline_names"]
