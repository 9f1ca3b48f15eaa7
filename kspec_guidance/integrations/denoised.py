"""Guidance in samplers that hand out the clean prediction x0 at each model call: ComfyUI, Forge.

Such a host calls a function after classifier-free guidance, with the noisy sample, x0 and the noise level, and continues
with the x0 that it returns. Its schedulers, pipelines and prompts are not those of diffusers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.run import Run
from kspec_guidance.loop.context import CallContext, StepContext
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction, apply_move
from kspec_guidance.loop.prompts import masked_mean, repeat_rows
from kspec_guidance.memory import MemoryBank
from kspec_guidance.utils.messages import warn_user
from kspec_guidance.utils.timing import Stopwatch

__all__ = ["DenoisedGuidance", "MemoryBySize", "noise_levels", "prompts_of_conditioning"]

SUFFIX = ".safetensors"
Prompts = tuple[Tensor | None, str | None]  # features [rows, p], and the name of their source


@dataclass(eq=False)
class _Pass:
    """One run of a sampler from its first noise level to its last."""

    run: Run
    context: StepContext
    source: Any  # the noise levels as the host has given them
    levels: list[float]
    announced: bool
    remembered: bool = False


class DenoisedGuidance:
    """Moves the clean predictions of a sampler, with a guide for each size of samples.

    Call it after classifier-free guidance, at each call of the model. A host that can say so announces where a run begins
    (:meth:`begin`) and ends (:meth:`end`); otherwise a run begins where the noise level rises or other noise levels are
    given, and ends with the prediction at the last level before 0. Only runs that reach level 0 are remembered.

    Args:
        make: makes the guide for samples like the given one ``[n, ...]``; called once for each shape.

    Raises:
        ValueError: at a step, for a guide that moves noisy samples, which such a sampler does not hand out.
    """

    def __init__(self, make: Callable[[Tensor], KernelGuidance]):
        self._make, self._guides = make, dict[tuple[int, ...], KernelGuidance]()
        self._pass: _Pass | None = None
        self._announced: list[float] | None = None  # the noise levels of the run in progress

    def begin(self, sigmas: Tensor | Sequence[float]) -> None:
        """A run of the sampler begins, with these noise levels, before the sampler changes them in any way."""
        self._pass, self._announced = None, _floats(sigmas)

    def end(self, final: Tensor | None = None) -> None:
        """The run has ended, with this sample in the form of the predictions; None if it was cut short."""
        found, self._pass, self._announced = self._pass, None, None
        if found is not None and final is not None and not found.levels[-1]:
            self._remember(found, final)

    def __call__(
        self,
        x0: Tensor,
        x: Tensor,
        sigma: Tensor | float,
        sigmas: Tensor | Sequence[float],
        sampling: Any = None,
        prompts: Callable[[], Prompts] = lambda: (None, None),
    ) -> Tensor:
        """The clean prediction with its move.

        Args:
            x0: clean predictions ``[n, ...]`` of any layout: images, clips, tokens.
            x: noisy samples of the same shape.
            sigma: the noise level, or one for each sample.
            sigmas: all noise levels of the run, falling; the last one is 0 if the run is complete.
            sampling: has the host's ``noise_scaling``, see :func:`noise_levels`.
            prompts: returns the features of the prompts and the name of their source; called once in a run.
        """
        level = float(torch.as_tensor(sigma).flatten()[0])
        with torch.no_grad():
            current = self._enter(x0, level, sigmas, sampling, prompts)
            context, run = current.context, current.run
            began = context.time.now()
            alpha, noise = noise_levels(sampling, level)
            widened = x0 if x0.dtype == torch.float64 else x0.float()
            prediction = Prediction(widened, x.to(widened.dtype), alpha, noise, 1.0)
            move = run.step(prediction, context)
            if move is not None:
                x0 = apply_move(x0, prediction.moved(x0, move), move, run, context)
            context.time.spans.append((began, context.time.now()))
            if not current.announced and context.step == context.total - 1 and not current.levels[-1]:
                self._remember(current, x0)
        return x0

    def _enter(self, x0: Tensor, level: float, sigmas: Any, sampling: Any, prompts: Callable[[], Prompts]) -> _Pass:
        """The run of this step, which may begin with it."""
        found = self._pass
        if found is not None and found.context.shapes == x0.shape and (found.announced or found.source is sigmas):
            step = _index(found.levels, level)
            if found.announced or step >= found.context.step:
                found.context.step = step
                return found
        levels = self._announced
        if levels is None:
            levels = _floats(sigmas)
            levels = levels[_index(levels, level) :]  # image-to-image begins later
        layout = Layout.of(x0)
        features, encoder = prompts()
        features = None if features is None else repeat_rows(features.to(x0.device), len(x0))
        call = CallContext(None, features, encoder)
        total = max(len(levels) - 1, 1)
        context = StepContext(
            call, sampling, sigmas, layout, x0.shape, total, features, step=_index(levels, level), time=Stopwatch(x0.device)
        )
        run = self._guide(x0)._run
        run.begin(context, x0)
        self._pass = _Pass(run, context, sigmas, levels, self._announced is not None)
        return self._pass

    def _guide(self, x0: Tensor) -> KernelGuidance:
        shape = tuple(x0.shape[1:])
        if shape not in self._guides:
            guide = self._make(x0)
            if any(term.space.noisy for term in guide.terms):
                raise ValueError(
                    "this sampler hands out clean predictions only, and the space 'latents' moves noisy samples; use "
                    "space='x0' or 'pooled'"
                )
            self._guides[shape] = guide
        return self._guides[shape]

    @staticmethod
    def _remember(found: _Pass, final: Tensor) -> None:
        if found.remembered:
            return
        found.remembered = True
        if final.shape != found.context.shapes:
            warn_user(
                f"the sampler returned samples of shape {list(final.shape)} for predictions of shape "
                f"{list(found.context.shapes)}; they are not remembered"
            )
            return
        found.context.final = final
        with torch.no_grad():
            found.run.finish(found.context)


def _floats(values: Tensor | Sequence[float]) -> list[float]:
    return [float(v) for v in torch.as_tensor(values).flatten().cpu()]


def _index(levels: list[float], level: float) -> int:
    """Index of the step at a noise level, or between it and the next one: samplers of higher order stop on the way."""
    greater = sum(v > level * (1 + 1e-5) for v in levels[:-1])
    return min(greater, max(len(levels) - 2, 0))


def noise_levels(sampling: Any, sigma: float) -> tuple[float, float]:
    """``alpha`` and ``sigma`` of ``x = alpha x0 + sigma noise`` at a host's noise level.

    Args:
        sampling: has ``noise_scaling(sigma, noise, latent_image)``, as ``model.model_sampling`` of ComfyUI and
            ``model.predictor`` of Forge; without it noise is added to x0.
        sigma: the noise level.
    """
    scale = getattr(sampling, "noise_scaling", None)
    if scale is None:
        return 1.0, sigma
    level, shape = torch.tensor([sigma], device="cpu"), (1, 1, 1, 1)
    with torch.inference_mode(False), torch.no_grad():
        parts = [scale(level, torch.full(shape, 1.0 - k), torch.full(shape, float(k))) for k in (1, 0)]
    return float(parts[0].flatten()[0]), float(parts[1].flatten()[0])


def prompts_of_conditioning(conditioning: Any) -> Prompts:
    """Features ``[rows, p]`` of a conditioning of ComfyUI, and the name of their source.

    The pooled embedding where the text encoder has one, else the mean over tokens; of several entries (regions, combined
    prompts) the mean.

    Args:
        conditioning: the list of a CONDITIONING input, ``[[tensor, dict], ...]``, or that of the sampler, ``[dict, ...]``.
    """
    found: list[Tensor] = []
    names: set[str] = set()
    for entry in conditioning or []:
        tokens, about = (entry.get("cross_attn"), entry) if isinstance(entry, dict) else (entry[0], entry[1])
        pooled = about.get("pooled_output")
        if isinstance(pooled, Tensor) and pooled.ndim == 2 and bool(pooled.any()):
            features, name = masked_mean(pooled, None), "pooled"
        elif isinstance(tokens, Tensor) and tokens.ndim == 3:
            mask = about.get("attention_mask")
            fits = isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]
            features, name = masked_mean(tokens, mask if fits else None), "tokens"
        else:
            continue
        found.append(features)
        names.add(f"conditioning, {name} {features.shape[1]}")
    if not found or len(names) > 1 or len({len(f) for f in found}) > 1:
        return None, None
    return masked_mean(torch.stack(found).mean(0), None), names.pop()


class MemoryBySize:
    """Memories of earlier samples, one for each shape of samples: a host changes sizes from run to run."""

    def __init__(self) -> None:
        self.banks: dict[tuple[int, ...], MemoryBank] = {}
        self._replaced = 0  # how often all samples were forgotten, or replaced by others

    @property
    def state(self) -> tuple[Any, ...]:
        """Changes whenever the samples do; read without looking at them."""
        return self._replaced, *((shape, len(bank)) for shape, bank in self.banks.items())

    def of(self, x0: Tensor) -> MemoryBank:
        """The memory for samples like these ``[n, ...]``."""
        return self.banks.setdefault(tuple(x0.shape[1:]), MemoryBank())

    def __len__(self) -> int:
        return sum(len(bank) for bank in self.banks.values())

    def clear(self) -> None:
        """Forget all samples."""
        self._replaced += 1
        for bank in self.banks.values():
            bank.clear()

    def save(self, folder: str | os.PathLike) -> None:
        """Write a file for each shape into a folder, such as ``4x64x64.safetensors``; those of other shapes are removed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"x".join(map(str, shape)) + SUFFIX: bank for shape, bank in self.banks.items() if len(bank)}
        for name, bank in names.items():
            bank.save(folder / name)
        for path in folder.glob(f"*{SUFFIX}"):
            if path.name not in names:
                path.unlink()

    def load(self, folder: str | os.PathLike) -> None:
        """Replace the samples by those that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if the folder has no memory.
            MemoryFileError: for a damaged file; the samples are then unchanged.
        """
        paths = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if not paths:
            raise FileNotFoundError(f"no memory in {folder}")
        loaded = [MemoryBank.load(path) for path in paths]
        self.banks = {bank.shape: bank for bank in loaded if bank.shape is not None}
        self._replaced += 1
