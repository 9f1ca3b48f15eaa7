"""The work behind the page: one pipeline, a memory per visitor, plain and guided batches as they form."""

import inspect
import queue
import threading
import zipfile
from collections.abc import Callable, Iterator
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
    encode_reference,
    load_demo_pipeline,
    load_demo_reference,
)
from kspec_guidance import functional as F
from kspec_guidance.evaluation.embedders import pipeline_embedder
from kspec_guidance.guidance.spaces import Pixels, Scene
from kspec_guidance.guidance.term import Term
from kspec_guidance.kernels import GaussianKernel, median_bandwidth
from kspec_guidance.kernels.spectrum import eigenvalues
from kspec_guidance.loop.components import autoencoder_of, image_size
from kspec_guidance.objectives import Objective
from kspec_guidance.plotting import side_by_side
from kspec_guidance.statistics import jackknife

METHODS = ("SPARKE", "SPARKE, order 0.5", "Novelty", "MMD", "SPARKE + MMD")
REFERENCES = ("twemoji", "noto", "dark-skin-tone", "light-skin-tone")
MOST_PROMPTS, MOST_EACH, MOST_STEPS = 6, 8, 30
MOST_MEMORY = 2000  # images that a visitor's memory holds
PREVIEW_EVERY = 2


class Stopped(Exception):
    """The visitor pressed stop, or left."""


class InputError(ValueError):
    """What was asked for cannot be done; the message is for the visitor."""


@dataclass
class Visitor:
    """What one visitor has made: nothing of it is seen by another."""

    memory: MemoryBank = field(default_factory=lambda: MemoryBank(limit=MOST_MEMORY))
    stops: int = 0  # how often stop was pressed: work that began before the last time ends at its next step


class Watcher(Objective):
    """Moves nothing: it is shown the clean predictions of every step."""

    unit = False

    def __init__(self, seen: Any):
        self.seen = seen

    def gradient(self, x: Tensor, t: Any = None, memory: Any = None, jitter: Any = None) -> Tensor:
        self.seen(x)
        return torch.zeros_like(x)


@dataclass
class Panel:
    """One batch: pictures ``[prompt][image]``, features ``[n, d]``, and the Vendi score within prompts at each step."""

    rows: list[list[Image.Image]] = field(default_factory=list)
    features: Tensor | None = None
    curve: list[float] = field(default_factory=list)


@dataclass
class Progress:
    """What there is to show so far."""

    panels: dict[str, Panel]
    prompts: list[str]
    text: str
    done: bool = False

    def picture(self, name: str, folder: Path) -> str | None:
        """The file of a panel's picture, each time another: one that is being sent is never written again."""
        rows = self.panels[name].rows
        if not rows:
            return None
        path = folder / f"{name}-{len(list(folder.iterdir()))}.png"
        side_by_side({name: rows}, self.prompts, "").save(path)
        return str(path)


def read_prompts(text: str) -> list[str]:
    """One prompt a line.

    Raises:
        InputError: without any, or for too many or too long ones.
    """
    prompts = [line.strip() for line in (text or "").splitlines() if line.strip()]
    if not prompts:
        raise InputError("Write at least one prompt, one on each line.")
    if len(prompts) > MOST_PROMPTS:
        raise InputError(f"At most {MOST_PROMPTS} prompts at once; there are {len(prompts)}.")
    if max(map(len, prompts)) > 300:
        raise InputError("A prompt has at most 300 characters.")
    return prompts


def within(x: Tensor, prompts: int) -> float:
    """Mean Vendi score of the images of one prompt, by a Gaussian kernel at the median distance of all."""
    x = torch.nn.functional.normalize(x.flatten(1).double(), dim=1)
    kernel = GaussianKernel(median_bandwidth(x))
    return float(sum(F.vendi_score(part, kernel) for part in x.chunk(prompts)) / prompts)


