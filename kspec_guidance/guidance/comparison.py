"""GuidanceComparison: one call of a pipeline, plain and guided, from the same noise; see :meth:`KernelGuidance.compare`."""

import copy
import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from PIL import Image
from torch import Tensor

from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.loop.blocks import Tokens, TransformerBlock
from kspec_guidance.loop.components import sub_pipelines
from kspec_guidance.loop.context import ComingStep, StepContext
from kspec_guidance.loop.prediction import Prediction
from kspec_guidance.loop.scheduler_hook import MethodPatch
from kspec_guidance.plotting import side_by_side
from kspec_guidance.utils.images import to_frames

__all__ = ["GuidanceComparison", "PlainRun", "RepeatedCall"]

PANEL_WIDTH = 1100  # pixels of one half of a grid
SMALLEST, ENLARGED, LARGEST = 48, 96, 256  # sides of a cell: at least, for small images, at most
GAP = 4  # pixels between cells
PROMPT_COLUMNS = 8  # of a grid with several prompts


class PlainRun:
    """A :class:`~kspec_guidance.loop.context.StepHandler` that changes nothing and keeps the finished samples."""

    def __init__(self, needs_denoiser_call: bool):
        self.needs_denoiser_call = needs_denoiser_call
        self.finished: Tensor | None = None

    def blocks(self, denoiser: Any) -> list[TransformerBlock]:
        """No blocks."""
        return []

    def inside(self, block: TransformerBlock, tokens: Tokens, coming: ComingStep) -> None:
        """No change."""

    def begin(self, context: StepContext, sample: Any) -> None:
        """Begin a pass through the timesteps."""
        self.finished = None

    def output(self, model_output: Any, prediction: Prediction, context: StepContext) -> None:
        """No change."""

    def step(self, prediction: Prediction, context: StepContext) -> None:
        """No move."""

    def realised(self, move: Any, context: StepContext) -> None:
        """No move."""

    def before_step(self, sample: Any, prediction: Prediction, context: StepContext) -> None:
        """No move."""

    def after_step(self, latents: Any, prediction: Prediction, context: StepContext) -> None:
        """No move."""

    def finish(self, context: StepContext) -> None:
        """Keep the finished samples."""
        self.finished = context.layout.pack(context.final)


class RepeatedCall:
    """A call of a pipeline that begins from the same random state each time.

    The generators among its arguments are copied, the global random state is restored after each call, and the schedulers
    begin as they were. Without generators one seed is drawn from the global random state, if the pipeline takes them.

    Args:
        pipe: the pipeline.
        args, kwargs: arguments of its call.
        guide: replaces the guide of a pipeline that has one of its own.
        method: name of the method that makes the calls, for messages.

    Raises:
        TypeError: if ``pipe`` is not a pipeline, ``generator`` no generator, or for arguments that the pipeline refuses.
    """

    def __init__(self, pipe: Any, args: Sequence[Any], kwargs: dict[str, Any], guide: Any, method: str = "compare"):
        if not callable(pipe):
            raise TypeError(f"{method}() calls a pipeline, and a {type(pipe).__name__} cannot be called; pass the pipeline")
        self.pipe, self.seed = pipe, None
        self.args, self.kwargs, accepted = _named(pipe, tuple(args), kwargs)
        self.accepted = accepted  # names of the arguments that the pipeline declares
        if "kspec_guidance" in accepted:
            self.kwargs["kspec_guidance"] = guide
        drawn = int(torch.randint(2**31, (), device="cpu"))  # in any case, so that the next call has other noise
        if self.kwargs.get("generator") is None and "generator" in accepted:
            self.seed, self.kwargs["generator"] = drawn, torch.Generator().manual_seed(drawn)
        self._generator = _cloned(self.kwargs.get("generator"))
        self._schedulers = [(scheduler, _state(scheduler)) for scheduler in _schedulers(pipe)]

    def __call__(self, variant: int = 0, advance: bool = False) -> Any:
        """What the pipeline returns; variants above 0 have other generators, which are determined by the given ones.

        With ``advance`` the given generators are left as an ordinary call leaves them.
        """
        for scheduler, state in self._schedulers:
            _restore(scheduler, state)
        generator = _cloned(self._generator)
        if variant:
            for g in {id(g): g for g in _listed(generator)}.values():
                g.manual_seed(int(torch.randint(2**62, (variant,), generator=g, device=g.device)[-1]))
        kwargs = self.kwargs | ({} if generator is None else {"generator": generator})
        with _global_random_state_restored():
            result = self.pipe(*self.args, **kwargs)
        if advance:
            given = self.kwargs.get("generator")
            for mine, used in zip(_listed(given), _listed(generator), strict=True):
                mine.set_state(used.get_state())
        return result


