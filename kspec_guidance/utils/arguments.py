"""Unknown keyword arguments, refused with the name that was probably meant."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["unknown_arguments"]


def unknown_arguments(
    function: Callable[..., Any], unknown: Mapping[str, Any], hints: Mapping[str, str] | None = None
) -> TypeError:
    """The error for keyword arguments that a function does not take.

    Args:
        function: or a class.
        unknown: the arguments, by name.
        hints: what to use in place of names that are likely to be tried.

    >>> def draw(scale=1.0): ...
    >>> str(unknown_arguments(draw, {"strength": 1}, {"strength": "scale"}))
    "draw() has no argument 'strength'; did you mean scale=?"
    """
    known = [
        p.name for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    name = next(iter(unknown))
    hint = (hints or {}).get(name)
    if hint is None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = near[0] if near else None
    if hint is None:
        advice = f"its arguments are {', '.join(known)}"
    elif hint.isidentifier():
        advice = f"did you mean {hint}=?"
    else:
        advice = hint
    return TypeError(f"{function.__name__}() has no argument {name!r}; {advice}")
