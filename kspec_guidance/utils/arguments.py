"""Arguments: whether they are numbers, suggestions for unknown names, and support for renamed ones."""

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar, cast

__all__ = ["choices", "is_integer", "is_number", "nearest_name", "plain_number", "renamed_arguments", "unknown_arguments"]


def is_integer(value: Any, at_least: int | None = None) -> bool:
    """Whether a value is an integer, also one of numpy, of at least ``at_least``; booleans are none.

    >>> is_integer(3, 1), is_integer(0, 1), is_integer(2.0), is_integer(True)
    (True, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and (at_least is None or int(value) >= at_least)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, also one of numpy; booleans are none.

    >>> is_number(0.5), is_number(True), is_number("1")
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_number(value: Any) -> int | float | None:
    """The number that a value is, also one of numpy or a tensor without dimensions; None if it is none, or NaN.

    >>> plain_number(2), plain_number(True), plain_number("1"), plain_number(float("nan"))
    (2, None, None, None)
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return value if is_number(value) and value == value else None


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, regardless of case; None if none is.

    Of names with parts, such as ``open_clip:NAME:FILE``, the first part is compared.

    >>> nearest_name("opneclip:ViT-B-32:laion", ["demo", "open_clip:NAME:FILE"])
    'open_clip:NAME:FILE'
    """
    first_parts = {k.partition(":")[0].lower(): k for k in known}
    matches = difflib.get_close_matches(name.partition(":")[0].lower(), first_parts, n=1)
    return first_parts[matches[0]] if matches else None


def choices(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: which ones there are, and the nearest one.

    >>> choices("vivd", ["safe", "vivid"])
    "choose one of safe, vivid (did you mean 'vivid'?)"
    """
    known = list(known)
    nearest = nearest_name(str(name), known)
    return f"choose one of {', '.join(known)}" + ("" if nearest is None else f" (did you mean {nearest!r}?)")


def unknown_arguments(
    function: Callable[..., Any], unknown: Mapping[str, Any], hints: Mapping[str, str] | None = None
) -> TypeError:
    """The error for keyword arguments that a function does not take.

    Args:
        function: the function or class.
        unknown: the arguments, by name.
        hints: known argument or advice, by unknown name.

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
        hint = nearest_name(name, known)
    if hint is None:
        advice = f"its arguments are {', '.join(known)}"
    elif hint.isidentifier():
        advice = f"did you mean {hint}=?"
    else:
        advice = hint
    return TypeError(f"{function.__name__}() has no argument {name!r}; {advice}")


Function = TypeVar("Function", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[Function], Function]:
    """A decorator that accepts keyword arguments by their names in 1.0.0rc1, with a FutureWarning.

    Args:
        names: new names, by old name.

    >>> @renamed_arguments(images="images_per_prompt")
    ... def make(images_per_prompt=8):
    ...     return images_per_prompt
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     make(images=3)
    3
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in [name for name in kwargs if name in names]:
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got both {new!r} and its former name {old!r}")
                warnings.warn(f"{function.__name__}({old}=) is now {new}=", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(Function, call)

    return decorate