class GuidanceComparison:
    """The result of :meth:`KernelGuidance.compare`.

    Attributes:
        plain, guided: what the pipeline returned without and with guidance: a list of images, clips as frames, or an array
            or tensor, depending on ``output_type``.
        report: the report of the guided run, with the figures of the plain one.
        seed: the seed that was drawn for both; None if generators were given, or if the pipeline takes none.
        prompt: the prompt or prompts, if the call has any.
    """

    def __init__(self, plain: Any, guided: Any, report: GuidanceReport, call: RepeatedCall):
        self.plain, self.guided, self.report, self.seed = _content(plain), _content(guided), report, call.seed
        self.prompt = call.kwargs.get("prompt", call.args[0] if call.args else None)
        self._pipeline, self._latent = type(call.pipe).__name__, call.kwargs.get("output_type") == "latent"

    def grid(self) -> Image.Image:
        """Plain and guided images side by side, with a row for each of several prompts; of clips first and middle frames.

        Raises:
            ValueError: if there are no pictures: latents, sound.
        """
        if self._latent:
            raise ValueError("latents are no pictures; for a grid call compare() without output_type='latent'")
        panels = {"plain": _pictures(self.plain), "guided": _pictures(self.guided)}
        n, frames = len(panels["plain"]), len(panels["plain"][0])
        prompts = list(self.prompt) if isinstance(self.prompt, list | tuple) else [self.prompt]
        prompts = [None] if n % len(prompts) else prompts
        per = n // len(prompts)
        columns = frames * (_columns(per) if len(prompts) == 1 else min(per, PROMPT_COLUMNS))

        def rows_of(pictures: list[list[Image.Image]], k: int) -> list[list[Image.Image]]:
            tiles = [picture for sample in pictures[k * per : (k + 1) * per] for picture in sample]
            return [tiles[i : i + columns] for i in range(0, len(tiles), columns)]

        rows = {name: [r for k in range(len(prompts)) for r in rows_of(p, k)] for name, p in panels.items()}
        many = len(prompts) > 1
        wrapped = [""] * (math.ceil(per * frames / columns) - 1)
        labels = [label for prompt in prompts for label in (str(prompt) if many else "", *wrapped)]
        side = max(ENLARGED, *panels["plain"][0][0].size)
        tile = max(SMALLEST, min(side, LARGEST, PANEL_WIDTH // columns - GAP))
        title = self._pipeline if many or not prompts[0] else str(prompts[0])
        figures = {"plain": self.report.plain, "guided": self.report.guided}
        notes = {name: f"like {value:.1f} different" for name, value in figures.items() if value is not None}
        return side_by_side(rows, labels if many else [], title, notes, tile)

    def __repr__(self) -> str:
        figures = {"plain": self.report.plain, "guided": self.report.guided}
        found = ", ".join(f"{name}={'None' if value is None else f'{value:.3g}'}" for name, value in figures.items())
        prompt = f"{len(self.prompt)} prompts" if isinstance(self.prompt, list | tuple) else self.prompt
        shown = "" if prompt is None else f"{str(prompt)[:40]!r}, "
        return f"GuidanceComparison({self._pipeline}, {shown}images={self.report.images}, {found})"


# -- calls ---------------------------------------------------------------------------------------------------------------


def _named(pipe: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], set[str]]:
    """Positional and named arguments of a call, with names where the pipeline declares them, and the declared names."""
    blocks = getattr(pipe, "blocks", None)
    if isinstance(blocks, ModularPipelineBlocks):  # the first positional argument is a state
        if len(args) > 1:
            raise TypeError(f"all arguments of a {type(pipe).__name__} but the prompt need their names")
        return (), dict(zip(["prompt"], args, strict=False)) | kwargs, {found.name for found in blocks.inputs}
    call = type(pipe).__call__
    signature, own = inspect.signature(call), inspect.signature(call, follow_wrapped=False)
    signature.bind(pipe, *args, **kwargs)  # raises TypeError
    parameters = list(signature.parameters.values())[1:]
    accepted = {p.name for p in parameters} | ({"kspec_guidance"} & set(own.parameters))
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return args, dict(kwargs), accepted
    return (), {p.name: value for p, value in zip(parameters, args, strict=False)} | kwargs, accepted


def _listed(generator: Any) -> list[Any]:
    """Generators of an argument: none, one or a list."""
    if generator is None:
        return []
    return list(generator) if isinstance(generator, list | tuple) else [generator]


def _cloned(generator: Any) -> Any:
    """Copies of a generator, or of those in a list; one that is listed twice stays one."""
    if generator is None:
        return None
    listed = _listed(generator)
    wrong = [type(g).__name__ for g in listed if not isinstance(g, torch.Generator)]
    if wrong:
        raise TypeError(
            "generator must be a torch.Generator or a list of them, such as torch.Generator().manual_seed(0), got "
            f"{wrong[0]}"
        )
    clones = {}
    for g in listed:
        clones[id(g)] = torch.Generator(g.device)
        clones[id(g)].set_state(g.get_state())
    copies = [clones[id(g)] for g in listed]
    return copies if isinstance(generator, list | tuple) else copies[0]


def _schedulers(pipe: Any) -> list[Any]:
    """The distinct schedulers of a pipeline and of its inner pipelines."""
    parts = [part for inner in sub_pipelines(pipe) for part in getattr(inner, "components", {}).values()]
    return list({id(part): part for part in parts if hasattr(part, "set_timesteps")}.values())


def _state(scheduler: Any) -> dict[str, Any]:
    """The attributes of a scheduler, without patched methods; containers are copied."""
    values = {k: v for k, v in vars(scheduler).items() if not isinstance(v, MethodPatch)}
    return {k: copy.copy(v) if isinstance(v, list | dict | set) else v for k, v in values.items()}


def _restore(scheduler: Any, state: dict[str, Any]) -> None:
    """Set the attributes of a scheduler; patched methods stay."""
    patched = {k: v for k, v in vars(scheduler).items() if isinstance(v, MethodPatch)}
    fresh = {k: copy.copy(v) if isinstance(v, list | dict | set) else v for k, v in state.items()}
    vars(scheduler).clear()
    vars(scheduler).update(fresh | patched)


def _global_random_state_restored() -> AbstractContextManager[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices)


# -- pictures ------------------------------------------------------------------------------------------------------------


def _content(result: Any) -> Any:
    """The images, clips or sounds in the result of a pipeline: its first field, or those of a modular pipeline's state."""
    if hasattr(result, "values") and hasattr(result, "get") and not isinstance(result, dict):  # a PipelineState
        names = ("images", "videos", "audio", "latents")
        return next((result.get(name) for name in names if result.get(name) is not None), None)
    if isinstance(result, dict | tuple):
        fields = result.values() if isinstance(result, dict) else result
        result = next((value for value in fields if value is not None), None)
    return result


def _pictures(content: Any) -> list[list[Image.Image]]:
    """One picture of each image, or the first and the middle frame of each clip.

    Raises:
        ValueError: if there are no pictures.
    """
    samples = [content] if isinstance(content, Image.Image) else content
    try:
        found = [to_frames(sample) for sample in samples]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the pipeline returned no pictures that a grid can show: {error}") from error
    if not found:
        raise ValueError("the pipeline returned no pictures")
    return [frames if len(frames) == 1 else [frames[0], frames[len(frames) // 2]] for frames in found]


def _columns(n: int) -> int:
    """A number of columns that makes ``n`` cells nearly square, with as few empty ones as possible.

    >>> [_columns(n) for n in (1, 2, 3, 7, 8, 16)]
    [1, 2, 3, 4, 4, 4]
    """
    least = math.ceil(math.sqrt(n))
    return min(range(least, math.ceil(4 / 3 * math.sqrt(n)) + 1), key=lambda c: (-n % c, c))
