"""One process of a synthesis: `torchrun --nproc-per-node 2 -m tests.synthesis.one_process OUT [KIND]`.

Writes ``result-*.json`` into OUT, with the rows received and the entries of the memory after each exchange.
"""

import json
import sys
from pathlib import Path

import torch

from kspec_guidance import SPARKE
from kspec_guidance.synthesis import Prompt
from kspec_guidance.synthesis.memories import RunMemories
from tests.synthesis.small_runs import make, quiet_pipeline


def main():
    torch.set_num_threads(1)
    out, kind = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "exact"
    received, receive = [], RunMemories.receive

    def recorded(self, messages):
        receive(self, messages)
        bank = self.banks.get(None)
        received.append([sum(map(len, messages)), 0 if bank is None else len(bank)])

    RunMemories.receive = recorded
    similar = [f"runner{comma} {who}" for comma in (",", "") for who in ("woman", "man")]
    texts = [*similar, "runner", "runner, person", "heart", "red heart"]
    prompts = [Prompt(text, "people" if "runner" in text else "things") for text in texts]
    by, kind = ("group", "exact") if kind == "groups" else ("all", kind)
    result = make(out, quiet_pipeline(), prompts, 6, 3, guide=SPARKE(), memory=kind, memory_by=by, exchange=2)
    values = {"made": result.made, "images": result.images, "exchanges": result.exchanges, "received": received}
    (out / f"result-{'first' if result.first else id(values)}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
