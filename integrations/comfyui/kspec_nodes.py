"""The nodes, in the V3 schema."""

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import ComfyExtension, io, ui
from PIL import Image

from kspec_guidance.functional import rke_score
from kspec_guidance.integrations.denoised import MemoryBySize
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.plotting import side_by_side

from .guide_model import baseline_prompts, diverse, encoded, matching

CATEGORY = "kspec"
Memory = io.Custom("KSPEC_MEMORY")
MEMORIES: dict[str, MemoryBySize] = {}  # of this session, by name
KERNEL = GaussianKernel(0.5)  # of rows of norm 1, as in the report of a guide
GREY_SIDE = 32  # pixels to which images are reduced for their score


def _folder(name: str) -> Path:
    """The folder of a memory, in ComfyUI's output folder.

    Raises:
        ValueError: for a name that is not a plain one.
    """
    if not re.fullmatch(r"[\w][\w .-]{0,99}", name):
        raise ValueError(f"a memory's name has letters, digits, spaces, '.', '-' and '_', got {name!r}")
    return Path(importlib.import_module("folder_paths").get_output_directory(), "kspec", name)


class Named:
    """A node with the name of a memory."""

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        """True, or what is wrong with the name."""
        try:
            _folder(name)
        except ValueError as error:
            return str(error)
        return True


class Diversity(io.ComfyNode):
    """Makes the images of a batch, and of earlier runs, differ."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSpecDiversity",
            display_name="Diversity (kspec)",
            category=CATEGORY,
            description="Images of one batch repel each other, and the images in a memory, if their prompts are similar. "
            "Needs a batch of two or more, or a memory with images of this size. Adds nothing to the prompt or the noise.",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input(
                    "variety", default=50.0, min=0.0, max=100.0, step=1.0,
                    tooltip="0: the model alone, exactly. 50: clearly more varied, at little or no loss. 100: the most.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**53 - 1, control_after_generate=False,
                    tooltip="Separates images that start from identical noise. Others do not depend on it.",
                ),
                Memory.Input(
                    "memory", optional=True, tooltip="Also repels the images of earlier runs; finished images are added."
                ),
                io.Conditioning.Input(
                    "conditioning", optional=True,
                    tooltip="What images are grouped by; by default the positive prompt of the sampler.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
            search_aliases=["variety", "SPARKE", "Vendi", "seed variance", "different images"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, variety: float, seed: int, memory: Any = None, conditioning: Any = None) -> io.NodeOutput:
        return io.NodeOutput(diverse(model, variety, seed, memory, conditioning))


class Baseline(io.ComfyNode):
    """Samples what a model makes without guidance, over many prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sampling = importlib.import_module("comfy.samplers").KSampler
        return io.Schema(
            node_id="KSpecBaseline",
            display_name="Baseline (kspec)",
            category=CATEGORY,
            description="Samples many prompts without guidance, for 'Match reference': what the model makes anyway. Takes "
            "as long as so many images, once: it runs again only if an input changes. 'Save Latent' keeps it on disk.",
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Latent.Input("latent", tooltip="Of the size of the images; its first latent is used."),
                io.Int.Input("images", default=100, min=8, max=1000, tooltip="More are better; 100 suffice for a style."),
                io.String.Input(
                    "prompts", default="", multiline=True,
                    tooltip="One per line: many subjects, no words of style. By default 50 of general subjects.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=False),
                io.Int.Input("steps", default=20, min=1, max=1000),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1),
                io.Combo.Input("sampler_name", options=sampling.SAMPLERS),
                io.Combo.Input("scheduler", options=sampling.SCHEDULERS),
            ],
            outputs=[io.Latent.Output(display_name="baseline")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, clip: Any, latent: dict[str, Any], images: int, prompts: str, seed: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str,
    ) -> io.NodeOutput:  # fmt: skip
        sample = importlib.import_module("nodes").common_ksampler
        texts = [line.strip() for line in prompts.splitlines() if line.strip()] or baseline_prompts()
        first, negative, found = latent["samples"][:1], encoded(clip, ""), []
        for k, text in enumerate(texts[:images]):
            count = images // len(texts) + (k < images % len(texts))
            batch = {"samples": first.repeat(count, *[1] * (first.ndim - 1))}
            positive = encoded(clip, text)
            made = sample(model, seed + k, steps, cfg, sampler_name, scheduler, positive, negative, batch, denoise=1.0)
            found.append(made[0]["samples"].cpu())
        return io.NodeOutput({"samples": torch.cat(found)})


