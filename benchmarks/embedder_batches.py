"""Processor time of image embedders at the batch sizes 32 and 4, on one thread: milliseconds an image, in interleaved runs.

    python benchmarks/embedder_batches.py

EfficientNet-Lite0 has its own weights, the others have random ones.
"""

import statistics
import time

import torch
from pages import table
from torchvision.models import resnet50, vit_b_32

from kspec_guidance.evaluation.embedders import efficientnet_lite

SIZES = [32, 4]
REPEATS = 5


def main() -> None:
    torch.set_num_threads(1)
    networks = {
        "EfficientNet-Lite0": efficientnet_lite().network,
        "ResNet-50": resnet50().eval(),
        "ViT-B/32": vit_b_32().eval(),
    }
    rows = []
    for name, network in networks.items():
        found: dict[int, list[float]] = {size: [] for size in SIZES}
        for _ in range(REPEATS):
            for size in SIZES:
                x = torch.randn(size, 3, 224, 224)
                start = time.process_time()
                with torch.inference_mode():
                    network(x)
                found[size].append((time.process_time() - start) / size * 1e3)
        rows.append([name, *(f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in found.values())])
    print(table(["network", *(f"{size} images at once" for size in SIZES)], rows))


if __name__ == "__main__":
    main()
