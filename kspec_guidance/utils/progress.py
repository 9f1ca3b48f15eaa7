"""Progress bars: showing, and hiding those of other libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress", "quiet_loading"]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers inside the block."""
    from diffusers.utils import logging as a
    from transformers.utils import logging as b

    enabled = [module for module in (a, b) if module.is_progress_bar_enabled()]
    try:
        for module in enabled:
            module.disable_progress_bar()
        yield
    finally:
        for module in enabled:
            module.enable_progress_bar()


@contextmanager
def progress(total: int, shown: bool, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar; the block gets a function to call with the number of items done since the last call."""
    if not shown:
        yield lambda n: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)
