"""The backend of the app: one pipeline, a memory per visitor, plain and guided batches side by side with previews."""

import base64
import copy
import html
import inspect
import io
import math
import queue
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from kspec_guidance import (
    SPARKE,
    KernelGuidance,
    MemoryBank,
    MMDGuidance,
    NoveltyGuidance,
    VendiGuidance,
    encode_reference,
    load_demo_pipeline,
    load_demo_reference,
    make_baseline,
)
from kspec_guidance import functional as F
from kspec_guidance.baseline import EARLY_SCALE, EARLY_SCALE_OF_FEW, EARLY_STOP, FEW_STEPS
from kspec_guidance.demo import unknown_words
from kspec_guidance.evaluation.embedders import image_embedder
from kspec_guidance.evaluation.judges import demo_judge
from kspec_guidance.guidance.presets import DEFAULT_VARIETY
from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.guidance.spaces import Pixels
from kspec_guidance.guidance.term import Term
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel
from kspec_guidance.loop.components import autoencoder_of, image_size
from kspec_guidance.loop.context import CallContext
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import Gradient, Objective

METHODS = ("SPARKE", "SPARKE, order 0.5", "Novelty", "MMD", "MMD, large early moves", "SPARKE + MMD")
WITH_REFERENCE = METHODS[2:]
REFERENCES = ("twemoji", "noto", "dark-skin-tone", "light-skin-tone")
MAX_PROMPTS, MAX_IMAGES_PER_PROMPT, MAX_STEPS = 6, 8, 30
MAX_PROMPT_LENGTH = 300  # characters
MIN_REFERENCES = 4  # uploaded images
MEMORY_LIMIT = 2000  # images in a visitor's memory
BASELINE, BASELINE_BATCH = 100, 10  # samples of a model without guidance, and of these at once
BASELINE_STEPS, BASELINE_STEPS_SLOW = 8, 20  # of the embedded model, and of any other
GUIDANCE_SCALE = 5.0
PREVIEW_EVERY = 2  # steps of the embedded model, which is fast
PREVIEW_EVERY_SLOW = 5  # steps of any other model
LABELS = {"plain": "without guidance", "guided": "with guidance"}
TILE = 256  # largest side of an image on the page, in pixels; the zip has the full size


class Stopped(Exception):
    """The visitor pressed stop or left the page."""


class InputError(ValueError):
    """An invalid input; the message is shown to the visitor."""


@dataclass
class Visitor:
    """The state of one visitor, not shared with others."""

    memory: MemoryBank = field(default_factory=lambda: MemoryBank(limit=MEMORY_LIMIT))
    stop_count: int = 0  # clicks on stop; a run that began with a lower count ends at its next step


class Watcher(Objective):
    """An objective with zero gradient, which passes the clean predictions ``[n, d]`` of each step to a callback."""

    normalize = False

    def __init__(self, callback: Callable[[Tensor], None]):
        self.callback = callback

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Any = None,
    ) -> Gradient:
        self.callback(x)
        return Gradient(torch.zeros_like(x))


class Turns:
    """Lets threads run one at a time, in a fixed order, each until it ends its turn."""

    def __init__(self, names: Iterable[str]):
        self.order, self.changed = list(names), threading.Condition()

    def wait(self, name: str) -> None:
        """Wait for the turn of a thread."""
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] == name)

    def end(self, name: str, last: bool = False) -> None:
        """End a turn; after the last one the thread is not waited for."""
        with self.changed:
            self.order.remove(name)
            self.order += [] if last else [name]
            self.changed.notify_all()


@dataclass
class Panel:
    """One batch: images ``[prompt][k]``, and how many different images a prompt has at each step."""

    rows: list[list[Image.Image]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)


