import gc
import os
import shutil
import subprocess
import tempfile

import pytest
import torch

os.environ["KSPEC_GUIDANCE_HOME"] = tempfile.mkdtemp()  # no calibrations of the user; for child processes as well

CHROMIUM = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


def pytest_collection_finish():
    """Modules stay until the end: no garbage collection looks at them again."""
    gc.freeze()


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


@pytest.fixture(scope="module")  # no longer: it occupies the thread's event loop
def browser():
    """Chromium, where it is installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: not tried in a browser")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def forks(monkeypatch):
    """Processes of ``python -m`` are forks, also those that the package starts. See ``tests.processes.Popen``."""
    from tests.processes import Popen

    monkeypatch.setattr(subprocess, "Popen", Popen)
