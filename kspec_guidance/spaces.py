"""Where samples are compared: the latents themselves, block means, pixels, an embedding, or the denoiser's own activations.

A space turns what the loop holds into feature rows and pulls a gradient in those rows back. ``latents``, ``x0`` and
``pooled`` cost nothing to speak of; ``pixels`` and ``embedder`` decode; ``activations`` runs the first half of the denoiser
again.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from kspec_guidance.features import RandomProjection

__all__ = ["SPACES", "Activations", "Embedder", "FeatureSpace", "Latents", "Pixels", "Pooled", "Scene", "X0", "make_space"]

Pull = Callable[[Tensor], Tensor]


@dataclass
class Scene:
    """What a space may look at beside the prediction.

    ``pipe`` is None where a bare scheduler is guided; ``call`` is the denoiser with the arguments of its first call at this
    step, ``size`` the height and width asked for.
    """

    pipe: Any = None
    call: tuple[nn.Module, dict[str, Any]] | None = None
    size: tuple[int, int] | None = None


def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None = None) -> tuple[Tensor, Pull]:
    """Rows ``f(x)`` ``[n, d]`` and the map from a gradient in them to one in ``x``, ``chunk`` samples at a time.

    Nothing is kept between the two: each chunk runs again when its gradient is asked for, so that the graph of one chunk
    is all that is ever held.
    """
    parts = x.detach().split(chunk or len(x))
    with torch.no_grad():
        rows = torch.cat([f(p).flatten(1).float() for p in parts])

    def pull(g: Tensor) -> Tensor:
        out = []
        for p, w in zip(parts, g.split(chunk or len(x)), strict=True):
            with torch.enable_grad():
                leaf = p.clone().requires_grad_()
                y = f(leaf).flatten(1)
                (d,) = torch.autograd.grad(y, leaf, w.to(y))
            out.append(d)
        return torch.cat(out)

    return rows, pull


@dataclass(frozen=True)
class FeatureSpace:
    """Base class. ``noisy`` spaces move the noisy sample after the step, the others the clean prediction before it."""

    name: ClassVar[str] = ""
    noisy: ClassVar[bool] = False

    def features(self, x: Tensor, scene: Scene) -> tuple[Tensor, Pull]:
        """Feature rows ``[n, d]`` of packed samples ``[n, ...]``, and the pull-back of a gradient."""
        raise NotImplementedError

    def shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Shape of one sample's features, where it is known without work."""
        return None

    def final(self, x: Tensor, scene: Scene) -> Tensor:
        """What the memory keeps of finished samples ``[n, ...]``."""
        return self.features(x, scene)[0]

    def describe(self) -> dict[str, Any]:
        """Name and settings, ready for JSON."""
        return {"name": self.name}


@dataclass(frozen=True)
class X0(FeatureSpace):
    """The clean prediction itself."""

    name: ClassVar[str] = "x0"

    def features(self, x: Tensor, scene: Scene) -> tuple[Tensor, Pull]:
        return x.flatten(1), lambda g: g.view(x.shape)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[1:])

    def final(self, x: Tensor, scene: Scene) -> Tensor:
        return x


@dataclass(frozen=True)
class Latents(X0):
    """The noisy sample, moved after the step, as the papers do."""

    name: ClassVar[str] = "latents"
    noisy: ClassVar[bool] = True


@dataclass(frozen=True)
class Pooled(FeatureSpace):
    """Block means of the clean prediction, or a random projection of it: low dimension, where wide kernels work.

    Images and clips become ``grid`` blocks each way (clips over time too); sequences ``grid ** 2`` blocks along the longer
    axis, which for packed tokens is the raster order of the picture.

    Args:
        grid: blocks each way.
        project: numbers per sample of a random projection instead of block means.
        seed: of the projection.
    """

    grid: int = 4
    project: int | None = None
    seed: int = 0
    name: ClassVar[str] = "pooled"

    def __post_init__(self) -> None:
        for what, value in (("grid", self.grid), ("project", self.project)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}")

    def _map(self, x: Tensor) -> Tensor:
        if self.project is not None or x.ndim not in (3, 4, 5):
            rows = x.flatten(1)
            if self.project is None or self.project >= rows.shape[1]:
                return rows
            return RandomProjection(rows.shape[1], self.project, self.seed)(rows)
        if x.ndim == 3:
            x = x.mT if x.shape[1] > x.shape[2] else x
            return nnf.adaptive_avg_pool1d(x, min(self.grid**2, x.shape[2]))
        size: Any = tuple(min(self.grid, s) for s in x.shape[2:])
        return nnf.adaptive_avg_pool2d(x, size) if x.ndim == 4 else nnf.adaptive_avg_pool3d(x, size)

    def features(self, x: Tensor, scene: Scene) -> tuple[Tensor, Pull]:
        return by_autograd(self._map, x)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return (self._map(torch.zeros_like(x[:1])).numel(),)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "grid": self.grid, "project": self.project, "seed": self.seed}


