"""Builds pipelines from the signature of their class and the rules of their family."""

import copy
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


# optional components that are not built
OMITTED = {
    "safety_checker", "image_encoder", "feature_extractor", "image_processor", "watermarker", "transformer_2",
    "prompt_enhancer",
    "prompt_enhancer_head", "processor", "audio_tokenizer", "audio_token_detokenizer", "pe", "pe_tokenizer",
    "ocr_guider", "audio_scheduler",
}  # fmt: skip


def pipeline_names() -> list[str]:
    """Names of all pipeline classes that diffusers exports, classic and modular."""
    names = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if inspect.isclass(cls) and name not in ("DiffusionPipeline", "ModularPipeline"):
            names.append(name)
    return names


def class_names(annotation: Any) -> list[str]:
    """The class names in a type annotation, in order."""
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return [word.rpartition(".")[2] for word in re.findall(r"[A-Za-z_][A-Za-z0-9_.]*", text)]


def build_scheduler(cls: str, **kwargs: Any) -> Any:
    cls, settings = SCHEDULERS.get(cls, (cls, {}))
    return getattr(diffusers, cls)(**(settings | kwargs))


def build_component(names: list[str], override: Any) -> Any:
    """A component of the first class that can be built; ``override`` is a class name, settings, or both as a pair."""
    kwargs: dict[str, Any] = {}
    if isinstance(override, tuple):
        override, kwargs = override
    if isinstance(override, str):
        names = [override]
    elif isinstance(override, dict):
        kwargs = override
    for name in names:
        torch.manual_seed(0)
        if name in encoders.PROCESSORS:
            return copy.deepcopy(encoders.PROCESSORS[name](**kwargs))  # some pipelines change their tokenizer's padding
        if name in encoders.ENCODERS:
            return encoders.ENCODERS[name](**kwargs).eval()
        if name in models.CONFIGS or name in models.UNEXPORTED:
            return models.build_model(name, **kwargs)
        if "Scheduler" in name:
            return build_scheduler(name, **kwargs)
        if name.endswith("Guidance") and name != "BaseGuidance" and hasattr(diffusers.guiders, name):
            return getattr(diffusers.guiders, name)(**kwargs)
    if "None" in names:
        return None
    raise LookupError(f"no builder for any of {names}")


