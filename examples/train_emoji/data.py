"""Fetch the two emoji packages with npm, and read their 64 x 64 images into one array.

Noto Emoji (Apache-2.0) comes in ``emoji-datasource-google``, Twemoji (CC BY 4.0) in ``emoji-datasource-twitter``.
"""

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from captions import Entry, build_entries
from PIL import Image

PACKAGES = {"google": "emoji-datasource-google", "twitter": "emoji-datasource-twitter"}
VERSION = "16.0.0"
SIZE = 64
HELD_OUT = 20  # one emoji in this many, in all styles and tones, is held out from the training of the autoencoder


def download(folder: Path) -> None:
    """Fetch both packages by ``npm pack`` and unpack ``emoji.json`` and the 64 x 64 images, unless that was done before."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, package in PACKAGES.items():
        target = folder / style
        if (target / "done").exists():
            continue
        archive = folder / f"{package}-{VERSION}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", f"{package}@{VERSION}"], cwd=folder, check=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix("package/")
                if member.isfile() and (name == "emoji.json" or name.startswith(f"img/{style}/{SIZE}/")):
                    member.name = name
                    tar.extract(member, target, filter="data")
        (target / "done").touch()


def load(folder: Path) -> tuple[torch.Tensor, list[Entry]]:
    """Load the images as uint8 ``[n, 3, 64, 64]`` (alpha over white) and their entries, in a fixed order."""
    table = json.loads((folder / "google" / "emoji.json").read_text())
    pixels, entries = [], []
    for entry in build_entries(table):
        path = folder / entry.path
        if not path.exists():
            continue
        rgba = Image.open(path).convert("RGBA")
        if rgba.size != (SIZE, SIZE):
            rgba = rgba.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        pixels.append(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")))
        entries.append(entry)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return images, entries


def held_out(entries: list[Entry]) -> torch.Tensor:
    """Return a mask ``[n]`` (bool) of the images held out: all styles and tones of an emoji, so that none leaks."""
    digest = [int(hashlib.sha256(e.unified.encode()).hexdigest(), 16) for e in entries]
    return torch.tensor([d % HELD_OUT == 0 for d in digest])
