"""One process of a synthesis: `torchrun --nproc-per-node 2 -m tests.synthesis.one_process OUT [KIND [NUMBERS]]`.

Writes ``result-*.json`` into OUT, with the rows received and the entries of the memory after each exchange.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from kspec_guidance import SPARKE
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.synthesis import Arm, Prompt
from kspec_guidance.synthesis.memories import RunMemories
from tests.synthesis.small_runs import make, quiet_pipeline

ARMS = [Arm("low", {"guidance_scale": 1.0}, cost=1), Arm("high", guide=0, cost=2)]


def good(image, row):
    return (row["arm"] == "low") == ("heart" in row["prompt"])


def random_features():
    kernel, prompts = GaussianKernel(1.0), GaussianKernel(0.35)
    phi, psi = RandomFourierFeatures(kernel, 576, 256), RandomFourierFeatures(prompts, 160, 64)
    return SPARKE(kernel=kernel, prompt_kernel=prompts, feature_map=phi, prompt_feature_map=psi)


def main(out, kind="exact", numbers=None):
    torch.set_num_threads(1)
    out = Path(out)
    received, receive = [], RunMemories.receive

    def recorded(self, messages):
        receive(self, messages)
        bank = self.banks.get(None)
        received.append([sum(map(len, messages)), 0 if bank is None else len(bank)])

    RunMemories.receive = recorded
    similar = [f"runner{comma} {who}" for comma in (",", "") for who in ("woman", "man")]
    texts = [*similar, "runner", "runner, person", "heart", "red heart"]
    prompts = [Prompt(text, "people" if "runner" in text else "things") for text in texts]
    if numbers:  # of images of the last prompts
        numbers = [int(n) for n in numbers.split(",")]
        prompts = [replace(p, images=n) for p, n in zip(prompts[-len(numbers) :], numbers, strict=True)]
    by, kind = ("group", "exact") if kind == "groups" else ("all", kind)
    guide = random_features() if kind == "guide" else SPARKE()
    more: dict = {}
    if kind in ("arms", "pak-ucb", "promptwise"):
        more["arms"], more["select"] = ARMS, "mixture-greedy" if kind == "arms" else kind
        if kind != "arms":
            more["filter"] = good
        kind = "exact"
    result = make(out, quiet_pipeline(), prompts, 6, 3, guide=guide, memory=kind, memory_by=by, exchange=2, **more)
    values = {k: getattr(result, k) for k in ("made", "total_made", "images", "exchanges")} | {"received": received}
    (out / f"result-{'first' if result.first else os.getpid()}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(*sys.argv[1:])
