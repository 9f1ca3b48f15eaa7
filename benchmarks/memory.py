"""What a memory costs: a guided step against one read of its rows, the memories of constant size, and a whole synthesis.

    python benchmarks/memory.py                  # all of it, half an hour; results in benchmarks/results/memory.json
    python benchmarks/memory.py step prompts     # these parts only

Parts: ``step`` (10^4 rows of 16,384), ``prompts`` (10^5 rows of 1,000 prompts), ``published`` (full kernel matrices by
autograd), ``compressed`` (10^3 to 10^6 entries), ``direction`` (accuracy of the memories of constant size), ``whole``
(2,000 images of the embedded pipeline on two processes), ``scale`` (a simulation to 10^8 samples). Times are medians of
several runs; the floor of each is measured in the same process.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, l2_normalize, median_bandwidth
from kspec_guidance.kernels.stationary import weighted_median
from kspec_guidance.memory import CentroidMemory, MemoryBank, PromptWeights, RandomFeatureMemory
from kspec_guidance.objectives import RKE, ConditionalRKE

WIDTH = 16_384
GAUSSIAN = GaussianKernel(0.7)


def median_ms(run, times=7):
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append((time.perf_counter() - began) * 1e3)
    return statistics.median(found)


def once_ms(run):
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def unit_rows(*size, seed=0):
    return l2_normalize(torch.randn(*size, generator=torch.Generator().manual_seed(seed)))


def filled(n, dtype=torch.float32, prompts=None, width=WIDTH):
    bank = MemoryBank(dtype=dtype)
    for start in range(0, n, 500):
        k = min(500, n - start)
        bank.add(unit_rows(k, width, seed=start), None if prompts is None else prompts[start : start + k])
    return bank


def later_step(objective, x, prompt_features, memory):
    """A guided step of a run after its first one, which is taken here."""
    pairs = objective.pairs(x, prompt_features, memory)
    objective.gradient(x, prompt_features, memory, pairs=pairs)
    return lambda: objective.gradient(x, prompt_features, memory, pairs=pairs).rows


def copied_bytes(selection, like):
    """Bytes of the rows that a selection holds as a copy for the steps of a run."""
    blocks = selection._plan(like)[1]
    return 0 if blocks is None or selection.indices is None else sum(b.numel() * b.element_size() for b in blocks)


def step(n=10_000):
    """One gradient over the whole memory, one product with all rows, and a profile of the gradient."""
    bank, objective, found = filled(n), RKE(), {}
    matrix = torch.cat(bank._store.view(0, n))
    for batch in (1, 8):
        x = unit_rows(batch, WIDTH, seed=99)
        rows = x[0] if batch == 1 else x.T.contiguous()
        first = once_ms(lambda x=x: objective.gradient(x, None, bank))
        floor = median_ms(lambda rows=rows, matrix=matrix: matrix @ rows)
        ours = median_ms(later_step(objective, x, None, bank))
        found[f"batch {batch}"] = {"floor_ms": floor, "first_ms": first, "gradient_ms": ours, "ratio": ours / floor}
    found["bytes_beside"] = bank.overhead_bytes / (n * WIDTH * 4)
    found["bytes_reserved"] = bank.nbytes / (n * WIDTH * 4) - 1
    x, before = unit_rows(1, WIDTH, seed=99), peak_mb()
    objective.gradient(x, None, bank)
    found["peak_growth_of_a_gradient_mb"] = peak_mb() - before
    found["profile_ms"] = profile(later_step(objective, x, None, bank))
    for dtype in (torch.float16, torch.bfloat16):
        half = filled(n, dtype)
        ours = median_ms(later_step(objective, x, None, half))
        found[str(dtype).removeprefix("torch.")] = {
            "gradient_ms": ours,
            "ratio_to_float32_floor": ours / found["batch 1"]["floor_ms"],
        }
    return found


def profile(run):
    """Self time of the most expensive operations, from one run."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    names = {"aten::mm": "products with x", "aten::addmm_": "sum of rows", "aten::index_select": "rows for the median"}
    table = {names.get(e.key, e.key): e.self_cpu_time_total / 1e3 for e in events}
    top = dict(list(table.items())[:5])
    return {**top, "all other operations": sum(table.values()) - sum(top.values())}


