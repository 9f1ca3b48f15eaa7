"""A pipeline out of its class's own signature and the rules of its family."""

import inspect
import re
from typing import Any

import diffusers
import diffusers.guiders
import torch

from tests.tiny import encoders, families, inputs, models

SCHEDULERS = {
    "KarrasDiffusionSchedulers": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "SchedulerMixin": ("DDIMScheduler", {"clip_sample": False}),
    "DDIMScheduler": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}


# components that a pipeline does without
LEFT_OUT = {
    "safety_checker", "image_encoder", "feature_extractor", "image_processor", "watermarker", "transformer_2",
    "prompt_enhancer",
    "prompt_enhancer_head", "processor", "audio_tokenizer", "audio_token_detokenizer", "pe", "pe_tokenizer",
    "ocr_guider", "audio_scheduler",
}  # fmt: skip


def pipeline_names() -> list[str]:
    """Every pipeline class that diffusers exports, classic and modular."""
    found = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if inspect.isclass(cls) and name not in ("DiffusionPipeline", "ModularPipeline"):
            found.append(name)
    return found


def candidates(annotation: Any) -> list[str]:
    """Class names in an annotation, in order."""
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return [word.rpartition(".")[2] for word in re.findall(r"[A-Za-z_][A-Za-z0-9_.]*", text)]


def scheduler(cls: str, **more: Any) -> Any:
    cls, settings = SCHEDULERS.get(cls, (cls, {}))
    return getattr(diffusers, cls)(**(settings | more))


def part(names: list[str], override: Any) -> Any:
    """A component of the first class that can be made; ``override`` is a class name, settings, or both."""
    more: dict[str, Any] = {}
    if isinstance(override, tuple):
        override, more = override
    if isinstance(override, str):
        names = [override]
    elif isinstance(override, dict):
        more = override
    for name in names:
        torch.manual_seed(0)
        if name in encoders.PROCESSORS:
            return encoders.PROCESSORS[name](**more)
        if name in encoders.ENCODERS:
            return encoders.ENCODERS[name](**more).eval()
        if name in models.SMALL or name in models.HIDDEN:
            return models.make(name, **more)
        if "Scheduler" in name:
            return scheduler(name, **more)
        if name.endswith("Guidance") and name != "BaseGuidance" and hasattr(diffusers.guiders, name):
            return getattr(diffusers.guiders, name)(**more)
    if "None" in names:
        return None
    raise LookupError(f"nothing makes any of {names}")


def build(name: str, **swapped: Any) -> Any:
    """A pipeline of the class ``name``, or of a class, with tiny random weights; ``swapped`` replaces components."""
    cls = getattr(diffusers, name) if isinstance(name, str) else name
    rule = families.rule(cls.__name__)
    made: dict[str, Any] = {}
    for p in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.name in swapped:
            made[p.name] = swapped[p.name]
        elif p.name in rule.parts:
            override = rule.parts[p.name]
            made[p.name] = (
                part(candidates(p.annotation), override) if isinstance(override, str | dict | tuple) else override
            )
        elif p.name in rule.settings:
            made[p.name] = rule.settings[p.name]
        elif p.name == "requires_safety_checker":
            made[p.name] = False
        elif p.name in LEFT_OUT and (p.name == "safety_checker" or p.name in getattr(cls, "_optional_components", [])):
            made[p.name] = None
        elif p.default is not p.empty:
            continue
        else:
            made[p.name] = part(candidates(p.annotation), None)
    pipe = cls(**made)
    for attribute, value in rule.attributes.items():
        owner, _, last = attribute.rpartition(".")
        setattr(getattr(pipe, owner) if owner else pipe, last, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# modular pipelines take the components of the classic class of their family
MODULAR = {
    "StableDiffusionXLModularPipeline": "StableDiffusionXLPipeline",
    "StableDiffusion3ModularPipeline": "StableDiffusion3Pipeline",
    "FluxModularPipeline": "FluxPipeline",
    "FluxKontextModularPipeline": "FluxKontextPipeline",
    "Flux2ModularPipeline": "Flux2Pipeline",
    "Flux2KleinModularPipeline": "Flux2KleinPipeline",
    "Flux2KleinBaseModularPipeline": "Flux2KleinPipeline",
    "QwenImageModularPipeline": "QwenImagePipeline",
    "QwenImage21ModularPipeline": "QwenImage21Pipeline",
    "QwenImage21TurboModularPipeline": "QwenImage21Pipeline",
    "ZImageModularPipeline": "ZImagePipeline",
    "WanModularPipeline": "WanPipeline",
    "Wan22ModularPipeline": "WanPipeline",
    "LTXModularPipeline": "LTXPipeline",
    "LTX2ModularPipeline": "LTX2Pipeline",
    "Krea2ModularPipeline": "Krea2Pipeline",
    "Krea2TurboModularPipeline": "Krea2Pipeline",
    "ErnieImageModularPipeline": "ErnieImagePipeline",
    "HunyuanVideo15ModularPipeline": "HunyuanVideo15Pipeline",
    "Ideogram4ModularPipeline": "Ideogram4Pipeline",
    "HeliosModularPipeline": "HeliosPipeline",
}


def build_modular(name: str, **settings: Any) -> Any:
    """A modular pipeline with its default blocks and the tiny components of its classic counterpart."""
    pipe = getattr(diffusers, name)(**settings)
    parts = build(MODULAR[name]).components
    if "Wan22" in name:
        parts["transformer_2"] = part(["WanTransformer3DModel"], None)
    wanted = {spec.name for spec in pipe.blocks.expected_components}
    given = {k: v for k, v in parts.items() if k in wanted and v is not None and type(v).__name__ != "VaeImageProcessor"}
    if "processor" in wanted and "processor" not in given and "tokenizer" in given:
        given["processor"] = part(["Qwen2VLProcessor"], None)
    pipe.update_components(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_modular(pipe: Any, **more: Any) -> dict[str, Any]:
    """Arguments of a modular pipeline's call: those of its blocks' inputs that are known here."""
    settings = families.rule(MODULAR[type(pipe).__name__]).call
    settings = {k: v() if callable(v) else v for k, v in settings.items()}
    torch.manual_seed(0)
    values = {
        "prompt": "a red heart", "num_images_per_prompt": 4, "num_videos_per_prompt": 2,
        "num_inference_steps": inputs.STEPS, "height": inputs.SIZE,
        "width": inputs.SIZE, "num_frames": inputs.FRAMES, "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent" if more.pop("latent", False) else "np",
    }  # fmt: skip
    known = {i.name for i in pipe.blocks.inputs}
    keep = (
        "height",
        "width",
        "num_frames",
        "max_sequence_length",
        "text_encoder_out_layers",
        "frame_rate",
        "negative_prompt",
    )
    values |= {k: v for k, v in settings.items() if k in keep} | more
    return {k: v for k, v in values.items() if k in known and v is not inputs.NOTHING}


def call(pipe: Any, **more: Any) -> dict[str, Any]:
    """Arguments of one call, the noise seeded."""
    settings = families.rule(type(pipe).__name__).call
    settings = {k: v() if callable(v) else v for k, v in settings.items()}
    return inputs.seeded(inputs.call(pipe, settings | more), pipe)
