"""The files that go with a set: card, Croissant, recipe, prompts and checksums."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from kspec_guidance.evaluation.readers import SetReader
from kspec_guidance.synthesis.card import Contents, card, licence_of
from kspec_guidance.synthesis.columns import COLUMNS, column_types
from kspec_guidance.synthesis.croissant import croissant
from kspec_guidance.synthesis.errors import disk_errors
from kspec_guidance.synthesis.prompts import Prompt
from kspec_guidance.synthesis.reproduction import Recipe
from kspec_guidance.synthesis.store import Store
from kspec_guidance.utils.atomic_io import replacing
from kspec_guidance.utils.hashing import hash_json
from kspec_guidance.utils.messages import warn_user

__all__ = ["compare_with_original", "write_publication"]

SUMS, CARD = "SHA256SUMS", "README.md"
DATA = (".png", ".tar", ".parquet")


def write_publication(
    store: Store,
    contents: Contents,
    report: Path | None,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    url: str | None = None,
) -> None:
    """Write README.md, croissant.json, reproduce.yaml, prompts.jsonl and SHA256SUMS. A file that the user changed stays.

    Args:
        store: of the run.
        contents: of the set.
        report: the page of the scores; None for none.
        recipe: what makes the set again.
        prompts: of the run.
        url: of the set's page; that of this package by default.
    """
    out, rows, kind = store.out, contents.rows, contents.kind
    files = recipe.files(prompts)
    types = {**column_types([prompt.extra for prompt in prompts]), **column_types(rows), **COLUMNS}
    names = {name for row in rows for name in row}
    used = {name: found for name, found in types.items() if name in names}
    if kind == "imagefolder":
        data, columns = {"metadata.jsonl": file_digest(out / "metadata.jsonl")}, used
        images = {row["file_name"]: row.get("sha256") or file_digest(out / row["file_name"]) for row in rows}
    else:
        data = {path.name: file_digest(path) for path in sorted(out.glob("shard-*")) if path.suffix in DATA}
        columns, images = types, {}
    name = f"Images by {recipe.model.get('name') or 'a model'}, run {rows[0]['settings']}"  # the same in each folder
    about = f"{len(rows)} images of {len({row['prompt'] for row in rows})} prompts, made by a model with kspec-guidance."
    url = url or "https://pypi.org/project/kspec-guidance/"
    description = croissant(name, about, licence_of(rows), url, data, columns, kind, "1.0.0")
    files["croissant.json"] = json.dumps(description, indent=1) + "\n"
    state = _State(store)
    scores = state.scores(rows, report)
    text = card(name, contents, scores, recipe.settings, recipe.obstacles, used)
    written = state.write({**files, CARD: text})
    with disk_errors(out):
        recipe.write_guide(out)
    sums = images | data | {name: written[name] for name in files}
    state.write({SUMS: "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))})


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _State:
    """What this program wrote into a folder, and which images its report has scored."""

    def __init__(self, store: Store):
        self.store, self.path = store, store.state / "written.json"
        try:
            self.known = dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            self.known = {}

    def _keep(self, name: str, digest: str) -> None:
        self.known[name] = digest
        with replacing(self.path) as fresh:
            fresh.write_text(json.dumps(self.known, indent=1, sort_keys=True) + "\n")

    def scores(self, rows: Sequence[Mapping[str, Any]], report: Path | None) -> Any:
        """What ``report.json`` holds, if it was written now, or in an earlier call for the same images; else None."""
        images = hash_json([[row["file_name"], row.get("sha256")] for row in rows])
        with disk_errors(self.store.out):
            if report is not None:
                self._keep("scored images", images)
        path = self.store.out / "report.json"
        if self.known.get("scored images") != images or not path.is_file():
            return None
        return json.loads(path.read_text())

    def write(self, files: Mapping[str, str]) -> dict[str, str]:
        """Write files, except those that another hand wrote or changed; the digests of all, as they are now."""
        found = {}
        with disk_errors(self.store.out):
            for name, text in files.items():
                path, digest = self.store.out / name, hashlib.sha256(text.encode()).hexdigest()
                found[name] = file_digest(path) if path.is_file() else ""
                if found[name] not in ("", digest, self.known.get(name)):
                    warn_user(f"{path} was written or changed by another hand, and is left as it is")
                    continue
                self._keep(name, digest)  # first: after a crash between the two, the file is written again
                found[name] = digest
                with replacing(path) as fresh:
                    fresh.write_text(text, encoding="utf-8", newline="\n")
        return found


def compare_with_original(original: Path, out: Path) -> dict[str, int]:
    """How many images (or shards) of a set have the bytes, or the pixels, of those of an earlier one.

    Args:
        original: its folder.
        out: the folder of the new set.

    Returns:
        Numbers by finding; ``no original`` alone, if there are no checksums of the earlier set.
    """
    old, new = (_sums(folder / SUMS) for folder in (original, out))
    if not old:
        return {"no original": len(new)}
    found = {"same bytes": 0, "same pixels": 0, "different": 0}
    for name in sorted(old.keys() | new.keys()):
        if name in old and old.get(name) == new.get(name):
            found["same bytes"] += 1
        elif name in old and name in new and _same_pixels(original / name, out / name):
            found["same pixels"] += 1
        else:
            found["different"] += 1
    return found


def _sums(path: Path) -> dict[str, str]:
    """The checksums of images or shards in a file of them."""
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = [line.split("  ", 1) for line in lines if "  " in line]
    return {name: digest for digest, name in pairs if name.endswith(DATA)}


def _same_pixels(first: Path, second: Path) -> bool:
    try:
        return all(a == b for a, b in zip_longest(_pixels(first), _pixels(second)))
    except (OSError, ValueError):
        return False


def _pixels(path: Path) -> Iterator[tuple[Any, ...]]:
    """Name, size, mode and pixels of an image, or of each image of a shard."""
    items = [("", path.read_bytes, None)] if path.suffix == ".png" else SetReader(path).items()
    for name, read, _ in items:
        with Image.open(io.BytesIO(read())) as image:
            yield name, image.size, image.mode, image.tobytes()
