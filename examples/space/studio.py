"""The backend of the app: one pipeline, a memory per visitor, plain and guided batches with previews."""

import inspect
import queue
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
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
)
from kspec_guidance import functional as F
from kspec_guidance.evaluation.embedders import image_embedder, pipeline_embedder
from kspec_guidance.guidance.spaces import Pixels
from kspec_guidance.guidance.term import Term
from kspec_guidance.kernels import GaussianKernel, median_bandwidth
from kspec_guidance.kernels.spectrum import eigenvalues
from kspec_guidance.loop.components import autoencoder_of, image_size
from kspec_guidance.loop.context import CallContext
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import Gradient, Objective
from kspec_guidance.plotting import side_by_side
from kspec_guidance.statistics import jackknife

METHODS = ("SPARKE", "SPARKE, order 0.5", "Novelty", "MMD", "SPARKE + MMD")
REFERENCES = ("twemoji", "noto", "dark-skin-tone", "light-skin-tone")
MAX_PROMPTS, MAX_IMAGES_PER_PROMPT, MAX_STEPS = 6, 8, 30
MAX_PROMPT_LENGTH = 300  # characters
MIN_REFERENCES = 4  # uploaded images
MEMORY_LIMIT = 2000  # images in a visitor's memory
PREVIEW_EVERY = 2  # steps of the embedded model, which is fast
PREVIEW_EVERY_SLOW = 5  # steps of any other model


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


@dataclass
class Panel:
    """One batch: images ``[prompt][k]``, features ``[n, d]``, and the mean Vendi score per prompt at each step."""

    rows: list[list[Image.Image]] = field(default_factory=list)
    features: Tensor | None = None
    curve: list[float] = field(default_factory=list)


@dataclass
class Progress:
    """The state of a run, for display."""

    panels: dict[str, Panel]
    prompts: list[str]
    text: str
    done: bool = False

    def render(self, name: str, folder: Path) -> str | None:
        """Write a panel as an image file and return its path; a new file each time, as an older one may be in transfer."""
        rows = self.panels[name].rows
        if not rows:
            return None
        path = folder / f"{name}-{len(list(folder.iterdir()))}.png"
        side_by_side({name: rows}, self.prompts, "").save(path)
        return str(path)


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


