"""Load test of the Space: failed requests, results given to the wrong visitor, waiting times, the server's memory.

    python benchmarks/space_load.py --visitors 20 --minutes 3

Starts the app in a process of its own. Each visitor generates repeatedly with its own number of images, adds to memory,
clears it now and then, and checks the number of images in the archive and in its memory.
"""

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

from gradio_client import Client

ROOT = Path(__file__).parents[1]


def resident(pid: int) -> float:
    """Resident memory of a process in megabytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def visit(number: int, url: str, until: float, results: dict[str, list]) -> None:
    r, memory = random.Random(number), 0
    each, prompts = 1 + number % 4, 1 + number % 3
    client = Client(url, verbose=False)
    while time.time() < until:
        began = time.time()
        try:
            out = client.predict(
                "\n".join(["heart", "runner", "flag"][:prompts]), each, "SPARKE", 1.0, number, 4, "noto", None, True,
                api_name="/generate",
            )  # fmt: skip
            memory += each * prompts
            with zipfile.ZipFile(out[6]) as archive:
                made = sum(n.endswith(".png") for n in archive.namelist())
            if made != 2 * each * prompts or f"Memory: {memory} images" not in out[2]:
                results["mixed"].append((number, made, out[2], memory))
            if r.random() < 0.2:
                client.predict(api_name="/clear")
                memory = 0
            results["seconds"].append(time.time() - began)
        except Exception as error:
            results["failed"].append(f"{type(error).__name__}: {error}"[:200])
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--port", type=int, default=7899)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # the clients download into it
        load(args, folder)


def load(args: argparse.Namespace, folder: str) -> None:
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(args.port), "GRADIO_ANALYTICS_ENABLED": "False",
                   "GRADIO_TEMP_DIR": f"{folder}/server"}  # fmt: skip
    server = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT / "examples" / "space", env=environment)
    url = f"http://127.0.0.1:{args.port}/"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(url)
                break
            except OSError:
                time.sleep(1)
        results: dict[str, list] = {"seconds": [], "failed": [], "mixed": []}
        until = time.time() + 60 * args.minutes
        visitors = [threading.Thread(target=visit, args=(k, url, until, results)) for k in range(args.visitors)]
        for visitor in visitors:
            visitor.start()
        memory = []
        while any(v.is_alive() for v in visitors):
            memory.append(resident(server.pid))
            time.sleep(2)
        counts = {name: len(found) for name, found in results.items()}
        print(f"{args.visitors} visitors, {args.minutes:g} minutes: {counts['seconds']} runs, {counts['failed']} failed, "
              f"{counts['mixed']} mixed")  # fmt: skip
        if results["seconds"]:
            seconds = results["seconds"]
            print(f"seconds a run, with waiting: median {statistics.median(seconds):.1f}, maximum {max(seconds):.1f}")
        minutes = [statistics.mean(memory[k : k + 30]) for k in range(0, len(memory), 30)]
        print("server's memory by minute, MB:", *(f"{m:.0f}" for m in minutes))
        for what in results["failed"][:5] + results["mixed"][:5]:
            print("   ", what)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
