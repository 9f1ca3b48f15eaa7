"""Kill a run of `synthesize` with SIGKILL again and again, let it finish, and compare it with one that was left alone.

    python -m tests.synthesis.killed_runs FOLDER

Children are forked from a process that has loaded the pipeline, so that a kill costs no second start. Twenty are killed
after a random time; then, in a fresh folder, one at each of the first steps that touch the disk: fsync and rename.
Prints what happened as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from tests.synthesis.small_runs import contents, make, quiet_pipeline, rows_of

RANDOM, STEPS = 20, 30
SETTINGS = {"prompts": ["heart", "red heart", "runner", "cat face", "man", "dog face"], "images": 16, "batch": 3}


def _deadly(real, budget):
    def call(*args):
        budget[0] -= 1
        if budget[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    return call


def child(pipe, out, die_at=None):
    """Fork a run; it kills itself at its ``die_at``-th fsync or rename."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if die_at is not None:
            budget = [die_at]
            for name in ("fsync", "replace"):
                setattr(os, name, _deadly(getattr(os, name), budget))
        make(out, pipe, **SETTINGS)
    finally:
        os._exit(0)


def finish(pipe, out):
    os.waitpid(child(pipe, out), 0)


def state(out):
    """Committed batches, and images on disk."""
    return len(list(out.glob(".kspec/epoch-*/rank-*/*.safetensors"))), len(list(out.rglob("*.png")))


def main():
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    folder, pipe, rng = Path(sys.argv[1]), quiet_pipeline(), random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    finish(pipe, folder / "whole")
    whole, seconds = contents(folder / "whole"), time.monotonic() - began

    kills, seen = [], []
    while len(kills) < RANDOM:
        pid = child(pipe, folder / "random")
        time.sleep(rng.uniform(0.05, 1.5 * seconds / RANDOM))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills.append(os.WIFSIGNALED(status))
        seen.append(state(folder / "random"))
    finish(pipe, folder / "random")

    stages = []
    for k in range(STEPS):
        _, status = os.waitpid(child(pipe, folder / "steps", die_at=k), 0)
        stages.append(os.WIFSIGNALED(status))
    finish(pipe, folder / "steps")

    found = {
        "killed": sum(kills), "states": seen, "killed_at_steps": sum(stages), "seconds": round(seconds, 1),
        "images": len(rows_of(folder / "whole")),
    }  # fmt: skip
    for name in ("random", "steps"):
        other = contents(folder / name)
        found[name] = {
            "same": other == whole,
            "differ": [n for n in whole if n in other and other[n] != whole[n]][:5],
            "missing": [n for n in whole if n not in other][:5],
            "extra": [n for n in other if n not in whole][:5],
            "twice": len(rows_of(folder / name)) - len({row["file_name"] for row in rows_of(folder / name)}),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
