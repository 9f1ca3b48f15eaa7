"""Times of the scores beside those of other packages and of the papers' code, on the same inputs, with the values compared.

    OMP_NUM_THREADS=1 python -m benchmarks.peer_times --peers FOLDER            all rows
    OMP_NUM_THREADS=1 python -m benchmarks.peer_times kid ken --peers FOLDER    some rows; the others stay as they are

FOLDER holds checkouts of torch-fidelity, generative-evaluation-prdc, scendi-score and KEN; vendi-score is the installed
package. Missing ones are skipped. Every opponent has the route and the precision that are fastest for it; where its code
works in loops, its algebra is written again without them. Both run in turn, on one thread; times are of the processor.
``ratio`` is the median of its time divided by ours, with the range over the repeats; ``difference`` is that of the
values, relative. Results go to benchmarks/results/peer_times.json.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.interleaved import machine, markdown, one_row, time_calls
from benchmarks.scores import clustered
from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel, PolynomialKernel
from kspec_guidance.kernels.spectrum import accumulate_gram, cross_products, own_products, symmetric_eigenvalues
from kspec_guidance.metrics import VendiScore

RESULTS = Path(__file__).parent / "results" / "peer_times.json"
Row = dict[str, Any]


def load(path: Path) -> types.ModuleType:
    """A module of another package, executed from its file.

    Raises:
        FileNotFoundError: without the file.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version(folder: Path) -> str:
    """Name of a checkout, and its commit."""
    git = ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"]
    return f"{folder.name} {subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()}"


def compare(
    work: str,
    peer: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int = 7,
    warmup: int = 1,
    difference: float | None = None,
) -> Row:
    """One row. The difference is that of the returned numbers, unless given; NaN for works that return none."""

    def quiet() -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return theirs()

    found = time_calls({"ours": ours, "theirs": quiet}, to="ours", repeats=repeats, warmup=warmup, cpu=True)
    if difference is None:
        a, b = (np.asarray(found[k].value, dtype=float) for k in ("ours", "theirs"))
        difference = float(np.abs(a - b).max() / np.abs(b).max())
    return one_row(work, peer, found["ours"], found["theirs"], None if math.isnan(difference) else difference)


def kid(peers: Path) -> list[Row]:
    """KID by subsets against torch-fidelity, which computes in float32. The values are those of its own subsets."""
    sys.path.insert(0, str(peers / "torch-fidelity"))
    from torch_fidelity.metric_kid import kid_features_to_metric

    settings = {"kid_subsets": 20, "kid_subset_size": 1000, "verbose": False, "rng_seed": 0}
    rows = []
    for n in (2_000, 5_000, 20_000):
        x, y = clustered(n, 512, seed=1) * 20, clustered(n, 512, seed=2) * 20
        theirs = kid_features_to_metric(x, y, **settings)["kernel_inception_distance_mean"]
        rng, draws = np.random.RandomState(0), []
        for _ in range(20):
            i, j = (torch.from_numpy(rng.choice(n, 1000, replace=False)) for _ in range(2))
            draws.append(F.mmd(x[i], y[j], PolynomialKernel()))
        rows.append(compare(
            f"KID, 20 subsets of 1,000 of {n:,}, d = 512", f"{version(peers / 'torch-fidelity')}, float32",
            lambda x=x, y=y: F.kid(x, y, subsets=20, subset_size=1000)[0],
            lambda x=x, y=y: kid_features_to_metric(x, y, **settings)["kernel_inception_distance_mean"],
            repeats=3,
            difference=abs(theirs / float(torch.stack(draws).mean()) - 1),
        ))  # fmt: skip
    return rows


def scendi_as_published(x: Tensor, t: Tensor) -> float:
    """The algebra of scendi-score for feature rows, in the dtype of the rows, without its loops and repetitions."""
    n = len(x)
    c_tt, c_tx, c_xx = t.mT @ t / n, t.mT @ x / n, x.mT @ x / n
    l = torch.linalg.eigvalsh(c_xx - c_tx.mT @ torch.linalg.pinv(c_tt, hermitian=True) @ c_tx).clamp_min(1e-10)
    return float((-(l * (l / l.sum()).log()).sum()).exp())


