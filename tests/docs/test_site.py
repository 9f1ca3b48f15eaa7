"""The site builds without warnings, and its reference contains every public name."""

import importlib
import pkgutil
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

import kspec_guidance

ROOT = Path(__file__).parents[2]
INTERNAL = {"__main__", "cli", "integrations", "utils"}
DIRECTIVES = [
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def inventory(site):
    """The names that the site documents, from its Sphinx inventory."""
    compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(compressed).decode().splitlines()}


def public_names(modules):
    """Module, name and value of every entry in the ``__all__`` of the modules."""
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", []):
            yield module.__name__, name, getattr(module, name)


def is_own(value):
    return callable(value) and getattr(value, "__module__", "").startswith("kspec_guidance")


@pytest.mark.slow
def test_site_builds_without_warnings_and_documents_every_public_name(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    documented = inventory(tmp_path / "site")
    modules = [name for name in DIRECTIVES if isinstance(pkgutil.resolve_name(name), ModuleType)]
    missing = [
        f"{module}.{name}"
        for module, name, value in public_names(["kspec_guidance", *modules])
        if is_own(value) and not {f"{module}.{name}", f"{value.__module__}.{value.__qualname__}"} & documented
    ]
    assert not missing


def test_every_public_package_is_in_the_reference():
    packages = {info.name for info in pkgutil.iter_modules(kspec_guidance.__path__)} - INTERNAL
    assert packages == {name.split(".")[1] for name in DIRECTIVES}


def test_every_public_name_exists_and_has_a_docstring():
    modules = (
        info.name
        for info in pkgutil.walk_packages(kspec_guidance.__path__, "kspec_guidance.")
        if not info.name.endswith("__main__")
    )
    undocumented = [
        f"{module}.{name}"
        for module, name, value in public_names(modules)
        if is_own(value) and not (value.__doc__ or "").strip()
    ]
    assert not undocumented


@pytest.mark.slow
def test_mathematics_imports_no_diffusers():
    code = (
        "import sys, kspec_guidance.kernels, kspec_guidance.features, kspec_guidance.functional, kspec_guidance.metrics, "
        "kspec_guidance.statistics, kspec_guidance.objectives, kspec_guidance.memory, kspec_guidance.testing; "
        "print([m for m in ('diffusers', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
