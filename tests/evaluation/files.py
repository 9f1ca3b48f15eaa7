"""Files of image sets, written for tests."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from kspec_guidance.evaluation.embedders import ImageEmbedder
from kspec_guidance.evaluation.image_sets import load_images

RED = ImageEmbedder(lambda x: x[:, :1, 0, 0], 8, "red", (0, 0, 0), (1, 1, 1))


def encoded(red=0, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(out, kind)
    return out.getvalue()


def write(folder, files):
    """Write files: a number is an image of that red, others are texts or bytes."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = encoded(content) if isinstance(content, int) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def tar_bytes(files, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files if isinstance(files, list) else files.items():
            content = encoded(content) if isinstance(content, int) else content
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def lines(*entries):
    return "".join(json.dumps({"file_name": name, "prompt": prompt}) + "\n" for name, prompt in entries)


def prompts(path, **settings):
    found = load_images(path, RED, **settings)
    return dict(zip(found.names, found.prompts or [None] * len(found), strict=True))


def reds(found):
    return [round(float(r) * 255) for r in found.features[:, 0]]


def table(path, columns):
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path)


def cells(*values):
    pa = pytest.importorskip("pyarrow")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([v if isinstance(v, dict | None) else {"bytes": encoded(v), "path": f"{v}.png"} for v in values], kind)