def scendi(peers: Path) -> list[Row]:
    """Scendi with random Fourier features of images and of prompts."""
    x, t = clustered(2000, 64), clustered(2000, 64, seed=2)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    maps = lambda z: torch.cat([(z @ w).cos(), (z @ w).sin()], 1) / 16  # noqa: E731
    rows = []
    for dtype in (torch.float32, torch.float64):
        rows.append(compare(
            "Scendi, 512 random features, 2,000 rows",
            f"{version(peers / 'scendi-score')}, without loops, {str(dtype)[6:]}",
            lambda: F.scendi_score(x, t, maps),
            lambda dtype=dtype: scendi_as_published(maps(x).to(dtype), maps(t).to(dtype)),
        ))  # fmt: skip
    a, b = (maps(z).double() for z in (x, t))

    def least() -> None:
        c = own_products(a)
        own_products(b)
        cross_products(a, b)
        symmetric_eigenvalues(c)

    name = "floor: float64 products and eigenvalues of given features"
    return [*rows, compare(rows[0]["work"], name, lambda: F.scendi_score(x, t, maps), least, difference=math.nan)]


def vendi(peers: Path) -> list[Row]:
    """Vendi of the cosine kernel by the dual route of vendi-score, in the precision of its input."""
    from vendi_score import vendi as package

    x, rows = clustered(5000, 256), []
    for z in (x, x.double()):
        rows.append(compare(
            "cosine Vendi, 5,000 x 256",
            f"vendi-score {importlib.metadata.version('vendi-score')}, score_dual, {str(z.dtype)[6:]}",
            lambda: F.vendi_score(x), lambda z=z: package.score_dual(z.numpy()), repeats=15,
        ))  # fmt: skip
    u = x.double() / x.double().norm(dim=1, keepdim=True)
    return [*rows, compare(
        "cosine Vendi, 5,000 x 256", "floor: float64 product of given unit rows, eigenvalues",
        lambda: F.vendi_score(x), lambda: _exp_entropy(symmetric_eigenvalues(own_products(u) / 5000)), repeats=15,
    )]  # fmt: skip


def exact(peers: Path) -> list[Row]:
    """Vendi of order 1 of a matrix against its eigenvalues alone."""
    x, kernel = clustered(2000, 64), GaussianKernel(1.0)
    matrix = kernel(x.double()) / 2000
    return [compare(
        "Vendi q = 1, 2,000 rows, Gaussian kernel", "floor: torch.linalg.eigvalsh of the given matrix",
        lambda: F.vendi_score(x, kernel), lambda: _exp_entropy(torch.linalg.eigvalsh(matrix)), repeats=3,
    )]  # fmt: skip


def _exp_entropy(l: Tensor) -> float:
    return float(torch.special.entr(l.clamp_min(0)).sum().exp())


def truncated(peers: Path) -> list[Row]:
    """Vendi of the 32 largest eigenvalues, against all eigenvalues."""
    kernel, rows = GaussianKernel(1.0), []
    for n, repeats in ((3_000, 3), (10_000, 1)):
        x = clustered(n, 64)
        matrix = kernel(x.double()) / n

        def of_all(matrix: Tensor = matrix) -> float:
            top = torch.linalg.eigvalsh(matrix)[-32:]
            return _exp_entropy(top + (1 - top.sum()) / 32)

        rows.append(compare(
            f"truncated Vendi, t = 32 of {n:,}", "floor: torch.linalg.eigvalsh of the given matrix",
            lambda x=x: F.vendi_score(x, kernel, truncation=32), of_all, repeats=repeats, warmup=repeats // 3,
        ))  # fmt: skip
    return rows


