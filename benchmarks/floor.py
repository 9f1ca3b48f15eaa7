"""Operations beside the floor of the machine: the bytes that they must read, or the products that they must form.

    OMP_NUM_THREADS=1 python -m benchmarks.floor               all rows; results in benchmarks/results/floor.json
    OMP_NUM_THREADS=1 python -m benchmarks.floor pixels means  some rows; the others stay as they are

A floor is measured, in turn with the operation: one read is a product of the rows with a vector, and products are products
of 1024 x 1024 matrices with as many operations. Both run on one thread; times are of the processor. ``ratio`` is the median
of the floor's time divided by ours, with the range over the repeats: 1 is at the floor.
"""

import argparse
import ctypes
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.interleaved import machine, markdown, one_row, time_calls
from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance import functional as F
from kspec_guidance.guidance.spaces import Pixels, Pooled
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.loop.context import CallContext
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.objectives import RKE, ConditionalRKE

RESULTS = Path(__file__).parent / "results" / "floor.json"
WIDTH = 16_384  # numbers of a latent of SD 1.5
# Four rows at once: their products with x, their weights, and their weighted sum while they are in the cache of the core.
LOOP = r"""
#include <math.h>
void weighted_sum(const float *rows, const float *x, float *out, long n, long d) {
  for (long j = 0; j + 3 < n; j += 4) {
    const float *a = rows + j * d, *b = a + d, *c = b + d, *e = c + d;
    float p = 0, q = 0, r = 0, s = 0;
    for (long k = 0; k < d; k++) { p += x[k] * a[k]; q += x[k] * b[k]; r += x[k] * c[k]; s += x[k] * e[k]; }
    p = expf(p - 4); q = expf(q - 4); r = expf(r - 4); s = expf(s - 4);
    for (long k = 0; k < d; k++) out[k] += p * a[k] + q * b[k] + r * c[k] + s * e[k];
  }
}
"""
Row = dict[str, Any]


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def compare(work: str, ours: Callable[[], object], floor: str, its: Callable[[], object], repeats: int = 9) -> Row:
    timed = time_calls({"ours": ours, "floor": its}, to="ours", repeats=repeats, cpu=True)
    row = one_row(work, f"floor: {floor}", timed["ours"], timed["floor"])
    print(markdown([row], header=False), flush=True)
    return row


def products(flops: float) -> Callable[[], object]:
    """Products of float32 matrices of 1024 columns, with this number of operations."""
    a, b = noise(max(1, round(flops / (2 * 1024**2))), 1024), noise(1024, 1024, seed=1)
    return lambda: a @ b


def two_products(rows: Tensor, x: Tensor) -> Callable[[], object]:
    """A gradient's two products with each row, by blocks of 4 MB: the second reads the block from the processor's cache."""
    size = (4 << 20) // (4 * rows.shape[1])

    def call() -> None:
        total = torch.zeros_like(x)
        for block in rows.split(size):
            total.addmm_(x @ block.mT, block)

    return call