def prompts(n=100_000, number=1000):
    """10^5 rows, of which an image reads those of similar prompts only.

    Rows are in the order of a synthesis, prompt by prompt, or in random order.
    """
    found = {}
    for topic, mixed in ((5, False), (40, False), (5, True), (40, True)):
        centres = unit_rows(number // topic, 64, seed=1)
        g = torch.Generator().manual_seed(3)
        texts = l2_normalize(centres.repeat_interleave(topic, 0) + 0.03 * torch.randn(number, 64, generator=g))
        order = torch.randperm(number, generator=g)  # similar prompts do not follow each other
        which = torch.randint(number, (n,), generator=g) if mixed else order.repeat_interleave(n // number)
        bank = filled(n, prompts=texts[which])
        name = f"{topic} similar prompts, {'mixed' if mixed else 'prompt by prompt'}"
        by_batch, copied = over_prompts(bank, texts)
        found |= {f"{name}, {k}": v for k, v in by_batch.items()}
        found["bytes_beside"] = (bank.overhead_bytes + copied) / (n * WIDTH * 4)
        del bank
    return found


def over_prompts(bank, texts):
    """Times by batch size, and the bytes of the rows that a run copies."""
    objective, found, copied, cold = ConditionalRKE(), {}, 0, torch.empty(12_000_000)
    prompt_weights = PromptWeights(objective.prompt_kernel)

    def cold_ms(run):  # 48 MB are written before each run, as by a denoiser, so the rows are in no cache
        times = []
        for _ in range(7):
            cold.add_(1)
            times.append(once_ms(run))
        return statistics.median(times)

    for batch in (1, 8):
        x, t = unit_rows(batch, WIDTH, seed=99), texts[:1].expand(batch, -1)
        selection = bank.select(t, prompt_weights, 1e-3)
        similar = selection.rows(x)
        rows = x[0] if batch == 1 else x.T.contiguous()
        floor = cold_ms(lambda r=rows, s=similar: s @ r)
        firsts = []
        for _ in range(2):  # of the first image of all, for which buffers are allocated, and of the next one
            cold.add_(1)
            firsts.append(once_ms(lambda x=x, t=t: objective.gradient(x, t, bank)))
        later = cold_ms(later_step(objective, x, t, bank))
        copied = max(copied, copied_bytes(selection, x))
        image = (firsts[1] + 11 * later) / 12  # of the twelve guided steps of an image
        found[f"batch {batch}"] = {
            "rows": len(selection), "of": len(bank), "floor_ms": floor, "first_at_all_ms": firsts[0],
            "first_ms": firsts[1], "later_ms": later, "mean_of_an_image_ms": image,
            "ratio_later": later / floor, "ratio": image / floor,
        }  # fmt: skip
    return found, copied


def published(n=4000):
    """Conditional RKE of all rows, its full kernel matrices differentiated by autograd, against the closed form."""
    texts = unit_rows(n + 1, 64, seed=3)
    bank, x = filled(n, prompts=texts[:n]), unit_rows(1, WIDTH, seed=99)
    old, kernel, prompt_kernel = bank.x.clone(), GAUSSIAN, GaussianKernel(0.35)

    def full():
        z = x.clone().requires_grad_()
        k = kernel(torch.cat([old, z])) * prompt_kernel(texts)
        score = prompt_kernel(texts).square().sum() / k.square().sum()
        return torch.autograd.grad(score.log(), z)[0]

    objective = ConditionalRKE(kernel)
    theirs = median_ms(full, 3)
    ours = median_ms(later_step(objective, x, texts[n:], bank))
    all_rows = median_ms(later_step(RKE(kernel), x, None, bank))
    cosine = torch.cosine_similarity(full(), objective.gradient(x, texts[n:], bank).rows).item()
    return {
        "full_ms": theirs, "ours_ms": ours, "ours_all_rows_ms": all_rows, "faster": theirs / all_rows, "cosine": cosine,
    }  # fmt: skip


def compressed(largest=1_000_000, width=64):
    """Time of a gradient of 8 samples, its pairs included, from 10^3 to 10^6 entries that all count."""
    kernel, found = GaussianKernel(1.0), {}
    texts = unit_rows(50, 16, seed=4)
    phi, psi = RandomFourierFeatures(kernel, width, 1024), RandomFourierFeatures(GaussianKernel(0.5), 16, 128)
    makes = {
        "random features, 1,024 x 128": (
            RandomFeatureMemory(phi.power(2), psi.power(2)),
            {"feature_map": phi, "prompt_feature_map": psi},
        ),
        "weighted means, 256": (CentroidMemory(256), {}),
    }
    x, t = unit_rows(8, width, seed=99), texts[:8]
    for name, (memory, settings) in makes.items():
        objective = ConditionalRKE(kernel, prompt_kernel=GaussianKernel(0.5), **settings) if settings else RKE(kernel)
        objective._warned = True
        times, adding, n = {}, {}, 0
        for goal in [k for k in (1000, 10_000, 100_000, 1_000_000) if k <= largest]:
            began = time.perf_counter()
            while n < goal:
                k = min(1000, goal - n)
                which = torch.arange(n, n + k) % 50
                rows = unit_rows(k, width, seed=n)
                if isinstance(memory, RandomFeatureMemory) and n:  # the same sums by products: a hundred times as fast
                    memory.total = memory.total + sums(memory, rows, texts[which])
                    memory._count += k
                else:
                    memory.add(rows, texts[which])
                n += k
            adding[goal] = (time.perf_counter() - began) * 1e3
            median_ms(lambda m=memory, o=objective: o.gradient(x, t, m), 101)  # warm
            times[goal] = median_ms(lambda m=memory, o=objective: o.gradient(x, t, m), 301)
            print(f"  {name}: {goal} entries, {times[goal]:.3f} ms", flush=True)
        found[name] = {"ms": times, "largest_over_smallest": max(times.values()) / min(times.values()), "adding_ms": adding}
    return found


def latents(number, folder):
    """Latents of the embedded autoencoder and prompt features: of the training art, then mirrored and shifted by cells.

    Shifted latents are close to the latents of shifted images.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_emoji"))
    import data

    from kspec_guidance import SPARKE, encode_reference, load_demo_pipeline
    from kspec_guidance.synthesis.generator import Generator

    data.download(folder)
    images, entries = data.load(folder)
    pipe, guide = load_demo_pipeline(), SPARKE(0.0)
    pipe.set_progress_bar_config(disable=True)
    subjects = sorted({e.subject for e in entries})
    texts = Generator(pipe, guide, {}).prompt_features(subjects, 64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:number]
    art = torch.cat([encode_reference(pipe, images[k].float() / 127.5 - 1, 100) for k in order.split(500)])
    prompts = texts[[subjects.index(entries[i].subject) for i in order.tolist()]]
    moves = [(flip, dx, dy) for dx in (0, 1, -1) for dy in (0, 1, -1) for flip in (0, 1)]
    rows = [(art.flip(3) if flip else art).roll((dy, dx), (2, 3)).flatten(1) for flip, dx, dy in moves]
    return torch.cat(rows)[:number], prompts.repeat(len(moves), 1)[:number], pipe, texts, subjects


def direction(folder, largest=100_000):
    """Cosine between the memories' gradients and the exact one, at clean predictions half way through a run.

    On whole latents (576 numbers), and on their means over quarters of the image (36 numbers). Also the bandwidth from 128
    rows, over that from all rows.
    """
    x, t, pipe, texts, subjects = latents(largest, folder)
    queries, of = predictions(pipe, subjects, texts)
    largest = min(largest, len(x))
    found = directions(x, t, queries, of, (1000, 10_000, largest), "whole latents")
    bank = MemoryBank()
    bank.add(x, t)
    ratios = torch.tensor([bandwidth_ratio(bank, q, s) for q, s in zip(queries.split(1), of.split(1), strict=True)])
    found["bandwidth of 128 rows over that of all, median and deciles"] = ratios.quantile(
        torch.tensor([0.5, 0.1, 0.9])
    ).tolist()
    return found | directions(pooled(x), t, l2_normalize(pooled(queries)), of, (largest,), "pooled")


def bandwidth_ratio(bank, x, t):
    selection = bank.select(t, PromptWeights(GaussianKernel(0.35)), 1e-3)
    of_sample, of_all = ((d, w.expand_as(d)) for d, w in (selection.distances(x, k) for k in (128, 10**9)))
    return float(weighted_median(*of_sample) / weighted_median(*of_all))


def pooled(x):
    return torch.nn.functional.avg_pool2d(x.view(len(x), -1, 8, 8), 4).flatten(1)


def directions(x, t, queries, of, sizes, space):
    found, done, memories = {}, 0, {f"{c} means": CentroidMemory(c) for c in (64, 256, 1024)}
    for n in sizes:
        exact = MemoryBank()
        exact.add(x[:n], t[:n])
        for memory in memories.values():
            memory.add(x[done:n], t[done:n])
        done, median = n, median_bandwidth(l2_normalize(x[:n]))
        for label, bandwidth in (("half a median", 0.5 * median), ("one median", median), ("two medians", 2 * median)):
            kernel = GaussianKernel(bandwidth)
            expected = ConditionalRKE(kernel).gradient(queries, of, exact).rows
            row = {k: cosines(ConditionalRKE(kernel).gradient(queries, of, m).rows, expected) for k, m in memories.items()}
            for number in (512, 2048):
                phi = RandomFourierFeatures(kernel, x.shape[1], number)
                psi = RandomFourierFeatures(GaussianKernel(0.35), t.shape[1], 512)
                objective = ConditionalRKE(kernel, phi, prompt_feature_map=psi)
                objective._warned = True
                memory = objective.make_memory()
                memory.total = sums(memory, x[:n], t[:n])
                memory._count, memory.shape, memory.prompt_dim = n, (x.shape[1],), t.shape[1]
                row[f"{number} random features"] = cosines(objective.gradient(queries, of, memory).rows, expected)
            found[f"{space}, {n} entries, {label}"] = row
            print(f"  {space} {n} {label}: " + ", ".join(f"{k} {v[0]:.3f}" for k, v in row.items()), flush=True)
    return found


def sums(memory, x, t):
    """The sum that ``add`` would form row by row, by matrix products: seconds for 10^5 rows."""
    from kspec_guidance.memory.random_features import SCALE

    total = torch.zeros(memory.total.shape, dtype=torch.float64)
    for a, b in zip(x.split(4096), t.split(4096), strict=True):
        phi = memory.feature_map(l2_normalize(a.double()))
        psi = memory.prompt_feature_map(l2_normalize(b.double()))
        total += phi.T @ psi
    return (total * SCALE).round().to(torch.int64)


def cosines(got, expected):
    """Median and lowest decile over queries."""
    c = torch.cosine_similarity(got.float(), expected.float(), dim=1)
    return [float(c.median()), float(c.quantile(0.1))]


def predictions(pipe, subjects, texts, number=64):
    """Clean predictions of the embedded pipeline at the middle guided step of runs of 64 prompts, as unit rows."""
    from kspec_guidance import SPARKE

    rows_by_step, guide = [], SPARKE(1e-6)
    objective = guide.terms[0].objective
    gradient = objective.gradient

    def recorded(x, *args, **kwargs):
        rows_by_step.append(x.clone())
        return gradient(x, *args, **kwargs)

    objective.gradient = recorded
    names = subjects[:: max(1, len(subjects) // number)][:number]
    with torch.no_grad(), guide.attach(pipe):
        generators = [torch.Generator().manual_seed(k) for k in range(len(names))]
        pipe(names, num_inference_steps=10, output_type="latent", generator=generators)
    return rows_by_step[len(rows_by_step) // 2], texts[[subjects.index(n) for n in names]]


def whole(images=2000, plain_images=240):
    """Two guided processes of one thread against two plain ones, and the shares of time of guidance and the rest."""
    code = """
import sys, time, json, torch
torch.set_num_threads(1)
from kspec_guidance import load_demo_pipeline
pipe = load_demo_pipeline(); pipe.set_progress_bar_config(disable=True)
call = dict(num_inference_steps=20, guidance_scale=5.0, num_images_per_prompt=8)
pipe("heart", **call)
began = time.perf_counter()
for k in range(int(sys.argv[1]) // 8):
    pipe("heart", generator=[torch.Generator().manual_seed(8 * k + j) for j in range(8)], **call)
print(json.dumps((time.perf_counter() - began) / (int(sys.argv[1]) // 8 * 8)))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def plain():
        return subprocess.Popen([sys.executable, "-c", code, str(plain_images)], stdout=subprocess.PIPE, env=environment)

    alone = json.loads(plain().communicate()[0])
    pair = [plain(), plain()]
    both = [json.loads(p.communicate()[0]) for p in pair]
    with tempfile.TemporaryDirectory() as folder:
        number = images // 8
        Path(folder, "prompts.txt").write_text("\n".join(names(number)))
        line = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            str(Path(__file__)),
            "--worker",
            folder,
        ]
        subprocess.run(line, check=True, env=environment)
        results = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("result-*.json"))]
    rate = sum(r["made"] for r in results) / max(r["seconds"] for r in results)
    seconds = sum(r["seconds"] for r in results)
    return {
        "plain_one_process_images_per_s": 1 / alone,
        "plain_two_at_once_images_per_s": sum(1 / s for s in both),
        "synthesis_images_per_s": rate,
        "efficiency_to_twice_one": rate * alone / 2,
        "efficiency_to_two_at_once": rate / sum(1 / s for s in both),
        "guidance_share": sum(r["guidance_seconds"] for r in results) / seconds,
        "shares": {k: sum(r["parts"][k] for r in results) / seconds for k in results[0]["parts"]},
        "bytes_sent_per_image": sum(r["bytes_sent"] for r in results) / sum(r["made"] for r in results),
        "exchanges": results[0]["exchanges"],
    }


def names(number):
    from effect import PROMPTS

    detailed = [f"{p}, {a}" for a in ("woman", "man", "noto style", "twemoji style", "dark skin tone", "light skin tone",
            "woman, noto style", "man, noto style", "woman, twemoji style", "man, twemoji style", "medium skin tone",
            "medium dark skin tone", "medium light skin tone") for p in PROMPTS]  # fmt: skip
    return (PROMPTS + detailed)[:number]


def worker(folder):
    """One process of ``whole``: a synthesis with the time of its parts."""
    torch.set_num_threads(1)
    from kspec_guidance.synthesis import synthesize
    from kspec_guidance.synthesis.generator import Generator
    from kspec_guidance.synthesis.store import Store
    from kspec_guidance.synthesis.worker import Worker

    parts = {}

    def timed(owner, name, label):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                parts[label] = parts.get(label, 0.0) + time.perf_counter() - began

        setattr(owner, name, call)

    timed(Generator, "make", "pipeline and guidance")
    timed(Store, "commit", "writing images and records")
    timed(Worker, "exchange", "exchange, and waiting for it")
    timed(Worker, "_add_scores", "scores")
    timed(Worker, "apply", "memory and counting")
    texts = Path(folder, "prompts.txt").read_text().splitlines()
    done = synthesize(texts, Path(folder, "set"), images_per_prompt=8, batch_size=8, report=False)
    result = {k: getattr(done, k) for k in ("made", "seconds", "guidance_seconds", "bytes_sent", "exchanges")}
    Path(folder, f"result-{int(done.first)}.json").write_text(json.dumps({**result, "parts": parts}))


def scale(bandwidth=20e9):
    """A simulation to 10^8 samples: what each of W processes stores, reads at a step and sends, from prompts and shards.

    100 samples a prompt, rows of 16,384 float32, prompt features of 64 numbers around topics of about 50 prompts. Sharding
    and the choice of what is sent are the package's; rows are counted, not made.
    """
    from kspec_guidance.synthesis.sharding import relevant, shard

    prompt_weights, found, row = PromptWeights(GaussianKernel(0.35)), [], WIDTH * 4
    for total, world in ((10**5, 1), (10**6, 10), (10**7, 100), (10**8, 1000)):
        sampled = min(total // 100, 20_000)  # prompts that are sharded: a part of the shards, each of its full size
        times = total // 100 / sampled
        g = torch.Generator().manual_seed(total)
        topics = l2_normalize(torch.randn(max(1, sampled // 50), 64, generator=g))
        spread = 0.03 * torch.randn(sampled, 64, generator=g)
        texts = l2_normalize(topics[torch.randint(len(topics), (sampled,), generator=g)] + spread)
        shards = min(world, max(1, round(sampled * world / (total // 100))))  # each with its full number of prompts
        owner = torch.tensor(shard(texts, [100] * sampled, shards))
        similar = torch.stack([(prompt_weights(p[None], texts) > 1e-3).sum() for p in texts[:200]]).float().mean()
        sent = 0
        for rank in range(min(shards, 20)):
            sent += int(relevant(texts[owner == rank], texts[owner != rank], prompt_weights, 1e-3).sum())
        share = sent / max(1, int((owner < 20).sum()))
        rows = float(similar) * 100
        found.append({
            "samples": total, "processes": world, "rows_held_by_each": total / world * (1 + share),
            "gb_held_by_each": total / world * (1 + share) * row / 1e9, "rows_read_at_a_step": rows,
            "ms_of_a_step": 2 * rows * row / bandwidth * 1e3,
            "ms_of_a_step_if_all_rows_were_read": 2 * total * row / bandwidth * 1e3,
            "share_of_images_told": share, "mb_told_for_each_1000_images": share * 1000 * row / 1e6,
            "prompts_simulated": sampled, "shards_simulated": shards, "part_of_all": 1 / times,
        })  # fmt: skip
        print("  ", {k: round(v, 3) for k, v in found[-1].items()}, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["step", "prompts", "published", "compressed", "direction", "whole", "scale"]
    parser.add_argument("parts", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    parts = {"step": step, "prompts": prompts, "published": published, "compressed": compressed,
             "direction": lambda: direction(args.data), "whole": whole, "scale": scale}  # fmt: skip
    for name in args.parts:
        if name not in parts:
            parser.error(f"no part {name!r}; there are {', '.join(names)}")
        print(name, flush=True)
        results[name] = parts[name]()
        print(json.dumps(results[name], indent=1), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