@dataclass
class Progress:
    """The state of a run, for display.

    The report is that of a finished run, with the figures of both batches; the agreement of each batch with its prompts
    is in 0..100, where that can be judged.
    """

    panels: dict[str, Panel]
    prompts: list[str]
    images_per_prompt: int
    text: str
    report: GuidanceReport | None = None
    agreement: dict[str, float] = field(default_factory=dict)

    def board(self) -> str:
        """The images as HTML: for each prompt those without and those with guidance, beside or below each other."""
        n = self.images_per_prompt
        columns = n if n <= 6 else math.ceil(n / 2)
        parts = []
        for p, prompt in enumerate(self.prompts):
            kinds = []
            for name, panel in self.panels.items():
                tiles = [
                    f'<img alt="{html.escape(prompt)}, {LABELS[name]}, {k + 1}" src="{data_uri(image)}">'
                    for k, image in enumerate(panel.rows[p] if panel.rows else [])
                ] or ["<span></span>"] * n
                grid = f'<div class="tiles" style="--columns:{columns}">{"".join(tiles)}</div>'
                kinds.append(f"<figure><figcaption>{LABELS[name]}</figcaption>{grid}</figure>")
            parts.append(f'<section><h3>{html.escape(prompt)}</h3><div class="pair">{"".join(kinds)}</div></section>')
        return f'<div class="board">{"".join(parts)}</div>'