class Studio:
    """A pipeline, taken by one visitor at a time.

    Args:
        model: a folder or a hub id with safetensors weights, of a text-to-image pipeline; None for the embedded one.
        size: height and width of its pictures; None for the model's own.

    Raises:
        ValueError: for a pipeline of another kind.
    """

    def __init__(self, model: str | None = None, size: int | None = None):
        self.demo = model is None
        if model is None:
            self.pipe: Any = load_demo_pipeline()
        else:
            self.pipe = self._load(model)
        self.pipe.set_progress_bar_config(disable=True)
        self.more: dict[str, Any] = {}
        if "use_resolution_binning" in inspect.signature(type(self.pipe).__call__).parameters:
            self.more["use_resolution_binning"] = False  # pictures of the size asked for, as the references are
        self.side = size or (image_size(self.pipe) or (1024, 1024))[0]  # of the pictures, in pixels
        self.embed = pipeline_embedder(self.pipe, min(256, self.side))
        self.lock = threading.Lock()

    @staticmethod
    def _load(model: str) -> Any:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
        takes = inspect.signature(type(pipe).__call__).parameters
        missing = {"prompt", "num_images_per_prompt", "height", "width", "generator"} - set(takes)
        if missing or autoencoder_of(pipe) is None:
            raise ValueError(
                f"{model} holds a {type(pipe).__name__}; this page needs a text-to-image pipeline with an autoencoder"
                + (f", and its call does not take {', '.join(sorted(missing))}" if missing else "")
            )
        return pipe.to("cuda") if torch.cuda.is_available() else pipe

    def reference(self, chosen: str, pictures: list[Image.Image]) -> Tensor:
        """Samples of the loop ``[m, ...]`` of the uploaded pictures, or of the chosen set."""
        if pictures:
            if len(pictures) < 4:
                raise InputError(
                    f"A reference set needs at least 4 pictures; {len(pictures)} were uploaded. Tens are better."
                )
            with self.lock:
                return encode_reference(self.pipe, pictures, size=self.side)
        if not self.demo:
            raise InputError("Upload reference pictures: this model has no sets of its own.")
        if chosen not in REFERENCES:
            raise InputError(f"There is no reference set {chosen!r}.")
        with self.lock:
            return encode_reference(self.pipe, load_demo_reference(chosen))

    def guide(self, method: str, strength: float, visitor: Visitor, reference: Tensor | None) -> KernelGuidance:
        memory = visitor.memory
        if method.startswith("SPARKE, order"):
            return SPARKE(strength, order=0.5, memory=memory)
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
        self, visitor: Visitor, prompts: list[str], each: int, method: str, strength: float, seed: int, steps: int,
        reference: Tensor | None, remember: bool,
    ) -> Iterator[Progress]:  # fmt: skip
        """Both batches, shown as they form. Stopping or closing the iterator leaves the memory as it was.

        Raises:
            InputError: for settings out of bounds.
        """
        if not 1 <= each <= MOST_EACH or not 1 <= steps <= MOST_STEPS or not 0 <= strength <= 10:
            raise InputError(f"At most {MOST_EACH} images of a prompt, {MOST_STEPS} steps, and a strength of 0 to 10.")
        guide = self.guide(method, strength, visitor, reference)
        guide.remember = remember
        state = Progress({"plain": Panel(), "guided": Panel()}, prompts, "Waiting for the model")
        told: queue.Queue = queue.Queue()
        stop, begun = threading.Event(), visitor.stops
        stopped = lambda: stop.is_set() or visitor.stops != begun  # noqa: E731

        def work() -> None:
            try:
                with self.lock:
                    for name, terms in (("plain", []), ("guided", guide.terms)):
                        self._batch(state, name, terms, guide, each, seed, steps, told, stopped)
                told.put(None)
            except BaseException as error:
                told.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield state
            while (item := told.get()) is not None:
                if isinstance(item, Stopped):
                    state.text = f"Stopped. Memory: {len(visitor.memory)} images."
                    yield state
                    return
                if isinstance(item, BaseException):
                    raise item
                yield state
            state.done = True
            state.text = f"Done: {len(prompts) * each} images of each kind. Memory: {len(visitor.memory)} images."
            yield state
        finally:
            stop.set()
            worker.join()

    def _batch(
        self, state: Progress, name: str, terms: list[Term], guide: KernelGuidance, each: int, seed: int, steps: int,
        told: queue.Queue, stopped: Callable[[], bool],
    ) -> None:  # fmt: skip
        panel, count = state.panels[name], len(state.prompts)

        def seen(x0: Tensor) -> None:
            if stopped():
                raise Stopped
            panel.curve.append(within(x0, count) if each > 1 else 1.0)
            state.text = f"{name}: step {len(panel.curve)} of {steps}"
            if len(panel.curve) % (PREVIEW_EVERY if self.demo else 5) == 0:
                panel.rows = self._decode(x0.view(len(x0), *memory.shape), each)
                told.put(state)

        memory = guide.memory if terms else MemoryBank()
        both = KernelGuidance(terms=[*terms, Term(Watcher(seen), 1.0, transforms=(), memory=memory)])
        both.remember = bool(terms) and guide.remember
        seeds = [torch.Generator().manual_seed(seed + k) for _ in state.prompts for k in range(each)]
        with both.attach(self.pipe):
            made = self.pipe(
                state.prompts, num_images_per_prompt=each, num_inference_steps=steps, guidance_scale=5.0, generator=seeds,
                height=self.side, width=self.side, **self.more,
            ).images  # fmt: skip
        panel.rows = [made[k : k + each] for k in range(0, len(made), each)]
        panel.features = self.embed(made)
        told.put(state)

    @torch.no_grad()
    def _decode(self, x0: Tensor, each: int) -> list[list[Image.Image]]:
        scene = Scene(self.pipe, size=(self.side, self.side))
        pixels = torch.cat([Pixels().pictures(part, scene).float() for part in x0.split(8)])
        pixels = pixels.squeeze(2) if pixels.ndim == 5 else pixels  # a picture may be a clip of one frame
        pictures = VaeImageProcessor().postprocess(pixels)
        return [pictures[k : k + each] for k in range(0, len(pictures), each)]


