"""Docstrings of public methods. ruff checks modules, classes and functions, but cannot see inherited docstrings."""

import importlib
import inspect
import pkgutil

import pytest

import kspec_guidance

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(kspec_guidance.__path__, "kspec_guidance.")
    if "__main__" not in m.name and ".assets" not in m.name
)


@pytest.mark.parametrize("name", MODULES)
def test_public_methods_have_own_or_inherited_summary(name):
    module = importlib.import_module(name)
    undocumented = []
    for cls in vars(module).values():
        if not inspect.isclass(cls) or cls.__module__ != name or cls.__name__.startswith("_"):
            continue
        for method, member in vars(cls).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if method.startswith("_") or not inspect.isfunction(function):
                continue
            summary = (inspect.getdoc(getattr(cls, method)) or "").split("\n\n")[0].split("\n")[0]
            if not summary.strip():
                undocumented.append(f"{cls.__name__}.{method}")
    assert not undocumented
