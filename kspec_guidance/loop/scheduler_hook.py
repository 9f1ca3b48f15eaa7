"""Ways into a pipeline: a reversible hook on the scheduler's step, and an eye on what the pipeline does around it.

A hook is an instance attribute that shadows the class's method; removing it leaves the object as it was, to the last
attribute. Nothing of diffusers is copied or subclassed, and nothing is put inside the denoiser.
"""

import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kspec_guidance.loop.prediction import family

__all__ = [
    "Hook",
    "SchedulerHook",
    "ThreadOwner",
]

Function = Callable[..., Any]


class Shadow:
    """A callable in place of a method. Copies and pickles of its owner get the method itself, unhooked."""

    def __init__(self, owner: Any, name: str, function: Function, tag: Any):
        self.owner, self.name, self.function, self.kspec_tag = owner, name, function, tag

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.owner))  # None where only the owner's attributes are copied, to be put back later
        return self if copied is None else types.MethodType(getattr(type(copied), self.name), copied)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


class Hook:
    """Shadow the method ``name`` of one object by ``wrap(original)``, until :meth:`remove`."""

    def __init__(self, owner: Any, name: str, wrap: Callable[[Function], Function], tag: Any):
        present = owner.__dict__.get(name)
        if getattr(present, "kspec_tag", None) not in (None, tag):
            raise ValueError(
                f"this {type(owner).__name__} is already guided by another guide; combine the two with `guide + other`, "
                "or detach() the first"
            )
        self.owner, self.name, self.had, self.before = owner, name, name in owner.__dict__, present
        original = getattr(owner, name)
        self.wrapper = functools.update_wrapper(Shadow(owner, name, wrap(original), tag), original)
        object.__setattr__(owner, name, self.wrapper)

    def remove(self) -> None:
        """Undo; harmless the second time, and when someone else has put a hook of theirs on top."""
        if self.owner.__dict__.get(self.name) is not self.wrapper:
            return
        if self.had:
            object.__setattr__(self.owner, self.name, self.before)
        else:
            object.__delattr__(self.owner, self.name)


# Their loops call the step up to three times at one noise level: the first two only to turn outputs into predictions.
TWICE = {"CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"}


class SchedulerHook:
    """Calls ``on_step(scheduler, step, model_output, timestep, sample, extra)`` in place of ``scheduler.step``.

    ``step(model_output, sample)`` is the scheduler's own, with all other arguments as the pipeline gave them; ``extra``
    holds those by name. Where a pipeline hands over an x0 of its own, that is the model output.
    """

    NAMES = {"sample_hat": "sample", "sigma_hat": "timestep"}  # what KarrasVe calls them

    def __init__(self, scheduler: Any, on_step: Function, tag: Any, pipe: Any = None):
        twice = not TWICE.isdisjoint(cls.__name__ for cls in type(pipe).__mro__)
        family(scheduler)  # refuse what cannot be guided before anything is touched
        name = "step" if hasattr(scheduler, "step") else "step_pred"
        signature = inspect.signature(getattr(scheduler, name))

        def wrap(original: Function) -> Function:
            def step(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs)
                a = given.arguments
                key = {self.NAMES.get(k, k): k for k in a}
                output = "pred_original_sample" if a.get("pred_original_sample") is not None else "model_output"

                def proceed(model_output: Tensor, sample: Tensor) -> Any:
                    a[output], a[key["sample"]] = model_output, sample
                    return original(*given.args, **given.kwargs)

                if twice and output == "model_output":
                    return original(*args, **kwargs)
                extra = {k: v for k, v in a.items() if k not in ("model_output", "kwargs")}
                return on_step(scheduler, proceed, a[output], a[key["timestep"]], a[key["sample"]], extra)

            return step

        self.scheduler = scheduler
        self.hook = Hook(scheduler, name, wrap, tag)

    def remove(self) -> None:
        self.hook.remove()


class ThreadOwner:
    """Remembers which thread is inside a run."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()

    def check(self) -> None:
        """
        Raises:
            RuntimeError: from another thread, while the owner is still alive.
        """
        if threading.current_thread() is not self.thread and self.thread.is_alive():
            raise RuntimeError(
                "one guide is being used by two threads at once; give each thread its own pipeline and its own guide, and "
                "join their memories afterwards with memory.merge(other)"
            )
