"""The folder of a comparison: what was to be made, and what is finished.

    out/settings.json                    model, prompts, methods, steps, versions: what makes two runs the same
    out/records/rank-0000.jsonl          one JSON record an image, of the process that made it
    out/images/sparke/50/000012-003.png  method, strength, prompt 12, image 3 of it

The images of one prompt with one strength of a method are a *group*. A group is committed at once: its images, each written
to a temporary file and renamed into place, then its records in one write. If a run ends between the two, or within the
write, the group is made again from the same seeds.

``settings.json``::

    {"model": {"name", ...}, "steps": 8, "images": 4, "batch_size": 4, "seed": 0, "device": "cpu", "versions": {...},
     "prompts": [{"index": 0, "text": "a red apple", "truth": {...}}, ...],       "truth" only if the source states any
     "methods": [{"name": "sparke", "strengths": ["25", "50"], "chosen": "50", ...}, ...]}    null for methods without one

A record: ``method``, ``strength`` (its text; null for methods without one), ``prompt`` (its index), ``number`` (of the
image among those of the prompt), ``seed``, ``file`` (in the folder), ``seconds`` (its share of those of its group),
``added_seconds`` (beyond plain sampling of the same prompt by the same process; null if unknown), ``peak_bytes`` (of the
device; null where it is not measured).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, overload

import filelock
from PIL import Image

from kspec_guidance.synthesis.errors import CheckpointError, FolderError, disk_errors
from kspec_guidance.synthesis.settings import differences
from kspec_guidance.synthesis.store import lock_folder
from kspec_guidance.utils.atomic_io import replace_all

__all__ = ["PLAIN", "Group", "Images", "Run", "Writer", "begin_run", "image_file", "settings_in"]

PLAIN = "plain"  # the method that others are compared with
SAME = ("model", "steps", "images", "batch_size", "seed", "reference")  # settings of which each run has one value

RECORD_KEYS = {"method", "strength", "prompt", "number", "seed", "file", "seconds"}
Group = tuple[str, str | None, int]  # method, strength, index of the prompt


class Images(Sequence[Image.Image]):
    """Images of one prompt, each read from its file when it is asked for, in the order of their numbers."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> "Images": ...
    def __getitem__(self, index: int | slice) -> "Image.Image | Images":
        if isinstance(index, slice):
            return Images(self.paths[index])
        with Image.open(self.paths[index]) as file:
            return file.convert("RGB")


class Run:
    """A folder that ``kspec-guidance bench`` has written, finished or not.

    Args:
        folder: with ``settings.json`` and ``records/``.

    Attributes:
        folder: as given.
        settings: of the run; see the module.

    Raises:
        FolderError: if the folder holds no comparison.
        CheckpointError: if its settings are damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / "settings.json"
        if not path.is_file():
            raise FolderError(f"{self.folder} holds no comparison: there is no settings.json that `bench` has written")
        try:
            self.settings: dict[str, Any] = json.loads(path.read_text())
            _ = self.settings["prompts"], self.settings["methods"], self.settings["images"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is not what `bench` writes ({error}); restore it, or choose another folder"
            ) from None

    def records(self) -> list[dict[str, Any]]:
        """The records of all finished images: prompt by prompt, by method and strength in the order of the settings.

        Groups of which a record or an image is missing are left out: the run makes them again.

        Raises:
            CheckpointError: for a damaged line that is not the last of its file.
        """
        finished = self._finished()
        return [record for group in self.expected() for record in finished.get(group, ())]

    def expected(self) -> list[Group]:
        """All groups of the run, finished or not: prompt by prompt, so that an unfinished run compares the same prompts."""
        return [
            (method["name"], strength, prompt["index"])
            for prompt in self.settings["prompts"]
            for method in self.settings["methods"]
            for strength in method["strengths"]
        ]

    def groups(self) -> dict[tuple[str, str | None], dict[int, Images]]:
        """Finished images: for each method and strength, those of each prompt by its index."""
        found: dict[tuple[str, str | None], dict[int, Images]] = {
            (method["name"], strength): {} for method in self.settings["methods"] for strength in method["strengths"]
        }
        for (method, strength, prompt), records in sorted(self._finished().items(), key=lambda item: item[0][2]):
            if (method, strength) in found:
                found[method, strength][prompt] = Images([self.folder / record["file"] for record in records])
        return found

    def _finished(self) -> dict[Group, list[dict[str, Any]]]:
        """Records of each group that is complete, by number."""
        found: dict[Group, dict[int, dict[str, Any]]] = {}
        for record in self._lines():
            group = (record["method"], record["strength"], record["prompt"])
            found.setdefault(group, {})[record["number"]] = record
        images = self.settings["images"]
        return {
            group: [records[k] for k in sorted(records)]
            for group, records in found.items()
            if sorted(records) == list(range(images))
            and all((self.folder / record["file"]).is_file() for record in records.values())
        }

    def _lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted((self.folder / "records").glob("rank-*.jsonl")):
            lines = path.read_text().split("\n")
            for number, line in enumerate(lines, 1):
                if not line:
                    continue
                try:
                    yield checked_record(json.loads(line))
                except (ValueError, TypeError) as error:
                    if number == len(lines):
                        continue  # the run ended within this write
                    raise CheckpointError(
                        f"{path} line {number} is no record of an image ({error}); restore it, or delete the line, and its "
                        "images are made again"
                    ) from None


def checked_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, if its keys are there and its file lies in the folder.

    Raises:
        ValueError: if not.
    """
    missing = RECORD_KEYS - set(record)
    if missing:
        raise ValueError(f"without {', '.join(sorted(missing))}")
    path = PurePosixPath(record["file"])
    if path.is_absolute() or ".." in path.parts or path.suffix != ".png":
        raise ValueError(f"file {record['file']!r} is no image of the folder")
    return dict(record)


# -- writing -----------------------------------------------------------------------------------------------------------


def image_file(method: str, strength: str | None, prompt: int, number: int) -> str:
    """The file of an image, relative to the folder."""
    return f"images/{method}/{strength or 'plain'}/{prompt:06d}-{number:03d}.png"


def begin_run(folder: Path, settings: dict[str, Any]) -> filelock.BaseFileLock:
    """Claim a folder and write the settings, or add new prompts, methods and strengths to those that it has.

    Raises:
        FolderError: if another run writes to it, or it holds another comparison or anything else.
        CheckpointError: if its settings are damaged.
        RunFailedError: if it cannot be written to.
    """
    with disk_errors(folder):
        settings_in(folder, settings)  # a folder of anything else is left as it is
        lock = lock_folder(folder, folder / "records")
        try:
            text = json.dumps(settings_in(folder, settings), indent=1) + "\n"
            replace_all({folder / "settings.json": text.encode()})
        except BaseException:
            lock.release()
            raise
    return lock


def settings_in(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run that begins or continues in a folder.

    Raises:
        FolderError: if it holds another comparison or anything else.
        CheckpointError: if its settings are damaged.
    """
    if (folder / "settings.json").exists():
        return merged_settings(folder, Run(folder).settings, settings)
    if folder.exists() and any(path != folder / "records" for path in folder.iterdir()):
        raise FolderError(f"{folder} is not empty, and holds no comparison; choose an empty folder")
    return settings


def merged_settings(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new settings with the prompts, methods and strengths that only the old ones have.

    Raises:
        FolderError: if images of the two could not be compared.
    """
    changed = differences({k: old.get(k) for k in SAME}, {k: new.get(k) for k in SAME})
    changed += differences(
        {f"prompt {k}": p["text"] for k, p in enumerate(old["prompts"][: len(new["prompts"])])},
        {f"prompt {k}": p["text"] for k, p in enumerate(new["prompts"][: len(old["prompts"])])},
    )
    known = {m["name"]: m for m in old["methods"]}
    both = [m["name"] for m in new["methods"] if m["name"] in known]
    by_name = {m["name"]: m for m in new["methods"]}
    changed += differences(
        {name: known[name].get("parameters") for name in both}, {name: by_name[name].get("parameters") for name in both}
    )
    if changed:
        lines = "\n  ".join(changed)
        raise FolderError(
            f"{folder} holds a comparison that was made with other settings:\n  {lines}\ngive the old ones to continue it "
            "(prompts, methods and strengths may be added), or choose another folder"
        )
    methods = []
    for method in new["methods"]:
        earlier = known.pop(method["name"], method)["strengths"]
        strengths = [*method["strengths"], *(s for s in earlier if s not in method["strengths"])]
        methods.append(method | {"strengths": strengths})
    prompts = max(old["prompts"], new["prompts"], key=len)
    return new | {"prompts": prompts, "methods": [*methods, *known.values()]}


class Writer:
    """Commits groups of one process.

    Args:
        folder: of the run.
        rank: of the process.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.path = folder, folder / "records" / f"rank-{rank:04d}.jsonl"
        if self.path.exists():
            whole = self.path.read_bytes()
            kept = whole[: whole.rfind(b"\n") + 1]  # without a line that an interrupted write has left
            if kept != whole:
                replace_all({self.path: kept})

    def commit(self, images: Sequence[bytes], records: Sequence[Mapping[str, Any]]) -> int:
        """Write the images of a group, and then their records; return their size in bytes.

        Raises:
            RunFailedError: if the disk is full or cannot be written to.
        """
        with disk_errors(self.folder):
            files = {self.folder / record["file"]: data for record, data in zip(records, images, strict=True)}
            replace_all(files)
            with self.path.open("a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        return sum(map(len, images))
