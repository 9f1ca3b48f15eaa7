"""The site builds without a warning, and its reference names every public name."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    page = (tmp_path / "site" / "reference" / "scores" / "index.html").read_text()
    assert "vendi_score" in page
    index = (tmp_path / "site" / "objects.inv").stat().st_size
    assert index > 1000


def public_names():
    import kspec_guidance

    for info in pkgutil.walk_packages(kspec_guidance.__path__, "kspec_guidance."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", []):
            yield module, name


def test_every_public_name_exists_and_says_what_it_is():
    silent = []
    for module, name in public_names():
        found = getattr(module, name)
        if (
            callable(found)
            and getattr(found, "__module__", "").startswith("kspec_guidance")
            and not (found.__doc__ or "").strip()
        ):
            silent.append(f"{module.__name__}.{name}")
    assert not silent


def test_mathematics_imports_no_diffusers():
    code = (
        "import sys, kspec_guidance.kernels, kspec_guidance.features, kspec_guidance.functional, kspec_guidance.metrics, "
        "kspec_guidance.statistics, kspec_guidance.objectives, kspec_guidance.memory, kspec_guidance.guidance.transforms, "
        "kspec_guidance.testing; print([m for m in ('diffusers', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
