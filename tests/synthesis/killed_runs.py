"""Kill a run of `synthesize` with SIGKILL repeatedly, let it finish, and compare it with an uninterrupted one.

    python -m tests.synthesis.killed_runs FOLDER

Children are forked from a process that has loaded the pipeline, so that they start fast. Twenty are killed after a random
time; then, in a new folder, one at each of the first 30 disk operations (fsync and rename). Prints the result as JSON.
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

RANDOM_KILLS, DISK_OPERATIONS = 20, 30
SETTINGS = {
    "prompts": ["heart", "red heart", "runner", "cat face", "man", "dog face"],
    "images_per_prompt": 16,
    "batch_size": 3,
}


def _killing(function, budget):
    def call(*args):
        budget[0] -= 1
        if budget[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


def child(pipe, out, die_at=None):
    """Fork a run, which kills itself at its ``die_at``-th fsync or rename."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if die_at is not None:
            budget = [die_at]
            for name in ("fsync", "replace"):
                setattr(os, name, _killing(getattr(os, name), budget))
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
    start = time.monotonic()
    make(folder / "whole", pipe, **SETTINGS)  # here, so that children need not import what a run imports
    whole, seconds = contents(folder / "whole"), time.monotonic() - start

    kills, states = [], []
    while len(kills) < RANDOM_KILLS:
        pid = child(pipe, folder / "random")
        time.sleep(rng.uniform(0.05, 1.5 * seconds / RANDOM_KILLS))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills.append(os.WIFSIGNALED(status))
        states.append(state(folder / "random"))
    finish(pipe, folder / "random")

    kills_at_steps = []
    for k in range(DISK_OPERATIONS):
        _, status = os.waitpid(child(pipe, folder / "steps", die_at=k), 0)
        kills_at_steps.append(os.WIFSIGNALED(status))
    finish(pipe, folder / "steps")

    found = {
        "killed": sum(kills), "states": states, "killed_at_steps": sum(kills_at_steps), "seconds": round(seconds, 1),
        "images": len(rows_of(folder / "whole")),
    }  # fmt: skip
    for name in ("random", "steps"):
        files = contents(folder / name)
        found[name] = {
            "same": files == whole,
            "differ": [n for n in whole if n in files and files[n] != whole[n]][:5],
            "missing": [n for n in whole if n not in files][:5],
            "extra": [n for n in files if n not in whole][:5],
            "twice": len(rows_of(folder / name)) - len({row["file_name"] for row in rows_of(folder / name)}),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
