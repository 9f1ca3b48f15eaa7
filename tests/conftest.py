import pytest
import torch


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def pipe():
    """The embedded pipeline, loaded once; tests leave it as they found it, and one of them checks that."""
    from kspec_guidance import load_demo_pipeline

    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe
