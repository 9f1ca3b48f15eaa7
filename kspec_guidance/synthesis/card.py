"""The dataset card: README.md with the front matter that the Hugging Face hub reads."""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kspec_guidance.synthesis.export import DTYPES

__all__ = ["Contents", "card", "licence_of"]

HUB_LICENCES = (  # that the hub knows by their SPDX identifiers in lower case
    "apache-2.0", "mit", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "bsd-2-clause", "bsd-3-clause", "unlicense", "wtfpl",
)  # fmt: skip
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
FILES = {"imagefolder": ["metadata.jsonl", "[0-9]*/*.png"], "webdataset": ["*.tar"], "parquet": ["*.parquet"]}
SAMPLE = [  # what load_dataset makes of a sample of a tar shard, beside the metadata
    {"name": name, "dtype": "image" if name == "png" else "string"} for name in ("__key__", "__url__", "png", "txt")
]
EXAMPLES = 5  # prompts that the card shows
LISTED = 8  # values of a column that it lists
TEXT = """{front}
# {name}

{images} images of {prompts} prompts, made by a model: {model}. No image is a photograph. They were generated with
[kspec-guidance](https://pypi.org/project/kspec-guidance/), whose guidance moves each image away from earlier images of
similar prompts, so that the set is varied.

## Contents

{contents}

Prompts, for instance:

{examples}

## How it was made

{made}

{dropped}{reproduction}

## Scores

{scores}

## Marks

{marks}

## Limits

* A prompt is what was asked for, and not a verified description of the image. Small objects, counts, texts and relations
  may differ.
* The images have the biases of the model and of what it was trained on. Guidance makes images of a prompt differ; it does
  not make the set representative of anything.
* Scores are of the image features named beside them, and cannot be compared with scores of other features.
* Before a model is trained on the set, check the terms of the model that made it.

## Licence

{licence}
"""


