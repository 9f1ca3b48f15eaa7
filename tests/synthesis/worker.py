"""One process of a synthesis under torchrun or accelerate: `torchrun --nproc-per-node 2 -m tests.synthesis.worker OUT`."""

import json
import sys
from pathlib import Path

import torch

from kspec_guidance import SPARKE
from kspec_guidance.synthesis import Prompt
from kspec_guidance.synthesis import worker as engine
from tests.synthesis.small_runs import make, quiet_pipeline


def main():
    torch.set_num_threads(1)
    out, kind = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "exact"
    told, real = [], engine.Worker.incoming

    def incoming(self, deltas):
        real(self, deltas)
        bank = self.banks.get(None)
        told.append([sum(len(d) for d in deltas), 0 if bank is None else len(bank)])

    engine.Worker.incoming = incoming
    runners = [f"runner{comma} {who}" for comma in (",", "") for who in ("woman", "man")]  # alike: no cut can part them
    texts = [*runners, "runner", "runner, person", "heart", "red heart"]
    prompts = [Prompt(text, "people" if "runner" in text else "things") for text in texts]
    by, kind = ("group", "exact") if kind == "groups" else ("all", kind)
    guide = SPARKE()
    result = make(out, quiet_pipeline(), prompts, images=6, batch=3, guide=guide, memory=kind, memory_by=by, exchange=2)
    said = {"first": result.first, "made": result.made, "images": result.images, "exchanges": result.exchanges,
            "bytes": result.bytes_sent, "told": told}  # fmt: skip
    (out / f"said-{'first' if result.first else id(said)}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