def data_uri(image: Image.Image) -> str:
    """An image as a data URI, at most :data:`TILE` pixels wide."""
    image, out = image.copy(), io.BytesIO()
    image.thumbnail((TILE, TILE))
    image.save(out, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def read_prompts(text: str) -> list[str]:
    """Return the prompts of ``text``, one per line.

    Raises:
        InputError: for no prompts, too many, or one that is too long.
    """
    prompts = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not prompts:
        raise InputError("Write at least one prompt, one per line.")
    if len(prompts) > MAX_PROMPTS:
        raise InputError(f"At most {MAX_PROMPTS} prompts at once; there are {len(prompts)}.")
    if max(map(len, prompts)) > MAX_PROMPT_LENGTH:
        raise InputError(f"A prompt has at most {MAX_PROMPT_LENGTH} characters.")
    return prompts


def mean_different(x: Tensor, prompts: int) -> float:
    """The figure of :class:`GuidanceReport` for samples of a step: effective number of different images, mean over prompts.

    Args:
        x: samples ``[n, ...]``, those of one prompt after another.
        prompts: their number.
    """
    x = torch.nn.functional.normalize(x.flatten(1).cpu().double(), dim=1)
    kernel = GaussianKernel(IMAGE_BANDWIDTH)
    return float(sum(F.rke_score(part, kernel) for part in x.chunk(prompts)) / prompts)


def copy_with_shared_weights(pipe: Any) -> Any:
    """A copy of a pipeline that has the same tensors as weights, so that two calls can be in progress at once."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return copy.deepcopy(pipe, {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())})


class Studio:
    """A pipeline that serves one visitor at a time.

    Args:
        model: folder or hub id of a text-to-image pipeline with safetensors weights; None for the embedded one.
        size: height and width of images in pixels; None for the model's default.

    Raises:
        ValueError: for another kind of pipeline.
    """

    def __init__(self, model: str | None = None, size: int | None = None):
        self.demo = model is None
        if model is None:
            self.pipe: Any = load_demo_pipeline()
        else:
            self.pipe = self._load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.extra_arguments: dict[str, Any] = {}
        if "use_resolution_binning" in inspect.signature(type(self.pipe).__call__).parameters:
            self.extra_arguments["use_resolution_binning"] = False  # images of the same size as the references
        self.size = size or (image_size(self.pipe) or (1024, 1024))[0]
        self.pipes = {"plain": copy_with_shared_weights(self.pipe), "guided": self.pipe}
        self.lock = threading.Lock()

    @staticmethod
    def _load(model: str) -> Any:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
        parameters = inspect.signature(type(pipe).__call__).parameters
        missing = {"prompt", "num_images_per_prompt", "height", "width", "generator"} - set(parameters)
        if missing or autoencoder_of(pipe) is None:
            raise ValueError(
                f"{model} is a {type(pipe).__name__}; this app needs a text-to-image pipeline with an autoencoder"
                + (f", and its call has no argument {', '.join(sorted(missing))}" if missing else "")
            )
        return pipe.to("cuda") if torch.cuda.is_available() else pipe

    def reference(self, name: str, images: list[Image.Image]) -> Tensor:
        """Encode the uploaded images, or without any the reference set of that name, as samples ``[m, ...]`` of the loop.

        Raises:
            InputError: for too few images, or an unknown name.
        """
        if images:
            if len(images) < MIN_REFERENCES:
                raise InputError(
                    f"A reference set needs at least {MIN_REFERENCES} images, better tens; {len(images)} were uploaded."
                )
            with self.lock:
                return encode_reference(self.pipe, images, size=self.size)
        if not self.demo:
            raise InputError("Upload reference images: there are no reference sets for this model.")
        if name not in REFERENCES:
            raise InputError(f"There is no reference set {name!r}.")
        with self.lock:
            return encode_reference(self.pipe, load_demo_reference(name))

    def unknown_words(self, prompts: list[str]) -> list[str]:
        """Words that the embedded model never saw."""
        return list(dict.fromkeys(word for prompt in prompts for word in unknown_words(self.pipe, prompt)))

    def make_guide(
        self, method: str, variety: float, visitor: Visitor, reference: Tensor | None, steps: int,
        progress_callback: Callable[[int, int], None],
    ) -> KernelGuidance:  # fmt: skip
        """Make the guide of a method, with the visitor's memory. That of MMD first needs the model for its baseline.

        The strength is SPARKE's dial. Other methods have no such unit: there 50 is their default scale. Of two methods
        together SPARKE gets half, since both move the same images.

        Raises:
            InputError: for a missing reference set, or an unknown method.
        """
        if method not in METHODS:
            raise InputError(f"There is no method {method!r}; there are {', '.join(METHODS)}.")
        memory, scale = visitor.memory, variety / DEFAULT_VARIETY
        if method == "SPARKE, order 0.5":
            return VendiGuidance(scale, order=0.5, memory=memory)
        if method == "SPARKE":
            return SPARKE(variety=variety, memory=memory)
        if reference is None:
            raise InputError(f"{method} needs a reference set.")
        if method == "Novelty":
            return NoveltyGuidance(reference, scale)
        early: dict[str, Any] = {}
        if method == "MMD, large early moves":  # as toward_reference(early=True)
            scale, early = scale * (EARLY_SCALE if steps >= FEW_STEPS else EARLY_SCALE_OF_FEW), {"stop": EARLY_STOP}
        toward = MMDGuidance(reference, scale, memory=memory, baseline=self._baseline(progress_callback), **early)
        return SPARKE(variety=variety / 2, memory=memory) + toward if method == "SPARKE + MMD" else toward

    def _baseline(self, progress_callback: Callable[[int, int], None]) -> Tensor:
        """Images of the model without guidance ``[b, ...]``, which are made once; a run that was stopped goes on."""
        call = {
            "num_inference_steps": BASELINE_STEPS if self.demo else BASELINE_STEPS_SLOW, "guidance_scale": GUIDANCE_SCALE,
            "height": self.size, "width": self.size, **self.extra_arguments,
        }  # fmt: skip
        batch_size = BASELINE_BATCH if self.demo else 1
        return make_baseline(self.pipe, n=BASELINE, batch_size=batch_size, call=call, progress_callback=progress_callback)

    def generate(
        self, visitor: Visitor, prompts: list[str], images_per_prompt: int, method: str, variety: float, seed: int,
        steps: int, reference: Tensor | None, remember: bool,
    ) -> Iterator[Progress]:  # fmt: skip
        """Generate the plain and the guided batch, taking turns step by step, and yield the state at every preview.

        Stopping or closing the iterator leaves the memory unchanged.

        Raises:
            InputError: for settings outside their ranges.
        """
        if not 1 <= images_per_prompt <= MAX_IMAGES_PER_PROMPT or not 1 <= steps <= MAX_STEPS or not 0 <= variety <= 100:
            raise InputError(
                f"At most {MAX_IMAGES_PER_PROMPT} images per prompt, {MAX_STEPS} steps, and a variety from 0 to 100."
            )
        state = Progress({name: Panel() for name in self.pipes}, prompts, images_per_prompt, "Waiting for the model.")
        messages: queue.Queue[Progress | BaseException | None] = queue.Queue()  # None at the end
        closed, stop_count = threading.Event(), visitor.stop_count
        turns, failures, reports = Turns(self.pipes), [], {}
        stopped = lambda: bool(closed.is_set() or visitor.stop_count != stop_count or failures)  # noqa: E731

        def of_baseline(done: int, total: int) -> None:
            if stopped():
                raise Stopped
            state.text = f"Images of the model itself, made once for it: {done} of {total}."
            messages.put(state)

        def batch(name: str, guide: KernelGuidance) -> None:
            try:
                turns.wait(name)
                terms = guide.terms if name == "guided" else []
                reports[name] = self._batch(state, name, terms, guide, seed, steps, messages, turns, stopped)
            except BaseException as error:
                failures.append(error)
            finally:
                turns.end(name, last=True)

        def work() -> None:
            try:
                with self.lock:
                    guide = self.make_guide(method, variety, visitor, reference, steps, of_baseline)
                    guide.remember = remember
                    threads = [threading.Thread(target=batch, args=(name, guide), daemon=True) for name in self.pipes]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
            except BaseException as error:
                failures.append(error)
            messages.put(failures[0] if failures else None)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield state
            while (message := messages.get()) is not None:
                if isinstance(message, Stopped):
                    state.text = f"Stopped. Memory: {len(visitor.memory)} images."
                    yield state
                    return
                if isinstance(message, BaseException):
                    raise message
                yield state
            report = reports["guided"]
            report.finished_plain = reports["plain"].finished
            report.strengths = [("variety", variety)]  # the dial on the page
            report.moves = [move for move in report.moves if move[1].any()] or (report.moves if variety else [])
            state.report = report
            state.agreement = self._agreement(state)
            made = f"Done: {len(prompts) * images_per_prompt} images of each kind."
            state.text = f"{made} Memory: {len(visitor.memory)} images.\n{report}"
            yield state
        finally:
            closed.set()
            worker.join()

    def _batch(
        self, state: Progress, name: str, terms: list[Term], guide: KernelGuidance, seed: int, steps: int,
        messages: queue.Queue, turns: Turns, stopped: Callable[[], bool],
    ) -> GuidanceReport:  # fmt: skip
        """Generate one batch into a panel of ``state``, ending the turn at each step, and return the report of the run.

        ``state`` is put into ``messages`` at every preview of the guided batch, when that of the plain one is there.
        """
        panel, count, images_per_prompt = state.panels[name], len(state.prompts), state.images_per_prompt

        def on_step(x0: Tensor) -> None:
            if stopped():
                raise Stopped
            watch = watched.report().context.time
            begin = watch.now()
            panel.curve.append(mean_different(x0, count))
            if len(panel.curve) % (PREVIEW_EVERY if self.demo else PREVIEW_EVERY_SLOW) == 0:
                panel.rows = self._decode(x0.view(len(x0), *memory.shape), images_per_prompt)
                if name == "guided":
                    state.text = f"Step {len(panel.curve)} of {steps}, without and with guidance."
                    messages.put(state)
            turns.end(name)
            turns.wait(name)
            watch.spans.append((watch.now(), begin))  # the other way round: taken off the time of guidance

        pipe, memory = self.pipes[name], guide.memory if terms else MemoryBank()
        watched = KernelGuidance.from_terms([*terms, Term(Watcher(on_step), 1.0, transforms=(), memory=memory)])
        watched.remember = bool(terms) and guide.remember
        seeds = [torch.Generator().manual_seed(seed + k) for _ in state.prompts for k in range(images_per_prompt)]
        with watched.attach(pipe):
            images = pipe(
                state.prompts, num_images_per_prompt=images_per_prompt, num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE, generator=seeds, height=self.size, width=self.size, **self.extra_arguments,
            ).images  # fmt: skip
        panel.rows = split_rows(images, images_per_prompt)
        return watched.report()

    def _agreement(self, state: Progress) -> dict[str, float]:
        """Mean agreement of the images of each panel with their prompts, of the prompts that the embedded model knows."""
        if not self.demo:
            return {}
        judge, found = demo_judge(), {}
        for name, panel in state.panels.items():
            images = [image for row in panel.rows for image in row]
            prompts = [p for p, row in zip(state.prompts, panel.rows, strict=True) for _ in row]
            values = judge.agreement(judge.images(images), prompts)
            if values.isfinite().any():
                found[name] = float(values.nanmean())
        return found

    @torch.no_grad()
    def _decode(self, x0: Tensor, images_per_prompt: int) -> list[list[Image.Image]]:
        """Decode clean predictions ``[n, ...]`` to images ``[prompt][k]``."""
        context = CallContext(self.pipe, size=(self.size, self.size))
        pixels = torch.cat([Pixels().decode(part, context).float() for part in x0.split(8)])
        pixels = pixels.squeeze(2) if pixels.ndim == 5 else pixels  # some autoencoders return clips of one frame
        return split_rows(VaeImageProcessor().postprocess(pixels), images_per_prompt)


def split_rows(images: list[Image.Image], images_per_prompt: int) -> list[list[Image.Image]]:
    """Split images into rows of one prompt each."""
    return [images[k : k + images_per_prompt] for k in range(0, len(images), images_per_prompt)]


def score_table(state: Progress, reference: Tensor | None) -> list[list[str]]:
    """Rows of name, plain, guided of a finished run: its report, prompt agreement, and the distance to a reference set."""
    report, rows = state.report, []
    assert report is not None
    if report.plain is not None and report.guided is not None:
        rows.append(["Different images of a prompt", f"{report.plain:.1f}", f"{report.guided:.1f}"])
    if report.plain_interval and report.guided_interval:
        rows.append(
            ["95% interval", *("{:.1f} to {:.1f}".format(*i) for i in (report.plain_interval, report.guided_interval))]
        )
    if len(state.agreement) == len(state.panels):
        rows.append(["Images that show their prompt", *(f"{state.agreement[name]:.0f}%" for name in state.panels)])
    if reference is not None:
        y = reference.flatten(1).cpu().double()
        kernel = GaussianKernel().fit(y)
        samples = [x.flatten(1).cpu().double() for x in (report.finished_plain, report.finished)]
        rows.append(["Squared MMD to the reference", *(f"{float(F.mmd(x, y, kernel)):.4f}" for x in samples)])
    return rows


def pack(state: Progress, visitor: Visitor, folder: Path) -> str:
    """Write a zip of the images and the visitor's memory, and return its path; prompts are not used in file names."""
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        lines = []
        for name, panel in state.panels.items():
            for p, row in enumerate(panel.rows):
                for k, image in enumerate(row):
                    path = f"{name}/{p:02}-{k:02}.png"
                    with archive.open(path, "w") as file:
                        image.save(file, "PNG")
                    lines.append(f"{path}\t{state.prompts[p]}")
        archive.writestr("prompts.tsv", "\n".join(lines) + "\n")
        if len(visitor.memory):
            visitor.memory.save(folder / "memory.safetensors")
            archive.write(folder / "memory.safetensors", "memory.safetensors")
    return str(folder / "images.zip")


def evaluate(
    studio: Studio, images: list[Image.Image], folder: Path, notes: Sequence[str] = ()
) -> tuple[list[list[str]], str, str]:
    """Score a set of images; return rows of score, value, interval, the path of a report page in ``folder``, and the name
    of the image features.

    The first row is the number of different images. The page shows the notes, e.g. on files that were left out.

    Raises:
        InputError: for fewer than 3 images.
    """
    from kspec_guidance.evaluation import evaluate_set
    from kspec_guidance.evaluation.image_sets import load_images
    from kspec_guidance.evaluation.page import write_page

    if len(images) < 3:
        raise InputError(f"Scores need several images: upload at least 3, not {len(images)}.")
    page, image_folder = folder / "report.html", folder / "the uploaded set"  # the report has the folder's name
    image_folder.mkdir()
    for k, image in enumerate(images):
        image.thumbnail((512, 512))
        image.save(image_folder / f"{k:04}.png")
    with studio.lock:
        embed = image_embedder("auto")  # uploads are any images, which the pipeline's own autoencoder tells apart badly
        image_set = load_images(image_folder, embed)
    report = evaluate_set(image_set, embed)
    write_page(report, page, notes)
    intervals = ["" if s.interval is None else f"{s.interval[0]:.3f} to {s.interval[1]:.3f}" for s in report.scores]
    rows = [[s.score, f"{s.value:.3f}", i] for s, i in zip(report.scores, intervals, strict=True)]
    head = report.headline
    bounds = "" if head.low is None else f"{head.low:.1f} to {head.high:.1f}"
    first = [f"different images, of {head.images}", f"{head.different:.1f}", bounds]
    return [first, *rows], str(page), embed.name
