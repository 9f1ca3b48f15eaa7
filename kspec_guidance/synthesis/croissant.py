"""Croissant: the description of a set that search engines and loaders read (mlcommons.org/croissant, version 1.0)."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["croissant"]

TERMS = (
    "citeAs", "column", "dataType", "equivalentProperty", "examples", "extract", "field", "fileProperty", "fileObject",
    "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet",
    "references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform", "data",
)  # fmt: skip
TYPES: dict[type, str] = {str: "sc:Text", bool: "sc:Boolean", int: "sc:Integer", float: "sc:Float"}
JSON_TERMS = ("data", "examples")


def _context() -> dict[str, Any]:
    """The context of version 1.0, as its specification has it."""
    context: dict[str, Any] = {"@language": "en", "@vocab": "https://schema.org/", "conformsTo": "dct:conformsTo"}
    context |= {"cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/"}
    context |= {"dct": "http://purl.org/dc/terms/", "sc": "https://schema.org/"}
    context |= {term: {"@id": f"cr:{term}", "@type": "@json"} if term in JSON_TERMS else f"cr:{term}" for term in TERMS}
    return context | {"dataType": {"@id": "cr:dataType", "@type": "@vocab"}}


def croissant(
    name: str,
    description: str,
    licence: str | None,
    url: str,
    files: Mapping[str, str],
    columns: Mapping[str, type | None],
    kind: str,
    version: str,
) -> dict[str, Any]:
    """The Croissant of a set, ready for JSON.

    Args:
        name: of the set.
        description: one sentence or more.
        licence: SPDX expression; None if none is given.
        url: of the set's page.
        files: SHA-256 of ``metadata.jsonl``, or of each shard, by name.
        columns: of the set, with the types of their values.
        kind: ``imagefolder``, ``webdataset`` or ``parquet``.
        version: of the set.
    """
    if kind == "imagefolder":
        distribution = [
            _file("metadata.jsonl", "application/jsonlines", files["metadata.jsonl"]),
            _files("image-files", "image/png", "[0-9]*/*.png"),
        ]
        fields = [_field("images", n, t, {"fileObject": {"@id": "metadata.jsonl"}, "extract": {"column": n}})
                  for n, t in columns.items()]  # fmt: skip
        records = [_records("images", fields, "file_name"), _contents(".*/([0-9]+/[0-9-]+[.]png)$")]
    elif kind == "parquet":
        distribution = [_file(n, "application/x-parquet", digest) for n, digest in files.items()]
        distribution.append(_files("tables", "application/x-parquet", "shard-*.parquet"))
        fields = [
            _field("images", n, t, {"fileSet": {"@id": "tables"}, "extract": {"column": n}}) for n, t in columns.items()
        ]
        content = {"fileSet": {"@id": "tables"}, "extract": {"column": "image"}, "transform": {"jsonPath": "bytes"}}
        records = [_records("images", [*fields, _field("images", "image", "sc:ImageObject", content)], "file_name")]
    else:
        distribution = [_file(n, "application/x-tar", digest) for n, digest in files.items()]
        inside = _files("image-files", "image/png", "*.png")
        distribution.append(inside | {"containedIn": [{"@id": n} for n in files]})
        records = [_contents("([0-9-]+[.]png)$")]
    about: dict[str, Any] = {"@context": _context(), "@type": "sc:Dataset", "name": name, "description": description}
    about |= {"conformsTo": "http://mlcommons.org/croissant/1.0", "url": url, "version": version}
    if licence is not None:
        about["license"] = _licence_url(licence)
    return about | {"distribution": distribution, "recordSet": records}


def _licence_url(licence: str) -> str:
    one = " " not in licence and not licence.startswith("LicenseRef-")
    return f"https://spdx.org/licenses/{licence}.html" if one else licence


def _file(name: str, encoding: str, digest: str) -> dict[str, Any]:
    about = {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name, "encodingFormat": encoding}
    return about | {"sha256": digest}


def _files(name: str, encoding: str, includes: str) -> dict[str, Any]:
    return {"@type": "cr:FileSet", "@id": name, "name": name, "encodingFormat": encoding, "includes": includes}


def _records(name: str, fields: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "key": {"@id": f"{name}/{key}"}, "field": list(fields)}


def _field(records: str, name: str, kind: type | str | None, source: Mapping[str, Any]) -> dict[str, Any]:
    found = kind if isinstance(kind, str) else TYPES[kind or str]
    about: dict[str, Any] = {"@type": "cr:Field", "@id": f"{records}/{name}", "name": name, "dataType": found}
    return about | {"source": dict(source)}


def _contents(name: str) -> dict[str, Any]:
    """The record set of image files: their names, as the regular expression finds them in paths, and their contents."""
    files = {"fileSet": {"@id": "image-files"}}
    fields = [
        _field(
            "contents", "file_name", str, {**files, "extract": {"fileProperty": "fullpath"}, "transform": {"regex": name}}
        ),
        _field("contents", "image", "sc:ImageObject", {**files, "extract": {"fileProperty": "content"}}),
    ]
    return _records("contents", fields, "file_name")