def prdc(peers: Path) -> list[Row]:
    """Precision, recall, density and coverage of sets with a hundred rows in common."""
    theirs = load(peers / "generative-evaluation-prdc/prdc/prdc.py").compute_prdc
    names, rows = ("precision", "recall", "density", "coverage"), []
    for n, d in ((2_000, 64), (4_000, 512)):
        x, y = clustered(2 * n, d).split(n)
        x = torch.cat([y[:100], x[100:]])

        def ours(x: Tensor = x, y: Tensor = y) -> list[float]:
            found = F.neighbour_scores(x, y)
            return [getattr(found, name) for name in names]

        def published(x: Tensor = x, y: Tensor = y) -> list[float]:
            found = theirs(y.numpy(), x.numpy(), 5)
            return [found[name] for name in names]

        work, peer = f"precision, recall, density, coverage, 2 x {n:,} x {d}", version(peers / "generative-evaluation-prdc")
        rows.append(compare(work, f"{peer}, float32", ours, published, repeats=3))
    return rows


def ken(peers: Path) -> list[Row]:
    """KEN by the Cholesky factor in float32, as published, and without its loop over differences."""
    code = load(peers / "KEN/KEN/metric/algorithm_utils.py")
    a, b, kernel = clustered(500, 64), clustered(500, 64, seed=1), GaussianKernel(1.0)
    lines: list[str] = []
    log = types.SimpleNamespace(info=lines.append)
    settings = types.SimpleNamespace(sigma=1.0, batchsize=64, eta=1.0, logger=log)

    def published(dtype: torch.dtype = torch.float32) -> float:
        code.KEN_by_cholesky_decomposition(a.to(dtype), b.to(dtype), settings)
        return float(lines[-1].split()[-1])

    def without_loops() -> float:
        both = torch.cat([a, b])
        k = torch.exp(torch.cdist(both, both).square() / -2) / 500 + 1e-7 * torch.eye(1000)
        u = torch.linalg.cholesky(k, upper=True)
        sign = torch.cat([torch.ones(500), -torch.ones(500)])
        l = torch.linalg.eigvalsh(u * sign @ u.mT).clamp_min(0)
        return float(l.sum() * torch.special.entr(l / l.sum()).sum())

    ours = lambda: F.ken_score(a, b, kernel)  # noqa: E731
    matrix = kernel(torch.cat([a, b]).double())
    least = lambda: symmetric_eigenvalues(matrix)  # noqa: E731
    return [
        compare("KEN, 500 against 500", f"{version(peers / 'KEN')}, Cholesky, float32", ours, published),
        compare("KEN, 500 against 500", f"{version(peers / 'KEN')}, Cholesky, float32, without loops", ours, without_loops),
        compare("KEN, 500 against 500", "floor: float64 eigenvalues of a given matrix", ours, least, difference=math.nan),
    ]


def stream(peers: Path) -> list[Row]:
    """Streaming Vendi: updates against the bare float64 product of features that are there already."""
    d, features, chunk = 512, 4096, 2048
    metric, x = VendiScore(GaussianKernel(1.0), num_features=features), clustered(chunk, d)
    metric.update(x)
    phi, total = metric.map(x).double(), torch.zeros(features, features, dtype=torch.float64)
    return [compare(
        "streaming Vendi, D = 4,096: update by 2,048 rows", "floor: float64 product of given features",
        lambda: metric.update(x), lambda: total.addmm_(phi.mT, phi), repeats=3, difference=math.nan,
    ), compare(
        "streaming Vendi, D = 4,096: update by 2,048 rows", "floor: half of that product, of given features",
        lambda: metric.update(x), lambda: accumulate_gram(total, phi), repeats=3, difference=math.nan,
    )]  # fmt: skip


PARTS = {f.__name__: f for f in (kid, scendi, vendi, exact, truncated, prdc, ken, stream)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*PARTS, []], default=[], help="all by default")
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.disable()
    stored = json.loads(args.out.read_text()) if args.out.is_file() else {"rows": []}
    parts: dict[str, list[Row]] = {}
    for row in stored["rows"]:
        parts.setdefault(row["part"], []).append(row)
    for name in args.what or PARTS:
        try:
            parts[name] = [row | {"part": name} for row in PARTS[name](args.peers)]
        except (FileNotFoundError, ImportError) as error:
            print(f"{name} skipped: {error}")
            continue
        print(markdown(parts[name]), flush=True)
    rows = [row for name in PARTS for row in parts.get(name, [])]
    args.out.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")
    print(f"\n{markdown(rows)}\n\n{machine()}")


if __name__ == "__main__":
    main()