def score_table(state: Progress, reference: Tensor | None) -> list[list[str]]:
    """Rows of score, plain, guided; intervals are 95%, by the jackknife, from four images on."""
    panels = {name: panel.features.double() for name, panel in state.panels.items() if panel.features is not None}
    if len(panels) < 2 or len(panels["plain"]) < 2:
        return []
    kernel = GaussianKernel(median_bandwidth(panels["plain"]))
    n = len(panels["plain"])
    words = torch.eye(len(state.prompts), dtype=torch.float64).repeat_interleave(n // len(state.prompts), 0)
    scores: dict[str, Any] = {
        "Vendi score, all images": lambda x, t: F.vendi_score(x, kernel),
        "RKE, all images": lambda x, t: F.rke_score(x, kernel),
    }
    if len(state.prompts) > 1:
        scores["Conditional Vendi, within prompts"] = lambda x, t: F.conditional_vendi_score(x, t, kernel)
    table = []
    for name, score in scores.items():
        if n < 4:
            table.append([name, *(f"{float(score(x, words)):.2f}" for x in panels.values())])
            continue
        found = [jackknife(score, x, words, groups=min(10, n)) for x in panels.values()]
        table.append([name, *(f"{i.value:.2f}  [{i.low:.2f}, {i.high:.2f}]" for i in found)])
    if reference is not None and reference[0].numel() == panels["plain"].shape[1]:
        rows = reference.flatten(1).double()
        near = GaussianKernel().fit(rows)
        table.append(["Squared MMD to the reference", *(f"{float(F.mmd(x, rows, near)):.4f}" for x in panels.values())])
    return table


def spectrum(state: Progress, most: int = 10) -> list[tuple[int, float, str]]:
    """``(rank, eigenvalue, panel)`` of the kernel matrix over n, largest first."""
    found, kernel = [], None
    for name, panel in state.panels.items():
        if panel.features is None or len(panel.features) < 2:
            continue
        x = panel.features.double()
        kernel = kernel or GaussianKernel(median_bandwidth(x))
        values = eigenvalues(kernel(x) / len(x)).flip(0)[:most]
        found += [(k + 1, float(v), name) for k, v in enumerate(values)]
    return found


def pack(state: Progress, visitor: Visitor, folder: Path) -> str:
    """A zip of the images and the visitor's memory; prompts are in a text file, not in names."""
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        lines = []
        for name, panel in state.panels.items():
            for p, row in enumerate(panel.rows):
                for k, image in enumerate(row):
                    at = f"{name}/{p:02}-{k:02}.png"
                    with archive.open(at, "w") as file:
                        image.save(file, "PNG")
                    lines.append(f"{at}\t{state.prompts[p]}")
        archive.writestr("prompts.tsv", "\n".join(lines) + "\n")
        if len(visitor.memory):
            visitor.memory.save(folder / "memory.safetensors")
            archive.write(folder / "memory.safetensors", "memory.safetensors")
    return str(folder / "images.zip")


def evaluate(studio: Studio, pictures: list[Image.Image], folder: Path) -> tuple[list[list[str]], str]:
    """The scores of a set, and the path of its report page; both pictures and page are written into ``folder``."""
    from kspec_guidance.evaluation import evaluate_set
    from kspec_guidance.evaluation.image_sets import load_images
    from kspec_guidance.evaluation.page import write_page

    if len(pictures) < 3:
        raise InputError(f"Variety is a matter of several pictures: upload at least 3, not {len(pictures)}.")
    out, shown = folder / "report.html", folder / "pictures"
    shown.mkdir()
    for k, image in enumerate(pictures):
        image.thumbnail((512, 512))
        image.save(shown / f"{k:04}.png")
    with studio.lock:
        found = load_images(shown, studio.embed)
    report = evaluate_set(found, studio.embed)
    write_page(report, out)
    between = [s.interval and f"{s.interval[0]:.3f} to {s.interval[1]:.3f}" for s in report.scores]
    return [[s.score, f"{s.value:.3f}", b or ""] for s, b in zip(report.scores, between, strict=True)], str(out)
