"""What leaves an evaluation besides its page: images in folders by kind, and figures for trackers of experiments."""

import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from kspec_guidance.evaluation.sets import Evaluation
from kspec_guidance.utils.images import SourceError

__all__ = ["TRACKERS", "copy_by_kind", "tracker"]

TRACKERS = "trackio:PROJECT, wandb:PROJECT, tensorboard:FOLDER"
SINGLE = "single-images"


def copy_by_kind(result: Evaluation, folder: str | Path) -> Path:
    """Copy the images of a set into one folder for each kind, the largest first, and one for images of their own kind.

    Args:
        result: of :func:`evaluate_set`, for a folder of images.
        folder: to create; it must be empty if it exists.

    Returns:
        The folder.

    Raises:
        SourceError: for a set that is not a folder of image files, or a folder that is not empty.
    """
    folder, source = Path(folder), result.images.path
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SourceError(f"{folder} exists and is not an empty folder; name another one for the images by kind")
    absent = [name for name in result.images.names if not (source / name).is_file()]
    if absent:
        raise SourceError(f"images by kind are copied from a folder of image files, and {source} has no file {absent[0]}")
    for number, kind in enumerate(result.modes, 1):
        several = len(kind.samples) > 1
        target = folder / (f"kind-{number:03d}-{len(kind.samples)}-images" if several else SINGLE)
        for i in kind.samples:
            name = result.images.names[i]
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    return folder


def tracker(target: str) -> Callable[[Mapping[str, float], str], None]:
    """A function that logs figures by name, as one run of a given name, with a tracker of experiments.

    Args:
        target: ``trackio:PROJECT``, ``wandb:PROJECT`` or ``tensorboard:FOLDER``.

    Raises:
        ValueError: for an unknown target.
        ImportError: naming the package, if it is not installed.
    """
    kind, _, place = target.partition(":")
    if kind not in ("trackio", "wandb", "tensorboard") or not place:
        raise ValueError(f"cannot log to {target!r}; give one of {TRACKERS}")
    try:
        module = import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as error:
        raise ImportError(f"logging to {target} needs: pip install {kind}") from error

    def log(figures: Mapping[str, float], name: str) -> None:
        if kind == "tensorboard":
            with module.SummaryWriter(str(Path(place) / name)) as writer:
                for key, value in figures.items():
                    writer.add_scalar(key, value)
            return
        module.init(project=place, name=name)
        module.log(dict(figures))
        module.finish()

    return log
