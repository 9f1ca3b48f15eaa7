"""What the marks of an image cost: milliseconds of a processor, and bytes, of an XMP packet and a C2PA signature, by size.

    python -m benchmarks.marks --page docs/publishing.md

Images are smooth noise, as PNG. The time of a signer, once in each process, is printed as well.
"""

import argparse
import statistics
import time
from pathlib import Path

from PIL import Image

from benchmarks.pages import fill, table
from kspec_guidance.synthesis.marks import encode_image
from kspec_guidance.synthesis.provenance import package_versions
from kspec_guidance.synthesis.signing import SELF_SIGNED, Signer

SIZES, REPEATS = (64, 512, 1024), 15
ROW = {
    "file_name": "0000/000000-0000.png",
    "prompt": "an old lighthouse by the sea at dusk",
    "model": "someone/a-model",
    "revision": "0" * 40,
    "licence": "CC0-1.0",
    "versions": ", ".join(f"{name} {number}" for name, number in package_versions().items()),
}


def milliseconds(function):
    """Median of the processor time of a call, which other programs on the machine change little."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="Markdown page whose table is written")
    options = parser.parse_args()
    start = time.process_time()
    signer = Signer(SELF_SIGNED)
    print(f"a signer with a new certificate: {1e3 * (time.process_time() - start):.0f} ms")
    rows = []
    for size in SIZES:
        image = Image.effect_noise((size // 8, size // 8), 60).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
        plain, marked = encode_image(image), encode_image(image, row=ROW)
        signed = signer.sign(marked, ROW)
        rows.append([
            f"{size} x {size}",
            f"{milliseconds(lambda image=image: encode_image(image)):.1f} ms, {len(plain):,} bytes",
            f"{milliseconds(lambda image=image: encode_image(image, row=ROW)):.1f} ms, "
            f"+{len(marked) - len(plain):,}",
            f"+{milliseconds(lambda marked=marked: signer.sign(marked, ROW)):.1f} ms, +{len(signed) - len(marked):,}",
        ])  # fmt: skip
    text = table(["image", "PNG without marks", "with IPTC", "C2PA signature"], rows)
    print(text)
    if options.page is not None:
        fill(options.page, {"marks": text})


if __name__ == "__main__":
    main()
