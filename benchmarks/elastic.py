"""Workers that come and go: what the set loses, and what leases cost.

    python benchmarks/elastic.py                     # all parts, half an hour; results in benchmarks/results/elastic.json
    python benchmarks/elastic.py simulation          # seconds

``workers``: the embedded pipeline with 1, 2 and 4 workers, of which one is killed at random times, again and again, and
another one joins; beside one process that sees everything. Needs the emoji art (fetched with npm on the first run), whose
images are the modes. ``seeds``: one process and one worker with several seeds. ``simulation``: 10^3 workers and 10^8
images: what summaries that come late do to the diversity of a mixture; the operations, bytes and list prices of a store.
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
from pathlib import Path

import numpy as np
import torch
from pages import fill, table
from PIL import Image

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.synthesis.records import unpack_tensors
from kspec_guidance.synthesis.store import Store

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
    for _ in range(50):
        started = subprocess.Popen(line)
        while started.poll() is None:
            time.sleep(rng.uniform(4, 12) if kill else 0.2)
            if kill and kills < args.kills and started.poll() is None:
                kills += disturb(epoch, rng, running)
        for process in running:
            process.wait()
        if started.returncode == 0:
            break
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, kills


def scores(out, art):
    """Modes of a prompt, and conditional RKE of the set."""
    x, t, names, files = [], [], [], []
    for record in Store(out).records(tensors=True):
        found = unpack_tensors(record.tensors)
        x.append(found.x.flatten(1))
        t.append(found.prompt_features)
        names += [row["prompt"] for row in record.rows]
        files += [row["file_name"] for row in record.rows]
    arrays = [np.asarray(Image.open(out / name).convert("RGB")) for name in files]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    modes = []
    for name in sorted(set(names)):
        mine = torch.tensor([k for k, other in enumerate(names) if other == name])
        modes.append(art.judge(images[mine], name)["modes"])
    x, t = l2_normalize(torch.cat(x)).double(), l2_normalize(torch.cat(t)).double()
    rke = F.conditional_rke_score(x, t, GaussianKernel(0.5), GaussianKernel(0.35))
    return {"images": len(files), "twice": len(files) - len(set(files)), "modes": float(np.mean(modes)), "rke": float(rke)}


def workers(args):
    """One process, and 1, 2 and 4 workers with and without kills."""
    from effect import Art
    from synthesis import subjects

    art = Art(args.data)
    prompts = subjects(art.entries, args.prompts, 4)
    found = {"settings": {"prompts": args.prompts, "images": args.images, "steps": args.steps}}
    for name, number, kill in [
        ("one process", None, False), ("1 worker", 1, False), ("2 workers", 2, False), ("2 workers, killed", 2, True),
        ("4 workers, killed", 4, True),
    ]:  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "set")
            seconds, cpu, kills = run_set(out, prompts, number, kill, args)
            one = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "killed": kills, **scores(out, art)}
        found[name] = one
        print(name, one, flush=True)
    return found


def seeds(args):
    """Conditional RKE of one process and of one worker: several seeds, and whether images of a prompt fill its batches."""
    from effect import Art
    from synthesis import subjects

    from kspec_guidance import load_demo_pipeline
    from kspec_guidance.synthesis import synthesize

    art, pipe = Art(args.data), load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = subjects(art.entries, args.prompts, 4)
    found = {"settings": {"prompts": args.prompts, "steps": args.steps, "batch": BATCH_SIZE}}
    for seed in range(args.seeds):
        for images in (args.images, -(-args.images // BATCH_SIZE) * BATCH_SIZE):
            for name, more in (("one process", {}), ("1 worker", {"workers": 1})):
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder, "set")
                    synthesize(
                        prompts, out, pipe, images_per_prompt=images, batch_size=BATCH_SIZE, seed=seed, exchange=4,
                        call={"num_inference_steps": args.steps, "guidance_scale": 5.0}, report=False, marks=False, **more,
                    )  # fmt: skip
                    rke = scores(out, art)["rke"]
                found.setdefault(f"{images} images", {}).setdefault(name, []).append(rke)
                print(seed, images, name, round(rke, 4), flush=True)
    return found


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
    return found


# -- page --------------------------------------------------------------------------------------------------------------


def page(results):
    """Tables for docs/scaling.md."""
    found, parts = results["workers"], {}
    one = found["one process"]
    rows = [
        [name, *(str(f[k]) for k in ("killed", "images", "twice")),
         f"{f['modes']:.2f} ({f['modes'] / one['modes'] - 1:+.1%})",
         f"{f['rke']:.3f} ({f['rke'] / one['rke'] - 1:+.1%})", f"{f['seconds']:.0f}", f"{f['cpu_seconds']:.0f}"]
        for name, f in found.items() if name != "settings"
    ]  # fmt: skip
    head = ["", "killed", "images", "twice", "modes of a prompt", "conditional RKE", "seconds", "of processors"]
    parts["elastic"] = table(head, rows)
    rows = []
    for name, f in results["seeds"].items():
        if name != "settings":
            one, worker = np.array(f["one process"]), np.array(f["1 worker"])
            ratios = 100 * (worker / one - 1)
            spread = f"{ratios.mean():+.1f}% ({ratios.min():+.1f} to {ratios.max():+.1f})"
            rows.append([name, *(f"{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})" for v in (one, worker)), spread])
    parts["seeds"] = table(["of each prompt", "one process", "1 worker", "difference, same seed"], rows)
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
        results[name] = PARTS[name](args)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.page is not None:
        fill(args.page, page(results))


if __name__ == "__main__":
    main()
