"""The pipelines whose calls are in progress, found on the call stack.

A scheduler does not know which pipeline calls its step, and several pipelines may share one scheduler.
"""

import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from diffusers import ConfigMixin

__all__ = ["in_progress", "owns", "pipeline_of", "running_pipelines"]


def pipeline_of(frame: FrameType) -> Any:
    """The pipeline whose ``__call__`` runs in this frame; None for other frames."""
    code = frame.f_code
    if code.co_name != "__call__" or code.co_varnames[:1] != ("self",):
        return None
    found = frame.f_locals.get("self")
    return found if isinstance(found, ConfigMixin) and hasattr(type(found), "components") else None


def running_pipelines(frame: FrameType | None = None) -> Iterator[Any]:
    """Pipelines whose calls are in progress in this thread, or below ``frame``; the innermost call comes first."""
    frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        found = pipeline_of(frame)
        if found is not None:
            yield found
        frame = frame.f_back


def in_progress(pipe: Any, thread: threading.Thread) -> bool:
    """Whether a call of the pipeline is in progress in the thread."""
    if thread is threading.current_thread():
        return any(p is pipe for p in running_pipelines())
    frame = sys._current_frames().get(thread.ident or -1) if thread.is_alive() else None
    return frame is not None and any(p is pipe for p in running_pipelines(frame))


def owns(pipe: Any, caller: Any) -> bool:
    """Whether ``caller`` is the pipeline, or one of its inner pipelines: combined pipelines call others."""
    return caller is pipe or any(caller is part for part in vars(pipe).values())