def build(name: str, **overrides: Any) -> Any:
    """A pipeline with tiny random weights. ``name`` is a diffusers class or its name; ``overrides`` replace components."""
    cls = getattr(diffusers, name) if isinstance(name, str) else name
    rule = families.rule_for(cls.__name__)
    components: dict[str, Any] = {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in overrides:
            components[parameter.name] = overrides[parameter.name]
        elif parameter.name in rule.components:
            override = rule.components[parameter.name]
            components[parameter.name] = (
                build_component(class_names(parameter.annotation), override)
                if isinstance(override, str | dict | tuple)
                else override
            )
        elif parameter.name in rule.init:
            components[parameter.name] = rule.init[parameter.name]
        elif parameter.name == "requires_safety_checker":
            components[parameter.name] = False
        elif parameter.name in OMITTED and (
            parameter.name == "safety_checker" or parameter.name in getattr(cls, "_optional_components", [])
        ):
            components[parameter.name] = None
        elif parameter.default is not parameter.empty:
            continue
        else:
            components[parameter.name] = build_component(class_names(parameter.annotation), None)
    pipe = cls(**components)
    for component in components.values():
        if hasattr(component, "pad_token") and isinstance(component.pad_token, torch.nn.Parameter):
            torch.nn.init.normal_(component.pad_token, std=0.02)  # Lumina's is uninitialised memory
    for attribute, value in rule.attributes.items():
        owner, _, leaf = attribute.rpartition(".")
        setattr(getattr(pipe, owner) if owner else pipe, leaf, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# modular pipelines and the classic pipelines whose components they use; None for components of their own
MODULAR: dict[str, str | None] = {
    "AnimaModularPipeline": None,
    "Flux3ModularPipeline": None,
    "Flux3DistilledModularPipeline": None,
    "MiniMaxMusic3ModularPipeline": None,
    "WanAnimate2ModularPipeline": None,
    "WanAnimate2DistilledModularPipeline": None,
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


# what modular pipelines need unlike their classic counterparts
MODULAR_COMPONENTS: dict[str, dict[str, Any]] = {
    "Anima": {"transformer": {"in_channels": 16, "out_channels": 16}, "t5_tokenizer": "Qwen2Tokenizer"},
    "Flux3Distilled": {"tokenizer": "Qwen3VLProcessor", "transformer": {"flow_map": True}},
    "Flux3": {"tokenizer": "Qwen3VLProcessor"},
    "MiniMaxMusic3": {"language_model": {"vocab_size": 180_000}},  # its audio tokens have fixed numbers
    "WanAnimate2": {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "image_encoder": {"image_size": 224, "patch_size": 56, "hidden_size": 1280},  # the width that it expects
    },
    "Krea2": {"text_encoder": {"text": {"num_hidden_layers": 36}}, "transformer": {"num_text_layers": 12}},  # fixed layers
}
MODULAR_CALLS: dict[str, dict[str, Any]] = {
    "MiniMaxMusic3": {"lyrics": "la la", "audio_duration": 0.4},
    "Flux3": {"text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 256},
    "WanAnimate2": {"image": lambda: inputs.image(1), "driving_video": lambda: inputs.clip(5), "segment_frame_length": 5},
    "Helios": {"num_videos_per_prompt": 1},  # its history has one row
    "HunyuanVideo15": {"num_videos_per_prompt": 1},  # its empty image embeddings have one row
}


def modular_rule(rules: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The entry whose key the name begins with; empty if there is none."""
    return next((rule for key, rule in rules.items() if name.startswith(key)), {})


def build_modular(name: str, **settings: Any) -> Any:
    """A modular pipeline with its default blocks, and tiny components of its own or of its classic counterpart."""
    if MODULAR[name] is not None:  # attributes of the classic pipeline are properties of the class here
        for attribute, value in families.rule_for(MODULAR[name]).attributes.items():
            setattr(getattr(diffusers, name), attribute, value)
    pipe, overrides = getattr(diffusers, name)(**settings), modular_rule(MODULAR_COMPONENTS, name)
    if "prompt_upsampler" in pipe.blocks.sub_blocks:  # a language model that writes a longer prompt
        blocks = pipe.blocks
        del blocks.sub_blocks["prompt_upsampler"]
        pipe = getattr(diffusers, name)(blocks=blocks)
    if MODULAR[name] is None:
        components = {
            spec.name: build_component(class_names(spec.type_hint), overrides.get(spec.name))
            for spec in pipe.blocks.expected_components
            if spec.default_creation_method == "from_pretrained"
        }
    else:
        classic = getattr(diffusers, MODULAR[name])
        annotations = inspect.signature(classic.__init__).parameters
        components = build(
            classic,
            **{
                part: build_component(class_names(annotations[part].annotation), override)
                for part, override in overrides.items()
            },
        ).components
    if "Wan22" in name:
        components["transformer_2"] = build_component(["WanTransformer3DModel"], None)
    expected = {spec.name for spec in pipe.blocks.expected_components}
    available = {
        k: v for k, v in components.items() if k in expected and v is not None and type(v).__name__ != "VaeImageProcessor"
    }
    if "processor" in expected and "processor" not in available and "tokenizer" in available:
        available["processor"] = build_component(["Qwen2VLProcessor"], None)
    pipe.update_components(**available)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular_call_kwargs(pipe: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a modular pipeline's call that its blocks accept."""
    name = type(pipe).__name__
    settings = families.rule_for(MODULAR[name] or name).call
    settings = {k: v() if callable(v) else v for k, v in settings.items()}
    torch.manual_seed(0)
    values = {
        "prompt": "a red heart", "num_images_per_prompt": 4, "num_videos_per_prompt": 2,
        "num_inference_steps": inputs.STEPS, "height": inputs.SIZE,
        "width": inputs.SIZE, "num_frames": inputs.FRAMES, "max_sequence_length": 16,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent" if kwargs.pop("latent", False) else "np",
    }  # fmt: skip
    accepted = {i.name for i in pipe.blocks.inputs}
    shared = (
        "height",
        "width",
        "num_frames",
        "max_sequence_length",
        "text_encoder_out_layers",
        "frame_rate",
        "negative_prompt",
    )
    values |= {k: v for k, v in settings.items() if k in shared}
    values |= {k: v() if callable(v) else v for k, v in modular_rule(MODULAR_CALLS, name).items()} | kwargs
    return {k: v for k, v in values.items() if k in accepted and v is not inputs.EXPLICIT_NONE}


def call_kwargs(pipe: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call, with seeded noise; ``kwargs`` take precedence."""
    settings = families.rule_for(type(pipe).__name__).call
    settings = {k: v() if callable(v) else v for k, v in settings.items()}
    return inputs.seeded(inputs.call_kwargs(pipe, settings | kwargs), pipe)