class MatchReference(io.ComfyNode):
    """Moves the images of a batch toward the style of reference images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSpecMatchReference",
            display_name="Match reference (kspec)",
            category=CATEGORY,
            description="Moves images toward the style of a batch of reference images, 20 or more, away from a baseline: "
            "what the model makes anyway. Without a baseline a batch of one prompt is moved toward colours, layout and "
            "spread of the references, which hardly moves the style. The references are resized to the generated size.",
            inputs=[
                io.Model.Input("model"),
                io.Vae.Input("vae"),
                io.Image.Input("images", tooltip="Two references or more."),
                io.Float.Input(
                    "scale", default=1.0, min=0.0, max=5.0, step=0.05,
                    tooltip="0: the model alone, exactly. With a baseline 1 to 2; a large scale makes images alike.",
                ),
                io.Float.Input(
                    "stop", default=0.6, min=0.0, max=1.0, step=0.05, tooltip="End, as a fraction of the steps."
                ),
                io.Latent.Input(
                    "baseline", optional=True, tooltip="From 'Baseline (kspec)', for this model and size. A style needs it."
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL")],
            search_aliases=["MMD", "style reference", "distribution"],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, vae: Any, images: torch.Tensor, scale: float, stop: float, baseline: Any = None
    ) -> io.NodeOutput:
        latents = [vae.encode(images[k : k + 1, :, :, :3]) for k in range(len(images))]  # a batch would be a clip
        plain = None if baseline is None else baseline["samples"]
        return io.NodeOutput(matching(model, torch.cat(latents), scale, stop, plain))


class LoadMemory(Named, io.ComfyNode):
    """The memory with a name: of this session, or loaded from the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSpecLoadMemory",
            display_name="Memory (kspec)",
            category=CATEGORY,
            description="A memory of finished images, kept by name while ComfyUI runs. With 'from_file' it begins with "
            "what 'Save memory' has written.",
            inputs=[
                io.String.Input("name", default="memory"),
                io.Boolean.Input("from_file", default=False, tooltip="Read it again from its file, in each run."),
            ],
            outputs=[Memory.Output(display_name="MEMORY")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, from_file: bool) -> Any:
        memory = MEMORIES.get(name)  # workflows with it run again once it has changed
        return name, from_file, str(None if memory is None else memory.state)

    @classmethod
    def execute(cls, name: str, from_file: bool) -> io.NodeOutput:
        folder, memory = _folder(name), MEMORIES.setdefault(name, MemoryBySize())
        if from_file:
            memory.load(folder)
        return io.NodeOutput(memory)


class SaveMemory(Named, io.ComfyNode):
    """Writes a memory to the output folder, after the images that it shall contain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSpecSaveMemory",
            display_name="Save memory (kspec)",
            category=CATEGORY,
            description="Writes a memory to output/kspec/<name>, as safetensors files. Connect the images, so that it is "
            "written after them.",
            inputs=[
                Memory.Input("memory"),
                io.Image.Input("images", tooltip="Are passed on; the memory is written when they are finished."),
                io.String.Input("name", default="memory"),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, memory: Any, images: torch.Tensor, name: str) -> io.NodeOutput:
        folder = _folder(name)
        memory.save(folder)
        return io.NodeOutput(images, ui=ui.PreviewText(f"{len(memory)} images in kspec/{name}"))


class ClearMemory(io.ComfyNode):
    """Forgets the images of a memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSpecClearMemory",
            display_name="Clear memory (kspec)",
            category=CATEGORY,
            description="Empties a memory at the start of each run; its file stays.",
            inputs=[Memory.Input("memory")],
            outputs=[Memory.Output(display_name="MEMORY")],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return float("nan")  # runs each time

    @classmethod
    def execute(cls, memory: Any) -> io.NodeOutput:
        memory.clear()
        return io.NodeOutput(memory)