def to_latents(x: Tensor, vae: Any, scene: Scene) -> Tensor:
    """Latents of the loop as the decoder wants them: unpacked, unscaled."""
    config = vae.config
    if x.ndim == 3:
        unpack: Any = getattr(scene.pipe, "_unpack_latents", None)
        known = [] if unpack is None else list(inspect.signature(unpack).parameters)[1:4]
        factor = getattr(scene.pipe, "vae_scale_factor", 8)
        side = math.isqrt(x.shape[1])
        if known != ["height", "width", "vae_scale_factor"] or (scene.size is None and side**2 != x.shape[1]):
            raise ValueError(
                f"the packed latents {list(x.shape)} of {type(scene.pipe).__name__} cannot be unpacked here; "
                "choose space='x0' or 'pooled'"
            )
        height, width = scene.size or (side * 2 * factor, side * 2 * factor)
        x = unpack(x, height, width, factor)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        view = (1, -1, *[1] * (x.ndim - 2))
        return x * torch.tensor(std).to(x).view(view) + torch.tensor(mean).to(x).view(view)
    scaling = getattr(config, "scaling_factor", None) or 1.0
    return x / scaling + (getattr(config, "shift_factor", None) or 0.0)


@dataclass(frozen=True)
class Pixels(FeatureSpace):
    """The decoded prediction: what the eye compares. The gradient goes through the decoder, one chunk at a time.

    Args:
        vae: a decoder in place of the pipeline's, e.g. an ``AutoencoderTiny`` for the same latents (faster, smaller).
        size: side in pixels to which pictures are averaged down before they are compared; None keeps them whole.
        chunk: samples decoded at once.
    """

    vae: Any = None
    size: int | None = 16
    chunk: int = 1
    name: ClassVar[str] = "pixels"

    def decoder(self, scene: Scene) -> Any:
        vae = self.vae if self.vae is not None else getattr(scene.pipe, "vae", None) or getattr(scene.pipe, "vqvae", None)
        if vae is None:
            raise ValueError(
                f"space={self.name!r} needs a decoder, and {type(scene.pipe).__name__} has no vae; pass vae=, or "
                "use space='x0'"
            )
        return vae

    def pictures(self, x: Tensor, scene: Scene) -> Tensor:
        """``[n, c, ...]`` in about -1..1."""
        vae = self.decoder(scene)
        dtype = next(vae.parameters()).dtype
        latents = x if getattr(vae.config, "latent_magnitude", None) else to_latents(x, vae, scene)
        out = vae.decode(latents.to(dtype))
        return getattr(out, "sample", out)

    def _map(self, x: Tensor, scene: Scene) -> Tensor:
        y = self.pictures(x, scene)
        if self.size is None:
            return y
        if y.ndim == 5:  # a clip: frames are pooled one by one and compared together
            y = y.transpose(1, 2).flatten(1, 2)
        size: Any = tuple(min(self.size, s) for s in y.shape[2:])
        return nnf.adaptive_avg_pool2d(y, size) if y.ndim == 4 else y

    def features(self, x: Tensor, scene: Scene) -> tuple[Tensor, Pull]:
        return by_autograd(lambda p: self._map(p, scene), x, self.chunk)

    def describe(self) -> dict[str, Any]:
        if self.vae is not None:
            raise TypeError(
                "a guide with a decoder of its own cannot be saved as settings; build it in code: Pixels(vae=...)"
            )
        return {"name": self.name, "size": self.size, "chunk": self.chunk}


@dataclass(frozen=True)
class Embedder(Pixels):
    """An embedding of the decoded prediction, CLIP-like: differences of meaning.

    Args:
        embedder: a differentiable callable on ``[n, 3, size, size]`` in 0..1 returning ``[n, d]``, or an
            :class:`~kspec_guidance.embedders.ImageEmbedder`, whose network and normalisation are used.
        size: side to which pictures are brought for it.
        vae, chunk: see :class:`Pixels`.
    """

    embedder: Any = None
    size: int | None = 224
    name: ClassVar[str] = "embedder"

    def __post_init__(self) -> None:
        if not callable(self.embedder) and not hasattr(self.embedder, "network"):
            raise ValueError("space Embedder needs embedder=, a differentiable callable on [n, 3, h, w] in 0..1")

    def _map(self, x: Tensor, scene: Scene) -> Tensor:
        y = (self.pictures(x, scene).float() / 2 + 0.5).clamp(0, 1)
        frames = 1
        if y.ndim == 5:
            frames = y.shape[2]
            y = y.transpose(1, 2).flatten(0, 1)
        size = self.size or y.shape[-1]
        if tuple(y.shape[2:]) != (size, size):
            y = nnf.interpolate(y, (size, size), mode="bilinear", antialias=True, align_corners=False)
        network = getattr(self.embedder, "network", self.embedder)
        if hasattr(self.embedder, "mean"):
            view = (1, 3, 1, 1)
            y = (y - torch.tensor(self.embedder.mean).to(y).view(view)) / torch.tensor(self.embedder.std).to(y).view(view)
        rows = network(y).flatten(1)
        return rows if frames == 1 else rows.unflatten(0, (-1, frames)).flatten(1)

    def describe(self) -> dict[str, Any]:
        raise TypeError("a guide with an embedder cannot be saved as settings; build it in code: Embedder(embedder=...)")


