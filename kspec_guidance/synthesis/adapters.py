"""Adapters: sets in pipelines of NeMo Curator, and as builders of Hugging Face datasets."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from kspec_guidance.synthesis.api import synthesize
from kspec_guidance.synthesis.columns import COLUMNS, column_types
from kspec_guidance.synthesis.errors import FolderError, SynthesisError
from kspec_guidance.synthesis.export import column_features
from kspec_guidance.synthesis.publication import SUMS, file_digest
from kspec_guidance.utils.hashing import hash_json

__all__ = ["curator_stage", "set_builder"]


def set_builder(folder: str | Path, **settings: Any) -> Any:
    """A builder of Hugging Face ``datasets`` for a finished folder of images, with the type of each column.

    ``set_builder(folder).download_and_prepare()`` reads it, and ``as_dataset(split="train")`` returns it. Each file must
    have the checksum that ``SHA256SUMS`` has. Columns without any value keep their type, unlike those of ``load_dataset``.

    Args:
        folder: of a set in the format ``imagefolder``.
        settings: of the builder, such as ``cache_dir``.

    Raises:
        FolderError: if there is no such set.
    """
    folder = Path(folder)
    if not (folder / "metadata.jsonl").is_file() or not (folder / SUMS).is_file():
        raise FolderError(
            f"{folder} holds no finished folder of images (metadata.jsonl and {SUMS}); shards are read by load_dataset "
            "itself"
        )
    return _builder_class()(folder=str(folder), digest=file_digest(folder / SUMS), **settings)


@functools.cache
def _builder_class() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SynthesisError("a builder needs: pip install 'kspec-guidance[data]'") from error

    class KspecSetConfig(datasets.BuilderConfig):
        def __init__(self, folder: str = "", digest: str = "", **settings: Any):
            super().__init__(version=datasets.Version("1.0.0"), **settings)
            self.folder, self.digest = folder, digest

    class KspecSet(datasets.GeneratorBasedBuilder):
        BUILDER_CONFIG_CLASS = KspecSetConfig

        def _rows(self) -> list[dict[str, Any]]:
            lines = Path(self.config.folder, "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines]

        def _info(self) -> Any:
            rows = self._rows()
            used = {name for row in rows for name in row}
            types = {name: kind for name, kind in {**column_types(rows), **COLUMNS}.items() if name in used}
            return datasets.DatasetInfo(features=column_features(types))

        def _split_generators(self, dl_manager: Any) -> list[Any]:
            return [datasets.SplitGenerator(datasets.Split.TRAIN)]

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            lines = Path(self.config.folder, SUMS).read_text(encoding="utf-8").splitlines()
            sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
            for k, row in enumerate(self._rows()):
                path = Path(self.config.folder, row["file_name"])
                if file_digest(path) != sums.get(row["file_name"]):
                    raise FolderError(f"{path} is not the image that {SUMS} has; restore it from a copy")
                yield k, {name: row.get(name) for name in self.info.features if name != "image"} | {"image": str(path)}

    return KspecSet


def curator_stage(out: str | Path, column: str = "prompt", load_images: bool = False, **settings: Any) -> Any:
    """A ``ProcessingStage`` of NeMo Curator that makes images of the prompts of each ``DocumentBatch``.

    Each batch becomes an ``ImageBatch`` of a set of its own, in a folder that its prompts decide, with one memory. A batch
    that is given again, after a failure, continues. Give similar prompts in one batch.

    Args:
        out: folder of the sets.
        column: of the prompts.
        load_images: also give the pixels; otherwise paths alone.
        settings: of :func:`synthesize`, such as ``images_per_prompt``, ``call`` and ``licence``; also ``model``, which each
            worker loads: ``demo`` by default, a folder, or an id of the hub.

    Raises:
        SynthesisError: if NeMo Curator is not installed.
    """
    return _stage_class()(str(out), column, load_images, settings)


@functools.cache
def _stage_class() -> Any:
    try:
        from nemo_curator.stages.base import ProcessingStage
        from nemo_curator.stages.resources import Resources
        from nemo_curator.tasks.image import ImageBatch, ImageObject
    except ImportError as error:
        raise SynthesisError("this stage needs NeMo Curator: pip install nemo-curator") from error

    class SynthesisStage(ProcessingStage):
        name = "kspec_synthesis"

        def __init__(self, out: str, column: str, load_images: bool, settings: dict[str, Any]):
            import torch

            self.out, self.column, self.load_images = out, column, load_images
            self.settings = dict(settings)
            self.model = self.settings.pop("model", "demo")
            self.pipe: Any = None
            self.resources = Resources(cpus=1.0, gpus=1.0 if torch.cuda.is_available() else 0.0)

        def inputs(self) -> tuple[list[str], list[str]]:
            return ["data"], [self.column]

        def outputs(self) -> tuple[list[str], list[str]]:
            return ["data"], []

        def setup(self, worker_metadata: Any = None) -> None:
            import torch

            from kspec_guidance.synthesis.reproduction import Recipe

            dtype = "float16" if torch.cuda.is_available() and self.model != "demo" else "float32"
            pipe = Recipe({"name": self.model, "dtype": dtype}, {}, None, {}).pipeline()
            self.pipe = pipe.to("cuda") if torch.cuda.is_available() else pipe
            self.pipe.set_progress_bar_config(disable=True)

        def process(self, task: Any) -> Any:
            if self.pipe is None:
                self.setup()
            prompts = [str(text) for text in task.to_pandas()[self.column]]
            folder = Path(self.out, hash_json(prompts, 16))
            synthesize(prompts, folder, self.pipe, report=False, **self.settings)
            lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            found = []
            for row in map(json.loads, lines):
                path = folder / row["file_name"]
                one = ImageObject(image_path=str(path), image_id=f"{folder.name}/{row['file_name']}", metadata=row)
                if self.load_images:
                    import numpy as np

                    one.image_data = np.asarray(Image.open(path).convert("RGB"))
                found.append(one)
            return ImageBatch(dataset_name=task.dataset_name, data=found, _metadata=dict(task._metadata))

    return SynthesisStage
