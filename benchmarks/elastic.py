"""Workers that come and go: what the set loses, and what leases cost.

    python benchmarks/elastic.py                     # all parts, half an hour; results in benchmarks/results/elastic.json
    python benchmarks/elastic.py simulation          # seconds

``workers``: the embedded pipeline with 1, 2, 4 and 8 workers, and with workers of which one is killed at random times,
again and again, and another one joins; beside one process that sees everything. Needs the emoji art (fetched with npm on
the first run), whose images are the modes; prints how much faster several workers are. ``seeds``: one process and one
worker with several seeds. ``simulation``: 10^3 workers and 10^8 images: what summaries that come late do to the diversity
of a mixture; the operations, bytes and list prices of a store.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from pages import fill, table
from PIL import Image

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.memory.io import read_tensors
from kspec_guidance.synthesis.records import unpack_tensors
from kspec_guidance.synthesis.schedule import next_batch
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.worker import Worker

BATCH_SIZE = 5  # images made at once

# -- workers that are killed -------------------------------------------------------------------------------------------


def owners(leases):
    """The processes that own or owned a unit."""
    for path in leases.glob("0*"):
        try:
            yield int(json.loads(path.read_text())["worker"].rsplit("-", 2)[1])
        except (OSError, ValueError):
            continue


def disturb(epoch, rng, running):
    """Kill a worker at random, and let another one join; whether one was killed."""
    alive = []
    for pid in sorted(set(owners(epoch / "leases"))):
        try:
            if b"--join" in Path(f"/proc/{pid}/cmdline").read_bytes():  # which is empty once the process has ended
                alive.append(pid)
        except OSError:
            continue
    if not alive:
        return False
    os.kill(rng.choice(alive), signal.SIGKILL)
    line = ["--reproduce", str(epoch / "recipe" / "reproduce.yaml"), "--join", str(epoch), "--quiet"]
    running.append(subprocess.Popen([sys.executable, "-m", "kspec_guidance", "generate", *line]))
    return True


def run_set(out, prompts, workers, kill, args):
    """Make a set; returns the seconds, the seconds of processors, and how many workers were killed."""
    path = out.with_suffix(".txt")
    path.write_text("\n".join(prompts) + "\n")
    line = [sys.executable, "-m", "kspec_guidance", "generate", "--prompts", str(path), "--out", str(out), "--no-report",
            "--images", str(args.images), "--batch-size", str(BATCH_SIZE), "--steps", str(args.steps),
            "--licence", "CC0-1.0", "--quiet", "--exchange", "4"]  # fmt: skip
    line += [] if workers is None else ["--workers", str(workers), "--lease-seconds", "8"]
    rng, epoch, kills, running = random.Random(workers), out / ".kspec" / "epoch-000", 0, []
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for attempt in range(50):
        started = subprocess.Popen(line)
        while started.poll() is None:
            time.sleep(rng.uniform(3, 6) if kill else 0.2)
            if kill and kills < args.kills and started.poll() is None:
                kills += disturb(epoch, rng, running)
        for process in running:
            process.wait()
        if started.returncode == 0:
            break
        if not kill or attempt > args.kills + 3:
            raise RuntimeError(f"{' '.join(line)} failed")
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, kills


def contents(out):
    """Images ``[n, 3, 64, 64]`` in 0..1, their prompts and files, and conditional RKE of a set."""
    x, t, names, files = [], [], [], []
    for record in Store(out).records(tensors=True):
        found = unpack_tensors(record.tensors)
        x.append(found.x.flatten(1))
        t.append(found.prompt_features)
        names += [row["prompt"] for row in record.rows]
        files += [row["file_name"] for row in record.rows]
    arrays = [np.asarray(Image.open(out / name).convert("RGB")) for name in files]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    x, t = l2_normalize(torch.cat(x)).double(), l2_normalize(torch.cat(t)).double()
    rke = F.conditional_rke_score(x, t, GaussianKernel(0.5), GaussianKernel(0.35))
    return images, names, {"images": len(files), "twice": len(files) - len(set(files)), "rke": float(rke)}


def scores(out, art):
    """Modes of a prompt, on average, and conditional RKE of the set."""
    images, names, found = contents(out)
    modes = []
    for name in sorted(set(names)):
        mine = torch.tensor([k for k, other in enumerate(names) if other == name])
        modes.append(art.judge(images[mine], name)["modes"])
    return {**found, "modes": float(np.mean(modes))}


def steady(out):
    """Images a second and worker, while all workers make images; None if there is no such time.

    That is from the time when each worker has committed its first batch, to the first of their last commits.
    """
    commits = {}
    for path in sorted((out / ".kspec" / "epoch-000").glob("rank-*/*.safetensors")):
        about = read_tensors(path, "batch")[1]
        commits.setdefault(about["lease"]["worker"], []).append((path.stat().st_mtime, len(about["rows"])))
    start, end = max(min(c)[0] for c in commits.values()), min(max(c)[0] for c in commits.values())
    made = sum(n for c in commits.values() for when, n in c if start < when <= end)
    return made / (end - start) / len(commits) if end > start else None


ROWS = {  # workers, and whether some are killed
    "one process": (None, False), "1 worker": (1, False), "2 workers": (2, False), "4 workers": (4, False),
    "8 workers": (8, False), "2 workers, killed": (2, True), "4 workers, killed": (4, True), "8 workers, killed": (8, True),
}  # fmt: skip


def workers(args):
    """One process, and 1, 2, 4 and 8 workers with and without kills; yields after each of them."""
    from effect import Art
    from synthesis import subjects

    art = Art(args.data)
    prompts = subjects(art.entries, args.prompts, 4)
    found = {"settings": {"prompts": args.prompts, "images": args.images, "steps": args.steps, "cores": os.cpu_count()}}
    for name, (number, kill) in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "set")
            seconds, cpu, kills = run_set(out, prompts, number, kill, args)
            one = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "killed": kills, **scores(out, art)}
            if number is not None and not kill:
                one["steady"] = steady(out)
        found[name] = one
        print(name, one, flush=True)
        yield found
    print(efficiency(found))


def efficiency(found):
    """Images a second by number of workers: those of the whole run, and while all workers make images."""
    made = {name: f for name, f in found.items() if f.get("steady")}
    alone, rows = made.get("1 worker"), []
    for name, f in made.items() if alone else ():
        number = ROWS[name][0]
        rates = f["images"] / f["seconds"], number * f["steady"]
        shares = alone["seconds"] / f["seconds"] / number, f["steady"] / alone["steady"]
        rows.append([name, *(cell for r, s in zip(rates, shares, strict=True) for cell in (f"{r:.2f}", f"{s:.0%}"))])
    return table(["", "images a second", "efficiency", "while all make images", "efficiency"], rows)


@contextmanager
def batches_of_units(owners):
    """A process whose batches end where those of a unit do; ``owners`` are the units of the prompts, by text."""

    def find(self):
        settings, jobs = self.settings, sorted(self.jobs, key=lambda job: owners[job.prompt.text])
        return next_batch(jobs, settings.batch_size, settings.seed, lambda job: owners[job.prompt.text])

    with mock.patch.object(Worker, "next_batch", find):
        yield


def seeds(args):
    """Conditional RKE of one process and of one worker: several seeds, and whether images of a prompt fill its batches.

    Two controls tell why they differ: one process whose batches end where those of a unit do, and one worker with a
    single unit of all prompts.
    """
    from effect import Art
    from synthesis import subjects

    from kspec_guidance import load_demo_pipeline
    from kspec_guidance.synthesis import assignment, synthesize

    art, pipe = Art(args.data), load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = subjects(art.entries, args.prompts, 4)
    found = {"settings": {"prompts": args.prompts, "steps": args.steps, "batch": BATCH_SIZE}}

    def one(images, seed, **more):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "set")
            synthesize(
                prompts, out, pipe, images_per_prompt=images, batch_size=BATCH_SIZE, seed=seed, exchange=4,
                call={"num_inference_steps": args.steps, "guidance_scale": 5.0}, report=False, marks=False, **more,
            )  # fmt: skip
            path, owners = out / ".kspec" / "epoch-000" / assignment.PROMPTS, None
            if path.exists():
                owners = dict(zip(prompts, read_tensors(path, "prompts")[0]["owners"].tolist(), strict=True))
            return contents(out)[2]["rke"], owners

    for seed in range(args.seeds):
        for images in (args.images, -(-args.images // BATCH_SIZE) * BATCH_SIZE):
            rke = {"one process": one(images, seed)[0]}
            rke["1 worker"], owners = one(images, seed, workers=1)
            with batches_of_units(owners):
                rke["one process, batches of units"] = one(images, seed)[0]
            with mock.patch.object(assignment, "bundles", lambda groups, goals, largest: [list(range(len(goals)))]):
                rke["1 worker, one unit"] = one(images, seed, workers=1)[0]
            for name, value in rke.items():
                found.setdefault(f"{images} images", {}).setdefault(name, []).append(value)
            print(seed, images, {name: round(value, 4) for name, value in rke.items()}, flush=True)
            yield found


# -- simulation --------------------------------------------------------------------------------------------------------

WORKERS, IMAGES, BATCH = 1_000, 10**8, 8
MODES, TOPIC = 512, 2_048  # modes of a topic, and images of it
PUSH = 2.0  # how strongly a mode is avoided that has images already
PIECES = 8  # units of a topic at most; topics have as many units together as there are workers


def mixture(pieces, every, topics, seed=0):
    """Topics whose images ``pieces`` units make at the same time: RKE and modes found of a topic, on average.

    A unit draws a mode with the weight of the mixture, divided by a power of the images that it knows: its own, and those
    of the other units as of their last summary, of ``every`` batches; None for never.
    """
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, MODES + 1) ** 1.2
    own = np.zeros((topics, pieces, MODES))
    heard = np.zeros_like(own)
    for step in range(TOPIC // (BATCH * pieces)):
        if every is not None and step % every == 0:
            heard = own.sum(1, keepdims=True) - own
        known = own + heard
        p = weights / (1 + known) ** PUSH
        p /= p.sum(2, keepdims=True)
        own += rng.multinomial(BATCH, p)
    total = own.sum(1)
    p = total / total.sum(1, keepdims=True)
    return float((1 / (p**2).sum(1)).mean()), float((total > 0).sum(1).mean())


def storage(unit_images=5_000, neighbours=4, image_bytes=1.3e6, sample_bytes=65_536, exchange=8, seconds_an_image=1.0):
    """Operations, bytes and dollars of a run on an object store, as the code makes them.

    List prices of S3 Standard, us-east-1: 0.005 dollars for 1,000 puts or lists, 0.0004 for 1,000 gets; nothing for bytes
    within the region, and for deletes.
    """
    units, batches = IMAGES / unit_images, IMAGES / BATCH
    summaries = batches / exchange
    hours = IMAGES * seconds_an_image / WORKERS / 3600
    takes, pages = units + WORKERS, units / 1_000 / 2  # half of the units have had an owner, on average
    ops = {
        "puts": 2 * batches + summaries + WORKERS * hours * 120 + 4 * units,  # images, records; heartbeats of 30 s
        "lists": takes * 3 * pages,
        "gets": batches + summaries * neighbours * 2 + takes,  # is another owner there; summaries, and one that is not
        "gets to make the set": 2 * batches,
    }
    read = summaries * neighbours * BATCH * exchange * sample_bytes * 0.05  # samples that matter to others
    dollars = (ops["puts"] + ops["lists"]) * 5e-6 + (ops["gets"] + ops["gets to make the set"]) * 4e-7
    return {
        **{name: round(n) for name, n in ops.items()},
        "written_tb": (IMAGES * (image_bytes + sample_bytes) + summaries * BATCH * exchange * sample_bytes * 0.05) / 1e12,
        "read_tb": read / 1e12,
        "read_to_make_the_set_tb": IMAGES * (image_bytes + sample_bytes) / 1e12,
        "mb_per_second_and_worker": (read + IMAGES * (image_bytes + sample_bytes)) / 1e6 / (WORKERS * hours * 3600),
        "hours": hours,
        "dollars": dollars,
    }  # fmt: skip


def simulation(args):
    """Staleness against diversity, and the cost of the storage."""
    start = time.perf_counter()
    topics = WORKERS // PIECES
    whole = mixture(1, None, topics)
    found = {"one process": {"rke": whole[0], "modes": whole[1]}}
    for pieces, every in [(2, 1), (2, 8), (2, 32), (2, None), (8, 1), (8, 4), (8, 16), (8, None)]:
        rke, modes = mixture(pieces, every, topics)
        when = "never" if every is None else f"after {every} batches"
        found[f"{pieces} units, {when}"] = {"rke": rke, "modes": modes, "of_one": rke / whole[0]}
    found["storage"], found["seconds"] = storage(), time.perf_counter() - start
    for name, values in found.items():
        print(name, values)
    yield found


# -- page --------------------------------------------------------------------------------------------------------------


def page(results):
    """Tables for docs/scaling.md."""
    found, parts = results["workers"], {}
    one, rows = found["one process"], []
    for name in filter(found.get, ROWS):
        f = found[name]
        modes = f"{f['modes']:.2f} ({f['modes'] / one['modes'] - 1:+.1%})"
        rke = f"{f['rke']:.3f} ({f['rke'] / one['rke'] - 1:+.1%})"
        seconds = [f"{f['seconds']:.0f}", f"{f['cpu_seconds']:.0f}"]
        rows.append([name, *(str(f[k]) for k in ("killed", "images", "twice")), modes, rke, *seconds])
    head = ["", "killed", "images", "twice", "modes of a prompt", "conditional RKE", "seconds", "of processors"]
    parts["elastic"] = table(head, rows)
    rows = []
    for name, f in results["seeds"].items():
        if name != "settings":
            plain = np.array(f["one process"])
            for other, values in f.items():
                v = np.array(values)
                ratios = 100 * (v / plain - 1)
                spread = f"{ratios.mean():+.1f}% ({ratios.min():+.1f} to {ratios.max():+.1f})"
                row = [name, other, f"{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})"]
                rows.append([*row, "" if other == "one process" else spread])
    parts["seeds"] = table(["of each prompt", "", "conditional RKE", "difference to one process, same seed"], rows)
    rows = [
        [name, f"{f['rke']:.1f}", f"{f.get('of_one', 1):.3f}", f"{f['modes']:.0f}"]
        for name, f in results["simulation"].items() if isinstance(f, dict) and "modes" in f
    ]  # fmt: skip
    parts["staleness"] = table(["summaries", "RKE of a topic", "of one process", "modes found"], rows)
    f = results["simulation"]["storage"]
    rows = [
        ["puts", f"{f['puts'] / 1e6:.1f} million", "images, records, summaries, heartbeats"],
        ["gets", f"{f['gets'] / 1e6:.1f} million", "summaries, and before each commit whether there is another owner"],
        ["gets to make the set", f"{f['gets to make the set'] / 1e6:.1f} million", "records and images"],
        ["lists", f"{f['lists'] / 1e6:.1f} million", "which units are free"],
        ["dollars for operations", f"{f['dollars']:.0f}", ""],
        ["written", f"{f['written_tb']:.0f} TB", "images and samples"],
        ["read by workers", f"{f['read_tb']:.1f} TB", "summaries"],
        ["hours", f"{f['hours']:.0f}", ""],
        ["of each worker", f"{f['mb_per_second_and_worker']:.1f} MB/s", "read and written"],
    ]
    parts["storage"] = table(["", "", "for"], rows)
    return parts


PARTS = {"workers": workers, "seeds": seeds, "simulation": simulation}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/elastic.json"))
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--images", type=int, default=10, help="for each prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5, help="of ``seeds``")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--page", type=Path, help="fill its tables, such as docs/scaling.md")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.parts:
        for found in PARTS[name](args):
            results[name] = found
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.page is not None:
        fill(args.page, page(results))


if __name__ == "__main__":
    main()
