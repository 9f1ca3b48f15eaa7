import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_global_generator():
    """Make random inputs without a generator the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def g():
    """A seeded generator."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def pipe():
    """The embedded pipeline, loaded once per session. Tests restore whatever they change."""
    from kspec_guidance import load_demo_pipeline

    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe
