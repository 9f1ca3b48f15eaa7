"""A pipeline's baseline: samples that it makes without guidance, over many prompts, kept in the user's cache."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import filelock
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kspec_guidance.demo.pipeline import DEMO_PROMPTS, is_demo
from kspec_guidance.evaluation.image_sets import folder_captions
from kspec_guidance.guidance.calibration import calibration_file, call_settings
from kspec_guidance.guidance.presets import SPARKE, MMDGuidance
from kspec_guidance.loop.components import autoencoder_of, call_parameters
from kspec_guidance.loop.latents import encode_reference
from kspec_guidance.synthesis.generator import Generator, check_call
from kspec_guidance.synthesis.settings import as_json, describe_pipeline
from kspec_guidance.utils.arguments import is_integer
from kspec_guidance.utils.atomic_io import replacing
from kspec_guidance.utils.hashing import hash_json, hash_tensors, state_fingerprint
from kspec_guidance.utils.messages import warn_user

__all__ = ["BASELINE_PROMPTS", "baseline_left", "make_baseline", "toward_reference"]

BASELINE_PROMPTS = (  # people, animals, things, places and scenes, without words of style
    "a woman reading a book", "a man riding a bicycle", "a child with a balloon", "an old fisherman",
    "a group of friends", "a dancer on a stage", "a doctor at work", "a farmer in a field", "a portrait of a young man",
    "a couple on a bench", "a dog in a park", "a cat on a sofa", "a horse by a fence", "a bird on a branch",
    "an elephant", "a fish under water", "a butterfly on a flower", "a sheep on a hill", "a bear in a river",
    "a frog on a leaf", "a bowl of fruit", "a cup of coffee", "a loaf of bread", "a wooden chair", "a red car",
    "an old clock", "a pair of shoes", "a guitar", "a vase with flowers", "a lamp on a table", "a stack of books",
    "a sailing boat", "a house by a lake", "a street in a city at night", "a small village", "a church",
    "a bridge over a river", "a castle", "a kitchen", "a library", "a train station", "a market", "a mountain with snow",
    "a forest in autumn", "a beach at sunset", "a desert", "a waterfall", "a garden", "a stormy sea", "a field of wheat",
)  # fmt: skip
FEW_PROMPTS = 8  # below which a baseline is doubtful
SAVES = 10  # of a run, at most
# few large moves toward references; a single one, as in four steps, may be smaller (docs/toward-style.md)
EARLY_STOP, EARLY_SCALE, EARLY_SCALE_OF_FEW, FEW_STEPS = 0.2, 3.0, 2.0, 8


def make_baseline(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    n: int = 100,
    *,
    batch_size: int = 4,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    cache: bool = True,
    progress_callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Samples of a pipeline without guidance over many prompts, for ``MMDGuidance(reference, baseline=...)``.

    Made once for a pipeline and its settings, and then read from the user's cache (``$KSPEC_GUIDANCE_HOME`` or
    ``~/.cache/kspec_guidance``): for the same networks and adapters in the same precision, scheduler, prompts, ``call`` and
    ``seed``. With a function in ``call`` nothing is kept. A broken off run is continued. Of several processes with the same
    cache one makes the samples, and the others wait for them; not in a process group, which may share one model. Samples
    are not decoded.

    Args:
        pipe: any text-to-image pipeline.
        prompts: many prompts of different subjects, without words of style; by default 50 that come with this package,
            or emoji for the embedded pipeline.
        n: number of samples, spread over the prompts. More are better; 100 suffice for a style.
        batch_size: samples of a prompt that are made at once.
        seed: of the noise.
        call: further arguments of the pipeline's call, as in later runs: ``num_inference_steps``, ``guidance_scale``,
            ``height``, ``width``.
        cache: whether to read and write the cache.
        progress_callback: called with the number of samples so far, and n.

    Returns:
        ``[n, ...]`` in the shape of the pipeline's samples, as :func:`encode_reference` returns references; float32, on
        the CPU.

    Raises:
        ValueError: for no prompts, numbers below 1, a ``seed`` that is no integer, or a call that takes no steps.
        SynthesisError: if the pipeline takes no prompts, or not all of ``call``.

    Warns:
        UserWarning: if there are fewer than 8 prompts: what they have in common would count as the model's own.
    """
    call = dict(call or {})
    prompts = _prompts(pipe, prompts)
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"the prompts of a baseline are texts, got {prompts[:5]}")
    if not prompts or not is_integer(n, 1) or not is_integer(batch_size, 1):
        raise ValueError(
            f"a baseline needs prompts, and integers n and batch_size of at least 1, got {len(prompts)} prompts, {n!r} and "
            f"{batch_size!r}"
        )
    if not is_integer(seed):
        raise ValueError(f"the seed of a baseline is an integer, got {seed!r}")
    check_call(pipe, call)
    if len(set(prompts)) < FEW_PROMPTS:
        warn_user(
            f"a baseline of {len(set(prompts))} prompts knows little of what the model makes anyway: what these prompts "
            f"have in common is pushed away too; give {FEW_PROMPTS} or more"
        )
    key = _key(pipe, prompts, call, int(seed)) if cache else None
    file = None if key is None else _File(key)
    rows = [] if file is None else list(file.read()[:n])
    if len(rows) == n:
        return torch.stack(rows)
    # a process group may share one model, and then all must call it
    alone = nullcontext() if file is None or _in_process_group() else file.alone(n, progress_callback)
    with alone:
        rows = rows if file is None else list(file.read()[:n])
        guide, saved = SPARKE(variety=0), len(rows)  # plain sampling, bit for bit; the guide hands the samples over
        guide.remember = False
        try:
            with guide.attach(pipe):
                while len(rows) < n:
                    numbers = range(len(rows), min(n, len(rows) + batch_size))
                    batch = [prompts[k % len(prompts)] for k in numbers]
                    rows += list(_made(pipe, guide, batch, [int(seed) + k for k in numbers], call))
                    if progress_callback is not None:
                        progress_callback(len(rows), n)
                    if file is not None and len(rows) - saved >= max(n // SAVES, 1):
                        file.write(torch.stack(rows))
                        saved = len(rows)
        finally:  # also after Ctrl-C, so that the next call continues
            if file is not None and len(rows) > saved:
                file.write(torch.stack(rows))
    return torch.stack(rows)


def baseline_left(
    pipe: Any, prompts: Sequence[str] | None = None, n: int = 100, *, seed: int = 0, call: dict[str, Any] | None = None
) -> int:
    """Number of samples that :func:`make_baseline` with these arguments would make; the others are in the cache."""
    key = _key(pipe, _prompts(pipe, prompts), dict(call or {}), int(seed))
    return n if key is None else n - min(n, len(_File(key).read()))


def _made(pipe: Any, guide: SPARKE, prompts: list[str], seeds: list[int], call: dict[str, Any]) -> Tensor:
    """Finished samples ``[n, ...]`` of one call, which the guide hands over."""
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    guide.finished.clear()
    if len(prompts) > 1:
        pipe(prompts, generator=noise, output_type="latent", **call)
    else:
        pipe(prompts[0], generator=noise[0], output_type="latent", **call)
    if not guide.finished:
        raise ValueError(f"{type(pipe).__name__} took no denoising step with {call}; give num_inference_steps")
    found = torch.cat([f.features for f in guide.finished]).float().cpu()
    if len(found) != len(prompts):
        raise ValueError(f"{type(pipe).__name__} made {len(found)} samples of {len(prompts)} prompts; give batch_size=1")
    if not torch.isfinite(found).all():
        raise ValueError(f"{type(pipe).__name__} made NaN or infinite samples of {prompts}")
    return found


def toward_reference(
    pipe: Any,
    images: Tensor | Iterable[Image.Image] | str | os.PathLike,
    scale: float | None = None,
    *,
    call: dict[str, Any] | None = None,
    captions: Sequence[str] | bool | None = None,
    early: bool = False,
    prompts: Sequence[str] | None = None,
    n: int = 100,
    batch_size: int = 4,
    progress_callback: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> MMDGuidance:
    """A guide toward the style or domain of reference images, from a folder of them.

        settings = {"num_inference_steps": 30, "guidance_scale": 5.0}
        with toward_reference(pipe, "my references", call=settings).attach(pipe):
            images = pipe("firefighter", **settings).images

    It is :class:`MMDGuidance` with these images, encoded at the size of the call, and the pipeline's baseline with the same
    settings, which :func:`make_baseline` makes once. A pipeline without prompts makes one distribution, which is matched as
    a whole: the guide is then without a baseline.

    Args:
        pipe: any text-to-image pipeline.
        images: 20 to 50 images, see :func:`encode_reference`.
        scale: see :class:`MMDGuidance`; with ``early`` by default 3, in calls of fewer than 8 steps 2.
        call: arguments of the pipeline's call, as in later runs.
        captions: a text for each image, in their order; True for those of a folder, from ``metadata.jsonl`` or texts beside
            the images (:func:`~kspec_guidance.evaluation.image_sets.folder_captions`). A prompt is then compared with
            images of similar captions, and with samples of similar prompts of the baseline, most of all.
        early: few large moves in the first fifth of the run (``stop=0.2``) in place of many small ones. They take on more
            of a style at as many valid images, and may leave fewer different ones (docs/toward-style.md).
        prompts: of the baseline, see :func:`make_baseline`.
        n: number of samples of the baseline.
        batch_size: samples of a prompt that are made at once.
        progress_callback: called with the number of samples so far, and n.
        kwargs: further settings of :class:`MMDGuidance`.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
        ValueError: for another number of captions than images, images without a caption, or captions for a pipeline without
            prompts or whose prompts cannot be observed; for ``early`` with ``stop``, or for a pipeline without prompts; as
            :func:`encode_reference`, :func:`make_baseline` and :class:`MMDGuidance`.
    """
    call = dict(call or {})
    prompted = "prompt" in call_parameters(type(pipe))
    if early:
        if not prompted:
            raise ValueError(
                f"early=True is for a guide with a baseline; {type(pipe).__name__} takes no prompts, so leave it out"
            )
        if "stop" in kwargs:
            raise ValueError(f"early=True guides with stop={EARLY_STOP}, got stop={kwargs['stop']} too; give one of them")
        kwargs["stop"] = EARLY_STOP
        if scale is None:
            steps, _ = call_settings(pipe, call)
            scale = EARLY_SCALE if steps is None or steps >= FEW_STEPS else EARLY_SCALE_OF_FEW
    if captions is True:
        if not isinstance(images, str | os.PathLike):
            raise ValueError("captions=True reads those of a folder of images; give a text for each image, or a folder")
        captions = folder_captions(os.fspath(images))
    elif captions is False:
        captions = None
    height = call.get("height")
    size = (height, call.get("width", height)) if height and not isinstance(images, Tensor) else None
    reference = encode_reference(pipe, images, size=size)
    of_images = None
    if captions is not None:
        captions = [captions] if isinstance(captions, str) else list(captions)
        if len(captions) != len(reference) or not all(isinstance(text, str) for text in captions):
            raise ValueError(f"captions are a text for each of the {len(reference)} images, got {len(captions)}")
        of_images = _features(pipe, captions, call, batch_size) if prompted else None
        if of_images is None:  # known before a baseline is made, which takes long
            raise ValueError(
                f"guides of {type(pipe).__name__} get no features of prompts, so captions are of no use; leave them out"
            )
    if not prompted:
        return MMDGuidance(reference, scale, **kwargs)
    baseline = make_baseline(pipe, prompts, n, batch_size=batch_size, call=call, progress_callback=progress_callback)
    if of_images is not None:
        different = _prompts(pipe, prompts)
        texts = [different[k % len(different)] for k in range(n)]
        of_baseline = _features(pipe, texts, call, batch_size)
        kwargs = {"reference_prompts": of_images, "baseline_prompts": of_baseline, **kwargs}
    return MMDGuidance(reference, scale, baseline=baseline, **kwargs)


def _prompts(pipe: Any, prompts: Sequence[str] | None) -> list[str]:
    """The prompts of a pipeline's baseline; sample k has the prompt k, over and over."""
    if prompts is None:
        prompts = DEMO_PROMPTS if is_demo(pipe) else BASELINE_PROMPTS
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _features(pipe: Any, texts: Sequence[str], call: dict[str, Any], batch_size: int) -> Tensor | None:
    """Features of texts ``[n, p]`` as guides get those of prompts, by runs of a single step; None if they get none."""
    different = list(dict.fromkeys(texts))
    found = Generator(pipe, SPARKE(variety=0), call).prompt_features(different, batch_size)
    return None if found is None else found[[different.index(text) for text in texts]]


def _key(pipe: Any, prompts: list[str], call: dict[str, Any], seed: int) -> str | None:
    """Name of a baseline in the cache, by all that decides its samples; None if that cannot be told."""
    if any(callable(value) for value in call.values()):
        return None
    about = describe_pipeline(pipe)
    for name in ("denoiser", "weights"):  # for all precisions, and blind to adapters; states say more
        about.pop(name, None)
    decoder = autoencoder_of(pipe)
    networks = {
        name: part
        for name, part in getattr(pipe, "components", {}).items()
        if isinstance(part, torch.nn.Module) and part is not decoder
    }
    states = {name: state_fingerprint(part) for name, part in networks.items()}
    if None in states.values():
        return None
    return hash_json([about | {"networks": states}, prompts, as_json(call), seed], 16)


def _in_process_group() -> bool:
    """Whether this process has joined others by ``torch.distributed``."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _File:
    """The file of a baseline: safetensors, with a digest of the rows.

    Args:
        key: its name.
    """

    def __init__(self, key: str):
        self.path = calibration_file().parent / "baselines" / f"{key}.safetensors"

    def _known(self) -> Tensor | None:
        """The rows of the file; None if it is damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                about, rows = file.metadata() or {}, file.get_tensor("rows")
        except (SafetensorError, OSError):
            return None
        return rows if about.get("sha256") == hash_tensors({"rows": rows}) else None

    def read(self) -> Tensor:
        """Rows ``[k, ...]``; none if there is no file."""
        rows = self._known() if self.path.is_file() else None
        return torch.empty(0) if rows is None else rows

    @contextmanager
    def alone(self, n: int, progress: Callable[[int, int], None] | None) -> Iterator[None]:
        """Wait until no other process makes this baseline; the lock of one that died counts no longer.

        Where a folder cannot be written or locked, there is no waiting.

        Args:
            n: number of rows that are wanted.
            progress: called each second of waiting with the number of rows that there are, and ``n``.
        """
        lock = filelock.FileLock(self.path.parent.parent / "locks" / f"{self.path.stem}.lock", timeout=1)
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            while not lock.is_locked:
                try:
                    lock.acquire()
                except filelock.Timeout:
                    if progress is not None:
                        progress(min(len(self.read()), n), n)
        except (OSError, NotImplementedError):  # the latter where a platform has no locks
            pass
        try:
            yield
        finally:
            lock.release()

    def write(self, rows: Tensor) -> None:
        """Write all rows, atomically. Where that fails, a warning says so: the samples themselves are not lost."""
        about = {"sha256": hash_tensors({"rows": rows})}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as fresh:
                save_file({"rows": rows}, fresh, metadata=about)
        except (SafetensorError, OSError) as error:
            warn_user(
                f"the baseline is not kept for the next time, since {self.path.parent} cannot be written ({error}); set "
                "KSPEC_GUIDANCE_HOME to a folder that can, or cache=False"
            )
