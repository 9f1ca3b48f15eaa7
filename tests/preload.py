"""Imported last by the process that test processes are forked from: what each of them would import for itself."""

import gc

import ipykernel.kernelapp  # noqa: F401

import kspec_guidance.cli  # noqa: F401
from kspec_guidance import load_demo_pipeline
from tests.synthesis import one_process  # noqa: F401

load_demo_pipeline()  # diffusers and transformers import the parts of a pipeline when one is loaded
gc.freeze()  # no collection of a fork looks at these objects again, and so copies their pages