def mean_prompt_vendi(x: Tensor, prompts: int) -> float:
    """Return the mean over prompts of the Vendi score of their images.

    Args:
        x: samples ``[n, ...]``, those of one prompt after another; one Gaussian kernel at the median distance of all.
        prompts: their number.
    """
    x = torch.nn.functional.normalize(x.flatten(1).double(), dim=1)
    kernel = GaussianKernel(median_bandwidth(x))
    return float(sum(F.vendi_score(part, kernel) for part in x.chunk(prompts)) / prompts)


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
        self.embed = pipeline_embedder(self.pipe, min(256, self.size))
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

    def make_guide(self, method: str, strength: float, visitor: Visitor, reference: Tensor | None) -> KernelGuidance:
        """Make the guide of a method, with the visitor's memory.

        Raises:
            InputError: for a missing reference set, or an unknown method.
        """
        memory = visitor.memory
        if method == "SPARKE, order 0.5":
            return VendiGuidance(strength, order=0.5, memory=memory)
        if method == "SPARKE":
            return SPARKE(strength, memory=memory)
        if reference is None:
            raise InputError(f"{method} needs a reference set.")
        if method == "Novelty":
            return NoveltyGuidance(reference, strength)
        toward = MMDGuidance(reference, 0.7 * strength, memory=memory)
        if method == "MMD":
            return toward
        if method == "SPARKE + MMD":
            return SPARKE(strength / 2, memory=memory) + toward
        raise InputError(f"There is no method {method!r}; there are {', '.join(METHODS)}.")

    def generate(
        self, visitor: Visitor, prompts: list[str], images_per_prompt: int, method: str, strength: float, seed: int,
        steps: int, reference: Tensor | None, remember: bool,
    ) -> Iterator[Progress]:  # fmt: skip
        """Generate the plain and the guided batch, and yield the state at every preview.

        Stopping or closing the iterator leaves the memory unchanged.

        Raises:
            InputError: for settings outside their ranges.
        """
        if not 1 <= images_per_prompt <= MAX_IMAGES_PER_PROMPT or not 1 <= steps <= MAX_STEPS or not 0 <= strength <= 10:
            raise InputError(
                f"At most {MAX_IMAGES_PER_PROMPT} images per prompt, {MAX_STEPS} steps, and a strength from 0 to 10."
            )
        guide = self.make_guide(method, strength, visitor, reference)
        guide.remember = remember
        state = Progress({"plain": Panel(), "guided": Panel()}, prompts, "Waiting for the model")
        messages: queue.Queue[Progress | BaseException | None] = queue.Queue()  # None at the end
        closed, stop_count = threading.Event(), visitor.stop_count
        stopped = lambda: closed.is_set() or visitor.stop_count != stop_count  # noqa: E731

        def work() -> None:
            try:
                with self.lock:
                    for name, terms in (("plain", []), ("guided", guide.terms)):
                        self._batch(state, name, terms, guide, images_per_prompt, seed, steps, messages, stopped)
                messages.put(None)
            except BaseException as error:
                messages.put(error)

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
            state.done = True
            state.text = (
                f"Done: {len(prompts) * images_per_prompt} images of each kind. Memory: {len(visitor.memory)} images."
            )
            yield state
        finally:
            closed.set()
            worker.join()

    def _batch(
        self, state: Progress, name: str, terms: list[Term], guide: KernelGuidance, images_per_prompt: int, seed: int,
        steps: int, messages: queue.Queue, stopped: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Generate one batch into a panel of ``state``, and put ``state`` into ``messages`` at every preview."""
        panel, count = state.panels[name], len(state.prompts)

        def on_step(x0: Tensor) -> None:
            if stopped():
                raise Stopped
            panel.curve.append(mean_prompt_vendi(x0, count) if images_per_prompt > 1 else 1.0)
            state.text = f"{name}: step {len(panel.curve)} of {steps}"
            if len(panel.curve) % (PREVIEW_EVERY if self.demo else PREVIEW_EVERY_SLOW) == 0:
                panel.rows = self._decode(x0.view(len(x0), *memory.shape), images_per_prompt)
                messages.put(state)

        memory = guide.memory if terms else MemoryBank()
        watched = KernelGuidance.from_terms([*terms, Term(Watcher(on_step), 1.0, transforms=(), memory=memory)])
        watched.remember = bool(terms) and guide.remember
        seeds = [torch.Generator().manual_seed(seed + k) for _ in state.prompts for k in range(images_per_prompt)]
        with watched.attach(self.pipe):
            images = self.pipe(
                state.prompts, num_images_per_prompt=images_per_prompt, num_inference_steps=steps, guidance_scale=5.0,
                generator=seeds, height=self.size, width=self.size, **self.extra_arguments,
            ).images  # fmt: skip
        panel.rows = split_rows(images, images_per_prompt)
        panel.features = self.embed(images)
        messages.put(state)

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
    """Return rows of score, plain, guided, with 95% jackknife intervals from four images on."""
    panels = {name: panel.features.double() for name, panel in state.panels.items() if panel.features is not None}
    if len(panels) < 2 or len(panels["plain"]) < 2:
        return []
    kernel = GaussianKernel(median_bandwidth(panels["plain"]))
    n = len(panels["plain"])
    prompt_features = torch.eye(len(state.prompts), dtype=torch.float64)
    prompt_features = prompt_features.repeat_interleave(n // len(state.prompts), 0)
    scores: dict[str, Any] = {
        "Vendi score, all images": lambda x, t: F.vendi_score(x, kernel),
        "RKE, all images": lambda x, t: F.rke_score(x, kernel),
    }
    if len(state.prompts) > 1:
        scores["Conditional Vendi, within prompts"] = lambda x, t: F.conditional_vendi_score(x, t, kernel)
    table = []
    for name, score in scores.items():
        if n < 4:
            table.append([name, *(f"{float(score(x, prompt_features)):.2f}" for x in panels.values())])
            continue
        intervals = [jackknife(score, x, prompt_features, groups=min(10, n)) for x in panels.values()]
        table.append([name, *(f"{i.value:.2f}  [{i.low:.2f}, {i.high:.2f}]" for i in intervals)])
    if reference is not None and reference[0].numel() == panels["plain"].shape[1]:
        rows = reference.flatten(1).double()
        reference_kernel = GaussianKernel().fit(rows)
        table.append(
            ["Squared MMD to the reference", *(f"{float(F.mmd(x, rows, reference_kernel)):.4f}" for x in panels.values())]
        )
    return table


def spectrum(state: Progress, count: int = 10) -> list[tuple[int, float, str]]:
    """Return ``(rank, eigenvalue, panel)`` of the largest eigenvalues of the kernel matrix over n."""
    rows, kernel = [], None
    for name, panel in state.panels.items():
        if panel.features is None or len(panel.features) < 2:
            continue
        x = panel.features.double()
        kernel = kernel or GaussianKernel(median_bandwidth(x))
        values = eigenvalues(kernel(x) / len(x)).flip(0)[:count]
        rows += [(k + 1, float(v), name) for k, v in enumerate(values)]
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
) -> tuple[list[list[str]], str]:
    """Score a set of images; return rows of score, value, interval, and the path of a report page in ``folder``.

    The first rows are the image features and the number of different images. The page shows the notes, e.g. on files that were left out.

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
    first = [["image features", embed.name, ""], [f"different images, of {head.images}", f"{head.different:.1f}", bounds]]
    return first + rows, str(page)
