"""Networks that the scores of a comparison need, each loaded once, and the features of its images."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from kspec_guidance.bench.elsewhere import lines, values_file
from kspec_guidance.demo import load_demo_reference
from kspec_guidance.evaluation.embedders import ImageEmbedder, TextEmbedder, image_embedder, images, text_embedder, texts
from kspec_guidance.evaluation.embedders.cache import embed_files
from kspec_guidance.evaluation.embedders.names import CLIP_MODELS, in_cache
from kspec_guidance.evaluation.judges import PromptJudge, clip_judge, demo_judge
from kspec_guidance.utils.atomic_io import replacing
from kspec_guidance.utils.images import to_frames

__all__ = ["DINOV2", "Resources", "Sample", "Unavailable", "original_emoji", "package"]

DINOV2, CLIP_336, PICKSCORE = "facebook/dinov2-large", "openai/clip-vit-large-patch14-336", "yuvalkirstain/PickScore_v1"
HPSV2 = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
ORIGINALS = ("noto", "twemoji")
JUDGES = ("demo", "clip", "pickscore", "hpsv2")


class Unavailable(Exception):
    """Why a score cannot be computed here."""


@dataclass(frozen=True)
class Sample:
    """An image of a comparison.

    Attributes:
        path: of its file.
        prompt: text of its prompt.
        truth: what the source of the prompt states of it, e.g. ``attributes``.
    """

    path: Path
    prompt: str
    truth: Mapping[str, Any] = field(default_factory=dict, compare=False)


def package(name: str, install: str | None = None) -> Any:
    """A module that the user may have installed.

    Raises:
        Unavailable: naming the package, if it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != name.partition(".")[0]:
            raise Unavailable(f"{name} is installed, but needs {error.name}: pip install {error.name}") from error
        raise Unavailable(f"{install or name} needs: pip install {install or name}") from error