def licence_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The licences of all images, as one SPDX expression; None unless each image has one."""
    found = {row.get("licence") for row in rows}
    return None if None in found or not found else " AND ".join(sorted(map(str, found)))


@dataclass(frozen=True)
class Contents:
    """What a set holds.

    Attributes:
        rows: metadata of all images, at least one.
        rejected: dropped images, by reason.
        kind: ``imagefolder``, ``webdataset`` or ``parquet``.
    """

    rows: Sequence[Mapping[str, Any]]
    rejected: Mapping[str, int]
    kind: str


def card(
    name: str,
    contents: Contents,
    report: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    obstacles: Sequence[str] = (),
    types: Mapping[str, type | None] | None = None,
) -> str:
    """The text of the card.

    Args:
        name: of the set.
        contents: of the set.
        report: what ``report.json`` holds; None without a report.
        settings: of the run.
        obstacles: what ``reproduce.yaml`` cannot make again.
        types: of the columns of the metadata. Of tar shards the front matter states them: ``load_dataset`` would take
            them from the first samples, and fail where a column has its first value later.
    """
    rows, licence = contents.rows, licence_of(contents.rows)
    texts = list(dict.fromkeys(row["prompt"] for row in rows))
    return TEXT.format(
        front=_front(name, len(rows), contents.kind, licence, types or {}),
        name=_plain(name),
        images=len(rows),
        prompts=len(texts),
        model=_values(rows, "model"),
        contents=_contents(rows, contents.kind),
        examples="\n".join(f"* {_plain(text)}" for text in texts[:: max(1, len(texts) // EXAMPLES)][:EXAMPLES]),
        made=_table(("", ""), _made(rows, settings)),
        dropped=_dropped(contents.rejected),
        reproduction=(
            "`reproduce.yaml` has the settings, but does not make the set again, for it lacks: "
            f"{'; '.join(map(_plain, obstacles))}."
            if obstacles
            else "`reproduce.yaml` makes the set again: `kspec-guidance generate --reproduce reproduce.yaml --out FOLDER`."
        ),
        scores=_scores(report),
        marks=_marks(rows, "self-signed" in str(settings.get("marks"))),
        licence=_licence(licence),
    )


def _front(name: str, images: int, kind: str, licence: str | None, types: Mapping[str, type | None]) -> str:
    from huggingface_hub import DatasetCardData

    about: dict[str, Any] = {}
    if kind == "webdataset" and types:
        columns = [{"name": column, "dtype": DTYPES[found]} for column, found in types.items()]
        about["dataset_info"] = {"features": [*SAMPLE, {"name": "json", "struct": columns}]}
    if licence is not None and licence.lower() in HUB_LICENCES:
        about["license"] = licence.lower()
    elif licence is not None:
        about |= {"license": "other", "license_name": licence}
    data = DatasetCardData(
        **about,
        pretty_name=name,
        size_categories=next((label for limit, label in SIZES if images < limit), "n>10M"),
        task_categories=["text-to-image"],
        annotations_creators=["machine-generated"],
        tags=["synthetic", "ai-generated", "kspec-guidance"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": FILES[kind]}]}],
    )
    return f"---\n{data.to_yaml(line_break=chr(10)).strip()}\n---\n"


def _plain(text: Any) -> str:
    """A text of the user's in one line, that Markdown shows as it is."""
    shown = " ".join(str(text).split())
    shown = html.escape(shown if len(shown) <= 200 else shown[:197] + "...", quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|#~$!" else c for c in shown)


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    """The values of a column, with the number of images if there are several."""
    counts = Counter(row.get(column) for row in rows)
    listed = counts.most_common(LISTED)
    if len(counts) == 1:
        return "unknown" if listed[0][0] is None else _plain(listed[0][0])
    more = f", and {len(counts) - LISTED} more" if len(counts) > LISTED else ""
    return ", ".join(f"{'unknown' if value is None else _plain(value)} ({n} images)" for value, n in listed) + more


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _made(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    columns = {
        "model": "model", "revision": "revision", "pipeline": "pipeline", "scheduler": "scheduler", "steps": "steps",
        "guidance_scale": "classifier-free guidance", "guide": "guide", "variety": "variety", "arm": "arm",
        "versions": "versions",
    }  # fmt: skip
    found = [(label, _values(rows, name)) for name, label in columns.items() if any(name in row for row in rows)]
    named = (
        "seed", "images_per_prompt", "batch_size", "candidates", "start_candidates", "duplicates", "filter", "processes",
    )  # fmt: skip
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k in named if (v := settings.get(k)) is not None}
    if shown.get("processes") == "leases":
        shown["processes"] = "workers that come and go"
    return found + [(k.replace("_", " "), _plain(v)) for k, v in shown.items()]


def _dropped(counts: Mapping[str, int]) -> str:
    listed = ", ".join(f"{_plain(reason)} {n}" for reason, n in sorted(counts.items()))
    return f"Images that were dropped and made again: {listed}.\n\n" if listed else ""


def _contents(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    own = ", ".join(f"`{name}`" for name in rows[0])
    how = {
        "imagefolder": "PNG files, with one line of `metadata.jsonl` for each",
        "webdataset": "tar shards; of each image a PNG file, its prompt (`.txt`) and its metadata (`.json`)",
        "parquet": "Parquet files with the images in the column `image`",
    }[kind]
    return (
        f"{how[0].upper()}{how[1:]}. Columns of the metadata: {own}. `SHA256SUMS` has checksums "
        "(`sha256sum -c SHA256SUMS`), `croissant.json` the description that loaders read."
    )


def _scores(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "None were computed."
    lines = []
    for score in report.get("scores", []):
        low_high = score.get("interval")
        interval = "" if low_high is None else f"{low_high[0]:.3g} to {low_high[1]:.3g}"
        kernel = "" if score["kernel"] in (None, "-") else f" ({_plain(score['kernel'])})"
        lines.append((f"{_plain(score['score'])}{kernel}", f"{score['value']:.3g}", interval, score["n"]))
    doubts = "".join(f"\n* {_plain(w)}" for w in report.get("warnings", []))
    features = _plain(report["embedder"]["name"])
    text = f"{_plain(report['verdict'])}\n\nImage features: {features}.\n\n"
    return (
        text
        + _table(("score", "value", "95% interval", "images"), lines)
        + (f"\n\nRead with care:\n{doubts}" if doubts else "")
    )


def _marks(rows: Sequence[Mapping[str, Any]], self_signed: bool) -> str:
    counts = Counter(row.get("marks") for row in rows)
    iptc = "carry the IPTC digital source type `trainedAlgorithmicMedia` in an XMP packet"
    texts = {
        "iptc": iptc,
        "iptc, c2pa": f"{iptc}, and a signed C2PA manifest"
        + (" (self-signed, identity not verified)" if self_signed else ""),
        None: "carry no mark in the file that they were made by a machine; keep this card with them",
    }
    if len(counts) == 1:
        return f"All images {texts.get(next(iter(counts)), 'carry marks')}."
    return "\n".join(f"* {n} images {texts.get(mark, 'carry marks')}" for mark, n in counts.most_common())


def _licence(licence: str | None) -> str:
    if licence is None:
        return "No licence was given for all of the images."
    one = " " not in licence and not licence.startswith("LicenseRef-")
    return f"[{licence}](https://spdx.org/licenses/{licence}.html)" if one else licence