class Score(io.ComfyNode):
    """How many different images a batch has."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSpecScore",
            display_name="Diversity score (kspec)",
            category=CATEGORY,
            description="The effective number of different images in a batch (RKE): 1 for copies, n for n unrelated "
            "images. With a CLIP vision model it compares contents, otherwise pixels. It does not see whether an "
            "image is good.",
            inputs=[io.Image.Input("images"), io.ClipVision.Input("clip_vision", optional=True)],
            outputs=[
                io.Float.Output(display_name="score"),
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="plot", tooltip="Similarity of each pair of images: dark is alike."),
            ],
            is_output_node=True,
            search_aliases=["Vendi", "RKE", "variety"],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, clip_vision: Any = None) -> io.NodeOutput:
        if clip_vision is None:
            small = torch.nn.functional.interpolate(
                images[..., :3].movedim(-1, 1).float(), size=(GREY_SIDE, GREY_SIDE), mode="area"
            )
            rows, space = small.flatten(1) * 2 - 1, "pixels"
        else:
            rows, space = clip_vision.encode_image(images)["image_embeds"].float(), "CLIP vision"
            rows = rows - rows.mean(0) if len(rows) > 1 else rows  # embeddings of all images share a large part
        rows = torch.nn.functional.normalize(rows.cpu(), dim=1)
        score = float(rke_score(rows, KERNEL))
        text = f"{score:.2f} different images of {len(rows)} ({space})"
        return io.NodeOutput(score, text, _heat_map(KERNEL(rows, rows)), ui=ui.PreviewText(text))


def _heat_map(similarity: torch.Tensor, side: int = 512) -> torch.Tensor:
    """An image ``[1, h, w, 3]`` of a matrix of values in 0..1: dark for 1."""
    cells = (1 - similarity.clamp(0, 1))[None, None]
    return torch.nn.functional.interpolate(cells, size=(side, side), mode="nearest")[0, 0, None, :, :, None].repeat(
        1, 1, 1, 3
    )


class Grid(io.ComfyNode):
    """Samples the same seeds with several strengths."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sampling = importlib.import_module("comfy.samplers").KSampler
        return io.Schema(
            node_id="KSpecGrid",
            display_name="Diversity grid (kspec)",
            category=CATEGORY,
            description="Samples one batch with each variety, all from the same noise: a row for each variety, a column "
            "for each seed.",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent", tooltip="Its first latent gives size and content of all images."),
                io.Vae.Input("vae"),
                io.String.Input("varieties", default="0, 25, 50, 100"),
                io.Int.Input("images", default=4, min=2, max=64, tooltip="Columns: the images of each batch."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=1000),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1),
                io.Combo.Input("sampler_name", options=sampling.SAMPLERS),
                io.Combo.Input("scheduler", options=sampling.SCHEDULERS),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
            ],
            outputs=[
                io.Image.Output(display_name="grid"),
                io.Image.Output(display_name="images", tooltip="All images, row by row."),
            ],
        )

    @classmethod
    def validate_inputs(cls, varieties: str) -> bool | str:
        try:
            _numbers(varieties)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: dict[str, Any], vae: Any, varieties: str, images: int,
        seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, denoise: float,
    ) -> io.NodeOutput:  # fmt: skip
        sample = importlib.import_module("nodes").common_ksampler
        first = latent["samples"][:1]
        batch = {**latent, "samples": first.repeat(images, *[1] * (first.ndim - 1))}
        batch.pop("batch_index", None)
        rows, decoded = {}, []
        for value in _numbers(varieties):
            found = sample(
                diverse(model, value), seed, steps, cfg, sampler_name, scheduler, positive, negative, batch, denoise=denoise
            )[0]["samples"]
            pixels = vae.decode(found)
            pixels = pixels if pixels.ndim == 4 else pixels[:, 0]  # of a clip its first frame
            decoded.append(pixels)
            rows[f"{value:g}"] = [Image.fromarray((p.clamp(0, 1) * 255).round().byte().cpu().numpy()) for p in pixels]
        tile = min(max(decoded[0].shape[1:3]), 256)
        sheet = side_by_side({"": list(rows.values())}, list(rows), f"variety, seed {seed}", tile=tile)
        grid = torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]
        return io.NodeOutput(grid, torch.cat(decoded))


def _numbers(text: str) -> list[float]:
    """Varieties in 0 to 100, separated by commas.

    Raises:
        ValueError: for anything else.
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(0 <= value <= 100 for value in found):
        raise ValueError(f"varieties must be numbers from 0 to 100, separated by commas, got {text!r}")
    return found


NODES: list[type[io.ComfyNode]] = [Diversity, MatchReference, Baseline, LoadMemory, SaveMemory, ClearMemory, Score, Grid]


class KSpecExtension(ComfyExtension):
    """All nodes, for ComfyUI's loader."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes."""
        return NODES


async def comfy_entrypoint() -> KSpecExtension:
    """What ComfyUI calls to load the nodes."""
    return KSpecExtension()
