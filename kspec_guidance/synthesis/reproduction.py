"""reproduce.yaml: what made a set, so that it can be made again; and the run that does so."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.config import write_config
from kspec_guidance.loop.components import find_scheduler, load_pipeline
from kspec_guidance.synthesis.arms import Arm
from kspec_guidance.synthesis.errors import FolderError, SynthesisError
from kspec_guidance.synthesis.filters import filter_name
from kspec_guidance.synthesis.history import UNITS, History, read_history
from kspec_guidance.synthesis.prompts import Prompt
from kspec_guidance.synthesis.provenance import model_of, package_versions
from kspec_guidance.synthesis.schedule import Target
from kspec_guidance.synthesis.settings import as_json, differences

__all__ = ["Recipe", "read_recipe", "recipe_of"]

FORMAT = "kspec-guidance reproduce 1"
HEAD = "# Makes this set again: kspec-guidance generate --reproduce reproduce.yaml --out FOLDER\n"
RECIPE, PROMPTS, GUIDE = "reproduce.yaml", "prompts.jsonl", "guide"


@dataclass
class Recipe:
    """What made a set.

    Attributes:
        model: its name, revision, dtype and scheduler.
        run: arguments of ``synthesize`` by name, as JSON has them.
        guide: settings of the guide; None if they are in the folder ``guide``.
        settings: of the run, which are compared.
        obstacles: why the set cannot be made again from this alone; empty if it can.
        versions: of the packages.
        history: what workers have read of each other; None if nothing, or without workers.
        units: digest of the file that says so; empty for none.
        folder: of the file.
        tensors, guide_settings: of a guide that has tensors, to be written beside the file.
    """

    model: dict[str, Any]
    run: dict[str, Any]
    guide: dict[str, Any] | None
    settings: dict[str, Any]
    obstacles: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    history: History | None = None
    units: str = ""
    folder: Path = Path()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    guide_settings: dict[str, Any] = field(default_factory=dict)

    @property
    def signed(self) -> bool:
        """Whether the images of the set have signatures."""
        return "c2pa" in str(self.settings.get("marks"))

    def files(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        """The text of ``reproduce.yaml``, and that of its prompts, by file name."""
        more = {} if self.history is None else {UNITS: self.history.text()}
        return {PROMPTS: prompts_text(prompts), **more, RECIPE: self.text()}

    def write_guide(self, folder: Path) -> None:
        """Write the settings and tensors of a guide that has tensors, into ``guide`` in a folder."""
        if self.tensors:
            write_config(folder / GUIDE, self.guide_settings, self.tensors)

    def text(self) -> str:
        """The file as YAML."""
        names = ("model", "run", "guide", "settings", "obstacles", "versions")
        about = {name: getattr(self, name) for name in names}
        about |= {} if self.history is None else {"units": self.history.sha256}
        return HEAD + yaml.safe_dump({"format": FORMAT, **about}, sort_keys=False, allow_unicode=True, width=100)

    def pipeline(self, pipe: Any = None) -> Any:
        """The pipeline that made the set, with its scheduler.

        Args:
            pipe: already loaded; by default the embedded one if it made the set, else the named one.

        Raises:
            SynthesisError: if it cannot be loaded.
        """
        name, dtype = self.model.get("name"), str(self.model.get("dtype")).removeprefix("torch.")
        if pipe is None and name == "demo":
            from kspec_guidance.demo import load_demo_pipeline

            pipe = load_demo_pipeline(getattr(torch, dtype, torch.float32))
        elif pipe is None:
            try:
                pipe = load_pipeline(str(name), getattr(torch, dtype), self.model.get("revision"))
            except Exception as error:  # of the hub, or the files
                raise SynthesisError(
                    f"cannot load the model {name!r} that made the set: {' '.join(str(error).split())}; give its "
                    "folder or id (--model)"
                ) from error
        return pipe

    @contextmanager
    def scheduler_of(self, pipe: Any) -> Iterator[None]:
        """A pipeline with the scheduler that made the set, instead of its own."""
        import diffusers

        kind, config = getattr(diffusers, str(self.model.get("scheduler")), None), self.model.get("scheduler_config")
        own = getattr(pipe, "scheduler", None)
        if kind is None or own is None or not isinstance(config, dict):
            yield  # the comparison of settings tells whether it is another one
            return
        try:
            pipe.scheduler = kind.from_config(config)
            yield
        finally:
            pipe.scheduler = own

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``synthesize``, besides folder and pipeline."""
        run = dict(self.run)
        run["guide"] = KernelGuidance.from_config(self.folder / GUIDE if self.guide is None else self.guide)
        run["prompts"] = _read_prompts(self.folder / PROMPTS)
        run["target"] = None if run.get("target") is None else Target(**run["target"])
        run["arms"] = None if run.get("arms") is None else [Arm(**arm) for arm in run["arms"]]
        run["filter"] = run.get("filter") or None
        return run

    def read_history(self, prompts: int) -> History | None:
        """What workers of the set have read of each other; None if nothing.

        Args:
            prompts: their number.

        Raises:
            CheckpointError: if its file, or the records of the set, are missing, damaged or were changed.
        """
        return read_history(self.folder, self.units, prompts, int(self.run["exchange"])) if self.units else None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Compare the settings of a new run with those of the set.

        Raises:
            SynthesisError: listing where they differ.
        """
        old, new = (
            {k: v for k, v in s.items() if k != "marks"} for s in (self.settings, settings)
        )  # nobody can sign again
        changed = differences(old, new)
        if changed:
            lines = "\n  ".join(changed)
            raise SynthesisError(f"this run would not make the set again; its settings differ:\n  {lines}")


def recipe_of(pipe: Any, guide: KernelGuidance, run: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """What makes the set of a run again.

    Args:
        pipe: of the run.
        guide: of the run, as it is at its beginning.
        run: arguments of ``synthesize``; those that this file cannot hold become obstacles.
        settings: of the run.
    """
    obstacles, kept = list[str](), dict[str, Any]()
    for name, value in run.items():
        try:
            plain = [filter_name(stage) for stage in value] if name == "filter" else value
            plain = filter_name(value) if name == "reward" and callable(value) else plain
            kept[name] = json.loads(json.dumps(plain, default=_plain_scalar, allow_nan=False))
        except (TypeError, ValueError):
            obstacles.append(f"{name}, which this file cannot hold")
    config, tensors = None, dict[str, Tensor]()
    try:
        config, tensors = guide.to_config()
    except TypeError as error:
        obstacles.append(f"the guide ({error})")
    model_name, revision = model_of(pipe)
    model: dict[str, Any] = {"name": model_name, "revision": revision, "dtype": str(getattr(pipe, "dtype", None))}
    obstacles += ["the name of the model"] if model_name is None else []
    with suppress(AttributeError, ValueError):
        scheduler = find_scheduler(pipe)
        own = {k: v for k, v in dict(scheduler.config).items() if not str(k).startswith("_")}
        model |= {"scheduler": type(scheduler).__name__, "scheduler_config": json.loads(json.dumps(own, default=str))}
    return Recipe(
        model, kept, None if tensors else as_json(config), dict(settings), obstacles, package_versions(), tensors=tensors,
        guide_settings=config or {},
    )  # fmt: skip


def _plain_scalar(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy or torch
        return value.item()
    raise TypeError


def prompts_text(prompts: Sequence[Prompt]) -> str:
    """Prompts as JSON lines, which :func:`read_recipe` and ``--prompts`` read."""
    lines = []
    for prompt in prompts:
        row = {**prompt.extra, "prompt": prompt.text}
        row |= {} if prompt.group is None else {"group": prompt.group}
        row |= {} if prompt.images is None else {"images": prompt.images}
        lines += [json.dumps(row, ensure_ascii=False) + "\n"] * prompt.times
    return "".join(lines)


def _read_prompts(path: Path) -> str:
    if not path.is_file():
        raise SynthesisError(f"there is no {path}, which has the prompts of the set; keep it beside reproduce.yaml")
    return str(path)


def read_recipe(path: str | Path) -> Recipe:
    """Read ``reproduce.yaml``.

    Raises:
        SynthesisError: if it cannot be read, is damaged, or says what it lacks to make the set again.
    """
    path = Path(path)
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}")
        recipe = Recipe(**{name: about[name] for name in ("model", "run", "guide", "settings", "obstacles", "versions")})
        recipe.folder, recipe.units = path.parent, str(about.get("units", ""))
        if not all(isinstance(part, dict) for part in (recipe.model, recipe.run, recipe.settings)):
            raise ValueError("model, run or settings are no tables")
    except OSError as error:
        raise SynthesisError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise SynthesisError(
            f"{path} is no recipe of a set ({' '.join(str(error).split())}); restore it from a copy"
        ) from error
    if recipe.obstacles:
        raise FolderError(f"{path} cannot make the set again; it lacks {'; '.join(map(str, recipe.obstacles))}")
    return recipe