class _Reached(Exception):
    """Stops the denoiser where its features have been read."""


def middle_of(denoiser: nn.Module) -> nn.Module:
    """The middle block: ``mid_block`` of a UNet, else the middle one of the longest list of blocks.

    Raises:
        ValueError: for a network without either.
    """
    block = getattr(denoiser, "mid_block", None)
    if isinstance(block, nn.Module):
        return block
    lists = [m for m in denoiser.children() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"no middle block found in {type(denoiser).__name__}; name one: Activations(module='blocks.3')")
    longest = max(lists, key=len)
    return longest[len(longest) // 2]


def _largest(output: Any) -> Tensor:
    found = [o for o in (output if isinstance(output, tuple | list) else [output]) if isinstance(o, Tensor)]
    return max(found, key=Tensor.numel)


def wanted_rows(call: dict[str, Any], n: int) -> dict[str, Any]:
    """The arguments of a denoiser's call for its last ``n`` rows: with classifier-free guidance the wanted half."""
    rows = next((len(v) for v in call.values() if isinstance(v, Tensor) and v.ndim > 1), n)

    def cut(v: Any) -> Any:
        if isinstance(v, Tensor) and v.ndim and len(v) == rows and rows > n:
            return v[rows - n :]
        if isinstance(v, dict):
            return {k: cut(w) for k, w in v.items()}
        if isinstance(v, tuple | list) and v and all(isinstance(w, Tensor) for w in v):
            return type(v)(cut(w) for w in v)
        return v

    return {k: cut(v) for k, v in call.items()}


@dataclass(frozen=True)
class Activations(FeatureSpace):
    """Means over positions of a middle block of the denoiser: what the model itself tells apart (arXiv 2606.27371).

    The denoiser runs again up to that block, with gradients, in the wanted half of its first call at this step. Features at
    different noise levels are not comparable, so the memory keeps one row of features for each guided step, and step
    compares with step; a run that breaks off before its last guided step is not remembered.

    Args:
        module: the block's name in the denoiser, such as ``mid_block`` or ``transformer_blocks.9``; found by itself
            if None.
    """

    module: str | None = None
    name: ClassVar[str] = "activations"

    def features(self, x: Tensor, scene: Scene) -> tuple[Tensor, Pull]:
        if scene.call is None:
            raise ValueError(
                "space='activations' needs a pipeline to attach to: with guide.attach(pipe):, and a denoiser it calls"
            )
        denoiser, given = scene.call
        inner = getattr(denoiser, "_orig_mod", denoiser)
        block = inner.get_submodule(self.module) if self.module else middle_of(inner)
        call = wanted_rows(given, len(x))
        name = next(k for k, v in call.items() if isinstance(v, Tensor) and v.ndim > 1)
        dtype = next((p.dtype for p in inner.parameters() if p.is_floating_point()), x.dtype)

        def f(leaf: Tensor) -> Tensor:
            seen: list[Tensor] = []

            def stop(module: nn.Module, args: Any, output: Any) -> None:
                seen.append(_largest(output))
                raise _Reached

            handle = block.register_forward_hook(stop)
            try:
                inner.forward(**{**call, name: leaf.to(dtype)})
            except _Reached:
                pass
            finally:
                handle.remove()
            y = seen[0].float()
            y = y.view(len(leaf), -1, *y.shape[1:]) if len(y) != len(leaf) else y
            if y.ndim == 3:
                return y.mean(1)  # tokens
            return y.flatten(2).mean(2)

        rows, pull = by_autograd(f, call[name])

        def to_x(g: Tensor) -> Tensor:
            d = pull(g).float()
            if d.ndim != x.ndim:
                return d.flatten(1)[:, : x[0].numel()].view(x.shape)
            return d[tuple(slice(0, s) for s in x.shape)]  # without the channels or tokens of a condition

        return rows, to_x

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "module": self.module}


SPACES: dict[str, type[FeatureSpace]] = {
    "x0": X0,
    "latents": Latents,
    "pooled": Pooled,
    "pixels": Pixels,
    "embedder": Embedder,
    "activations": Activations,
}


def make_space(space: str | FeatureSpace) -> FeatureSpace:
    """A space from its name or from itself.

    Raises:
        ValueError: for an unknown name, or for ``embedder``, which needs a network.
    """
    if isinstance(space, FeatureSpace):
        return space
    if space not in SPACES:
        raise ValueError(f"unknown space {space!r}; choose one of {', '.join(SPACES)}, or a FeatureSpace")
    if space == "embedder":
        raise ValueError("space 'embedder' needs a network: space=kspec_guidance.spaces.Embedder(embedder=my_module)")
    return SPACES[space]()