def original_emoji(folder: Path) -> list[Path]:
    """Pictures of the kind that the embedded model learned from, 192 that come with it, as files in a folder."""
    files = {
        folder / f"{name}-{k:02d}.png": x / 2 + 0.5 for name in ORIGINALS for k, x in enumerate(load_demo_reference(name))
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, pixels in files.items():
        if not path.is_file():
            with replacing(path) as fresh:
                to_frames(pixels)[0].save(fresh, "PNG")
    return list(files)


class Resources:
    """What the scores of one comparison share.

    Embedders and judges have names; ``own`` stands for the features of the comparison, those of the emoji classifier for
    images of the embedded model, else those of ``auto``, and ``judge`` for what tells whether an image shows a text, the
    emoji classifier or CLIP.

    Args:
        prompts: texts of all prompts.
        demo: whether the images are emoji, as the embedded model makes them.
        reference: real images, for the scores that compare with them.
        device: of the networks.
        download: whether models of the hub may be downloaded; otherwise only the local cache is read.
        folder: of the run, for values that were measured in other environments.
    """

    def __init__(
        self,
        prompts: Sequence[str] = (),
        demo: bool = False,
        reference: Sequence[Path] = (),
        device: str = "cpu",
        download: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.prompts, self.demo, self.reference = list(dict.fromkeys(prompts)), demo, list(reference)
        self.device, self.download, self.folder = device, download, folder
        self._embedders: dict[str, ImageEmbedder] = {}
        self._judges: dict[str, PromptJudge] = {}
        self._rows: dict[tuple[str, Path], Tensor] = {}
        self._texts: TextEmbedder | None = None
        self._prompt_rows: dict[str, Tensor] = {}
        self._shared: dict[Hashable, Any] = {}

    def _name(self, name: str) -> str:
        return {"own": "demo" if self.demo else "auto", "judge": "demo" if self.demo else "clip"}.get(name, name)

    def embedder(self, name: str) -> ImageEmbedder:
        """The embedder ``own``, ``auto``, ``dinov2``, ``inception``, ``clip336``, or that of a judge.

        Raises:
            Unavailable: if it is not on this machine.
        """
        name = self._name(name)
        if name not in self._embedders:
            makers: dict[str, Callable[[], ImageEmbedder]] = {
                "auto": lambda: image_embedder("auto", self.device),
                "dinov2": lambda: self._hub_images(DINOV2),
                "inception": self._inception,
                "clip336": lambda: self._hub_images(CLIP_336),
            }
            self._embedders[name] = self.judge(name).images if name in JUDGES else makers[name]()
        return self._embedders[name]

    def judge(self, name: str) -> PromptJudge:
        """The judge ``judge``, ``demo``, ``clip``, ``pickscore`` or ``hpsv2``.

        Raises:
            Unavailable: if it is not on this machine.
        """
        name = self._name(name)
        if name not in self._judges:
            makers = {"demo": self._demo, "clip": self._clip, "pickscore": self._pickscore, "hpsv2": self._hpsv2}
            self._judges[name] = makers[name]()
        return self._judges[name]

    def texts(self) -> TextEmbedder:
        """Features of prompts: those of MiniLM if its package is installed, else one direction for each prompt."""
        if self._texts is None:
            try:
                self._texts = text_embedder("minilm", self.device)
            except ImportError:
                self._texts = text_embedder("none")
        return self._texts

    def given(self, name: str) -> dict[Path, float]:
        """Values of a score from another environment, of the files that are still as they were."""
        found: dict[Path, float] = {}
        for line in () if self.folder is None else lines(values_file(self.folder, name)):
            path = self.folder / str(line.get("file"))  # type: ignore[operator]
            if path.is_file() and path.stat().st_size == line.get("bytes"):
                found[path] = float(line["value"])
        return found

    def release(self) -> None:
        """Forget all networks but that of the comparison's own features, so that the next score has the memory."""
        own = self._name("own")
        self._embedders = {k: v for k, v in self._embedders.items() if k == own}
        self._judges = {k: v for k, v in self._judges.items() if k == own}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def prompt_rows(self, samples: Sequence[Sample]) -> Tensor:
        """Features ``[n, p]`` of the prompts of samples."""
        if not self._prompt_rows:
            self._prompt_rows = dict(zip(self.prompts, self.texts()(self.prompts), strict=True))
        return torch.stack([self._prompt_rows[s.prompt] for s in samples])

    def rows(self, name: str, paths: Sequence[Path]) -> Tensor:
        """Features ``[n, d]`` of image files by an embedder; each file is embedded once."""
        name = self._name(name)
        missing = [path for path in dict.fromkeys(paths) if (name, path) not in self._rows]
        if missing:
            found = embed_files(missing, self.embedder(name))
            self._rows.update({(name, path): row for path, row in zip(missing, found, strict=True)})
        return torch.stack([self._rows[name, path] for path in paths])

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What several scores compute together: made once."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _check(self, model: str, *files: str) -> None:
        if not self.download and not in_cache(model, *files):
            raise Unavailable(f"{model} is not in the Hugging Face cache; --download fetches it")

    def _hub_images(self, model: str) -> ImageEmbedder:
        self._check(model)
        return images.transformers_embedder(model, download=self.download, device=self.device)

    def _hub_judge(self, model: str) -> PromptJudge:
        self._check(model, "tokenizer_config.json")
        return clip_judge(
            images.transformers_embedder(model, download=self.download, device=self.device),
            texts.transformers_text_embedder(model, download=self.download, device=self.device),
        )

    def _demo(self) -> PromptJudge:
        if not self.demo:
            raise Unavailable("is for images of the embedded model, and for other emoji with --judge demo")
        return demo_judge()

    def _clip(self) -> PromptJudge:
        return self._hub_judge(next((m for m in CLIP_MODELS if in_cache(m, "tokenizer_config.json")), CLIP_MODELS[0]))

    def _pickscore(self) -> PromptJudge:
        return self._hub_judge(PICKSCORE)

    def _hpsv2(self) -> PromptJudge:
        repository, file = HPSV2
        path = try_to_load_from_cache(repository, file)
        if not isinstance(path, str):
            if not self.download:
                raise Unavailable(f"{file} of {repository} is not in the Hugging Face cache; --download fetches it")
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(repository, file)
        return clip_judge(
            images.open_clip_embedder("ViT-H-14", path, device=self.device),
            texts.open_clip_text_embedder("ViT-H-14", path, device=self.device),
        )

    def _inception(self) -> ImageEmbedder:
        module = package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        return ImageEmbedder(_Inception(network), 299, "Inception v3", (0.0,) * 3, (1.0,) * 3, device=self.device)


class _Inception(nn.Module):
    """The network of torch-fidelity, which takes 8-bit pixels and returns a tuple."""

    module: Any

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module((255 * x).round().to(torch.uint8))[0]
