"""Progress bars, shown and silenced."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress", "quiet_loading"]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of diffusers and transformers inside: loading from disk takes a second."""
    from diffusers.utils import logging as a
    from transformers.utils import logging as b

    shown = [m for m in (a, b) if m.is_progress_bar_enabled()]
    try:
        for m in shown:
            m.disable_progress_bar()
        yield
    finally:
        for m in shown:
            m.enable_progress_bar()


@contextmanager
def progress(total: int, shown: bool, what: str) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda n: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