def loop_in_c(rows: Tensor, x: Tensor) -> Callable[[], object] | None:
    """A gradient's two products in one loop that reads each row once from memory; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "loop.c"), Path(folder, "loop.so")
        source.write_text(LOOP)
        options = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, str(source), "-o", str(library), "-lm"], check=True)
        function = ctypes.CDLL(str(library)).weighted_sum
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2

    def call() -> Tensor:
        total = torch.zeros(rows.shape[1])
        function(rows.data_ptr(), x.data_ptr(), total.data_ptr(), *rows.shape)
        return total

    torch.testing.assert_close(call(), (torch.exp(x @ rows.mT - 4) @ rows)[0], rtol=1e-3, atol=1e-4)
    return call


def later_gradient(objective: RKE, x: Tensor, prompts: Tensor | None, memory: Any) -> Callable[[], object]:
    pairs = objective.pairs(x, prompts, memory)
    return lambda: objective.gradient(x, prompts, memory, pairs=pairs)


def memory_rows() -> list[Row]:
    """A gradient over rows of a memory, of which each must be read once."""
    rows, bank, half, rows_of = [], MemoryBank(), MemoryBank(dtype=torch.bfloat16), 1000
    for k in range(10):
        part = l2_normalize(noise(rows_of, WIDTH, seed=k))
        bank.add(part)
        half.add(part)
    matrix, x = bank.x.clone(), l2_normalize(noise(1, WIDTH, seed=99))
    one = lambda: matrix @ x[0]  # noqa: E731
    size = f"{matrix.numel() * 4e-6:.0f} MB"
    rows.append(
        compare(
            "gradient, memory of 10,000 rows, batch 1", later_gradient(RKE(), x, None, bank), f"one read of {size}", one
        )
    )
    name, twice = "gradient, memory of 10,000 rows, batch 1", "two products of each 4 MB"
    rows.append(compare(name, later_gradient(RKE(), x, None, bank), twice, two_products(matrix, x)))
    if (loop := loop_in_c(matrix, x)) is not None:
        rows.append(compare(name, later_gradient(RKE(), x, None, bank), "a loop in C", loop))
    name = "gradient, the same rows in bfloat16, batch 1"
    rows.append(compare(name, later_gradient(RKE(), x, None, half), f"one read of {size}", one))
    x8 = l2_normalize(noise(8, WIDTH, seed=98))
    columns = x8.T.contiguous()
    name = "gradient, memory of 10,000 rows, batch 8"
    rows.append(compare(name, later_gradient(RKE(), x8, None, bank), f"products with {size}", lambda: matrix @ columns))
    del bank, half
    texts, bank = l2_normalize(noise(10, 64, seed=3)), MemoryBank()
    for k in range(10):
        bank.add(matrix[500 * k : 500 * k + 500], texts[k : k + 1].expand(500, -1))
    relevant = matrix[2000:2500].clone()
    gradient = later_gradient(ConditionalRKE(), x, texts[4:5], bank)
    name = "gradient, 500 relevant of 5,000 rows, batch 1"
    rows.append(compare(name, gradient, "one read of 33 MB", lambda: relevant @ x[0], 25))
    rows.append(compare(name, gradient, twice, two_products(relevant, x), 25))
    part, into = matrix[:500], torch.empty(500, WIDTH)

    def add() -> None:
        fresh = MemoryBank()
        fresh.add(part)

    rows.append(compare("500 rows added to an empty memory", add, "one copy of 33 MB", lambda: into.copy_(part)))
    return rows


def guided(name: str, shape: tuple[int, ...], steps: int) -> Row:
    """Guided steps of a scheduler with an empty memory."""
    scheduler, x0, outputs = DDIMScheduler(), noise(*shape), [noise(*shape, seed=k + 1) for k in range(2)]

    def loop(each: Callable[[Tensor], object] | None = None) -> None:
        scheduler.set_timesteps(20)
        x = x0
        for k, t in enumerate(scheduler.timesteps[:steps]):
            x = scheduler.step(outputs[k % 2], t, x, return_dict=False)[0]
            if each is not None:
                each(x.flatten(1))

    def ours() -> None:
        with SPARKE().attach(scheduler):
            loop()

    def least(x: Tensor) -> None:
        x + (x @ x.mT) @ x

    return compare(
        f"{steps} guided steps, {name}, empty memory",
        ours,
        "plain steps, distances, gradient, one sum",
        lambda: loop(least),
    )


def steps() -> list[Row]:
    return [
        guided("8 x 4 x 64 x 64", (8, 4, 64, 64), 12),
        guided("8 x 4 x 4 x 4", (8, 4, 4, 4), 12),  # nothing but Python and small operations
        guided("4 clips of Wan, 480p", (4, 16, 21, 60, 104), 2),
    ]


def projection() -> list[Row]:
    """Features of a random projection of SDXL latents, and a gradient in them: each reads the matrix once."""
    rows, matrix, vector = [], noise(128, 65_536), noise(65_536, seed=1)
    for n in (1, 4):
        x, call, space = noise(n, 4, 128, 128), CallContext(), Pooled(project=128)

        def ours(x: Tensor = x, call: CallContext = call, space: Pooled = space) -> None:
            found, pullback = space.features(x, call)
            pullback(found)

        def floor() -> None:
            matrix @ vector
            matrix @ vector

        rows.append(compare(f"Pooled(project=128), SDXL size, batch {n}", ours, "two reads of 34 MB", floor, 15))
    return rows


def pixels() -> list[Row]:
    """Decoded images and a gradient in them: the decoder's products once forward and once backward."""
    pipe, x = load_demo_pipeline(), noise(16, 9, 8, 8)
    call, space = CallContext(pipe), Pixels(chunk=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.vae.decode(x)

    def ours() -> None:
        found, pullback = space.features(x, call)
        pullback(found)

    flops = 2 * counter.get_total_flops()
    return [
        compare("Pixels(chunk=16), 16 images of 64 x 64", ours, f"products, {flops / 1e9:.0f} GFLOP", products(flops), 7)
    ]


def means(entries: int = 1_000_000) -> list[Row]:
    """Weighted means: samples added to a full memory, and a gradient after few and after many samples."""
    rows, x, memories = [], l2_normalize(noise(8, 64, seed=99)), {}
    texts = l2_normalize(noise(50, 16, seed=4))
    for goal in (1000, entries):
        memories[goal] = memory = CentroidMemory(256)
        for k in range(goal // 1000):
            memory.add(l2_normalize(noise(1000, 64, seed=k)), texts[torch.arange(1000) % 50])
    more, of = l2_normalize(noise(1000, 64, seed=7)), texts[torch.arange(1000) % 50]
    flops = 2 * 1000 * (256 + 128) * (64 + 16)
    rows.append(
        compare(
            "1,000 samples added to 256 weighted means",
            lambda: memories[1000].add(more, of),
            "their products",
            products(flops),
            15,
        )
    )
    few, many = (later_gradient(RKE(GaussianKernel(1.0)), x, None, m) for m in memories.values())
    rows.append(compare(f"gradient, 256 weighted means of {entries:,} samples", many, "means of 1,000 samples", few, 101))
    return rows


def scores() -> list[Row]:
    """Scores, of which eigenvalues or products are the whole work."""
    x = noise(4000, 512)
    y = x[:1000].double()
    kernel = GaussianKernel(30.0)
    matrix = kernel(y)
    return [
        compare("Gaussian kernel, 4,000 x 512, float32", lambda: kernel(x), "products", products(2 * 4000**2 * 512), 5),
        compare(
            "exact Vendi score, n = 1,000",
            lambda: F.vendi_score(y, kernel),
            "eigvalsh",
            lambda: torch.linalg.eigvalsh(matrix),
            5,
        ),
    ]


PARTS: dict[str, Callable[[], list[Row]]] = {
    "memory": memory_rows, "steps": steps, "projection": projection, "pixels": pixels, "means": means, "scores": scores,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all by default")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for name in chosen:
        fresh = PARTS[name]()
        works = {row["work"] for row in fresh}
        known = [row for row in known if row["work"] not in works] + fresh
        RESULTS.write_text(json.dumps({"rows": known, "machine": machine()}, indent=1) + "\n")
    print(markdown(known))


if __name__ == "__main__":
    main()
