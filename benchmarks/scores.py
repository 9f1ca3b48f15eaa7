"""Speed, memory and accuracy of the scores, compared with a floor and with other packages in the same run.

    python benchmarks/scores.py memory stream exact rke accuracy convergence peers --peers FOLDER

FOLDER holds checkouts of the repositories FKEA, scendi-score, KEN and truncated-vendi; missing ones are skipped. Floors
and other packages are timed alternately with ours. Results go to benchmarks/results/scores.json.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import resource
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kspec_guidance import functional as F
from kspec_guidance.features import NystromFeatures, RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, median_bandwidth
from kspec_guidance.metrics import VendiScore

RESULTS = Path(__file__).parent / "results"


def clock(call: Callable, repeats: int = 3) -> tuple[float, object]:
    """Shortest time of a call in seconds, and its result."""
    best, value = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        value = call()
        best = min(best, time.perf_counter() - began)
    return best, value


def peak() -> float:
    """Largest resident size of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def clustered(n: int, d: int, clusters: int = 50, seed: int = 0) -> torch.Tensor:
    """Unit rows ``[n, d]`` around random centres."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, d, generator=g)
    x = centres[torch.randint(clusters, (n,), generator=g)] + 0.7 * torch.randn(n, d, generator=g)
    return x / x.norm(dim=1, keepdim=True)


def stream(args) -> dict:
    """One pass of random Fourier features, against bare products of the same chunks in the same float64."""
    d, features, chunk = 512, 4096, 4096
    rows = []
    for n in args.sizes:
        metric = VendiScore(GaussianKernel(1.0), num_features=features)
        total, ours, floor = torch.zeros(features, features, dtype=torch.float64), 0.0, 0.0
        before, g = peak(), torch.Generator().manual_seed(0)
        dummy = torch.randn(chunk, features, generator=g, dtype=torch.float64)
        for start in range(0, n, chunk):
            x = torch.randn(min(chunk, n - start), d, generator=g)
            x = x / x.norm(dim=1, keepdim=True)
            began = time.perf_counter()
            metric.update(x)
            middle = time.perf_counter()
            total.addmm_(dummy[: len(x)].mT, dummy[: len(x)])
            ours, floor = ours + middle - began, floor + time.perf_counter() - middle
        eigen, _ = clock(metric.compute, 1)
        rows.append(
            {"n": n, "ours_s": ours, "floor_s": floor, "ratio": ours / floor, "eigenproblem_s": eigen, "peak_gb": peak()}
        )
        print("stream", {k: round(v, 3) for k, v in rows[-1].items()}, f"(before {before:.2f} GB)", flush=True)
    return {"d": d, "features": features, "chunk": chunk, "rows": rows}


def memory(args) -> dict:
    """Peak memory of the stream, without the floor's buffers and before the eigenproblem."""
    before, metric = peak(), VendiScore(GaussianKernel(1.0), num_features=4096)
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        metric.update(torch.randn(2048, 512, generator=g))
    result = {"features": 4096, "chunk": 2048, "after_import_gb": before, "peak_gb": peak()}
    print("memory", result, flush=True)
    return result


def exact(args) -> dict:
    """Exact Vendi against the eigenvalues of a given matrix."""
    n = args.exact
    x = clustered(n, 64)
    kernel = GaussianKernel(1.0)
    matrix = kernel(x.double()) / n
    floor, _ = clock(lambda: torch.linalg.eigvalsh(matrix), 1)
    ours, value = clock(lambda: F.vendi_score(x, kernel), 1)
    again, _ = clock(lambda: torch.linalg.eigvalsh(matrix), 1)
    floor = min(floor, again)
    result = {"n": n, "ours_s": ours, "eigvalsh_s": floor, "ratio": ours / floor, "vendi": float(value)}
    print("exact", result, flush=True)
    return result


def rke(args) -> dict:
    """RKE of many samples without eigenvalues, in blocks."""
    n, d = args.rke, 512
    x = clustered(n, d)
    before = peak()
    seconds, value = clock(lambda: F.rke_score(x, GaussianKernel(1.0)), 1)
    result = {"n": n, "d": d, "seconds": seconds, "rke": float(value), "peak_gb": peak(), "peak_before_gb": before}
    print("rke", result, flush=True)
    return result


def accuracy(args) -> dict:
    """Error of the random-feature route against the exact score, as the number of features grows."""
    x = clustered(1000, 32)
    kernel = GaussianKernel(median_bandwidth(x))
    rows = []
    for order in (1.0, 2.0):
        truth = float(F.vendi_score(x, kernel, order))
        for count in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
            maps = [RandomFourierFeatures(kernel, 32, count, seed=s) for s in range(10)]
            errors = [float(F.vendi_score(x, order=order, feature_map=m)) / truth - 1 for m in maps]
            rms = float(np.sqrt(np.mean(np.square(errors))))
            rows.append({"order": order, "features": count, "relative_rms_error": rms, "bias": float(np.mean(errors))})
            print("accuracy", rows[-1], f"exact {truth:.3f}", flush=True)
    return {"rows": rows}


def convergence(args) -> dict:
    """Convergence of the truncated score: relative distance to its value at 4,096 samples."""
    x = clustered(4096, 64)
    kernel = GaussianKernel(0.7 * median_bandwidth(x))
    truth = {t: float(F.vendi_score(x, kernel, truncation=t)) for t in (8, 32, 128)}
    truth["none"] = float(F.vendi_score(x, kernel))
    rows = []
    for n in (64, 128, 256, 512, 1024, 2048):
        parts = [x[torch.randperm(4096, generator=torch.Generator().manual_seed(s))[:n]] for s in range(3)]
        row = {"n": n}
        for t in (8, 32, 128):
            if n >= t:
                row[f"t={t}"] = float(
                    np.mean([float(F.vendi_score(p, kernel, truncation=t)) for p in parts]) / truth[t] - 1
                )
        row["t=32, Nystrom"] = float(
            np.mean([
                float(F.vendi_score(p, truncation=32, feature_map=NystromFeatures(kernel, p[:32]))) for p in parts
            ]) / truth[32] - 1
        )  # fmt: skip
        row["untruncated"] = float(np.mean([float(F.vendi_score(p, kernel)) for p in parts]) / truth["none"] - 1)
        rows.append(row)
        print("convergence", {k: round(v, 4) for k, v in row.items()}, flush=True)
    return {"value_at_4096": {str(k): v for k, v in truth.items()}, "rows": rows}


def load(path: Path, name: str) -> types.ModuleType | None:
    """A module of another package, executed from its file; None without it."""
    if not path.is_file():
        print(f"peers: {name} skipped, no {path.name} in the peers' folder")
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(io.StringIO()):
        spec.loader.exec_module(module)
    return module


class _Lines(logging.Handler):
    """Keeps log messages."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def peers(args) -> dict:
    """Values and times of other packages with the same features and kernels."""
    rows = []

    def compare(name: str, ours: Callable, theirs: Callable, note: str = "") -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ours()
            b, theirs_value = clock(theirs, 2)
            a, our_value = clock(ours, 2)
        row = {
            "score": name,
            "ours": float(our_value),
            "theirs": float(theirs_value),
            "ours_s": a,
            "theirs_s": b,
            "times": b / a,
        }
        rows.append(row | {"note": note})
        print("peers", rows[-1], flush=True)

    x = clustered(2000, 64)
    k = GaussianKernel(1.0)
    try:
        from vendi_score import vendi

        matrix = lambda: k(x.double()).numpy()  # noqa: E731
        note = "their matrix is made by our kernel; its own loop over pairs is below"
        compare(
            "Vendi q=1, n=2,000: vendi-score score_K", lambda: F.vendi_score(x, k), lambda: vendi.score_K(matrix()), note
        )
        compare(
            "Vendi q=2: vendi-score score_K", lambda: F.vendi_score(x, k, 2.0), lambda: vendi.score_K(matrix(), q=2), note
        )
        compare(
            "Vendi cosine, 64 dim.: vendi-score score_dual",
            lambda: F.vendi_score(x),
            lambda: vendi.score_dual(x.double().numpy()),
        )
        compare(
            "Vendi q=2: vendi-score score_X",
            lambda: F.vendi_score(x, order=2.0),
            lambda: vendi.score_X(x.numpy(), q=2),
            "theirs ignores q",
        )
        few = x[:200].numpy()
        compare(
            "Vendi of 200 by a function: vendi-score score",
            lambda: F.vendi_score(x[:200]),
            lambda: vendi.score(few, lambda a, b: float(a @ b)),
        )
    except ImportError:
        print("peers: vendi-score is not installed")
    try:
        from rke_score import RKE

        few = x[:300].numpy()
        one = RKE(kernel_bandwidth=[1.0])
        compare(
            "RKE, n=300: rke-score, all pairs",
            lambda: F.rke_score(x[:300], k),
            lambda: 1 / _first(one.compute_rke_mc_frobenius_norm(few)),
        )
    except ImportError:
        print("peers: rke-score is not installed")
    settings = types.SimpleNamespace(sigma=1.0, batchsize=64, rff_dim=256, normalise=True, kernel="gaussian", eta=1.0)
    settings.logger = logging.getLogger("peers")
    settings.logger.setLevel(logging.INFO)
    settings.logger.propagate = False
    lines = _Lines()
    settings.logger.addHandler(lines)
    if fkea := load(args.peers / "FKEA/FKEA/metric/algorithm_utils.py", "fkea"):
        omegas = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))

        def theirs() -> float:
            cov, _ = fkea.cov_rff2(x, 256, 1.0, 64, omegas)
            return next(iter(fkea.calculate_stats(torch.linalg.eigh(cov)[0], 1).values()))

        def rows_of(z: torch.Tensor) -> torch.Tensor:
            return torch.cat([(z @ omegas).cos(), (z @ omegas).sin()], 1) / 16

        compare("FKEA, 512 features, the same frequencies", lambda: F.vendi_score(x, feature_map=rows_of), theirs)
    if truncated := load(args.peers / "truncated-vendi/truncated_vendi.py", "truncated"):
        few = x[:1000]
        compare("truncated Vendi t=100, n=1,000", lambda: F.vendi_score(few, k, truncation=100),
               lambda: truncated.TruncatedVendi(few.double()).compute_score(1, truncation=100, sigma=1.0))  # fmt: skip
    if ken := load(args.peers / "KEN/KEN/metric/algorithm_utils.py", "ken"):
        a, b = x[:500].double(), clustered(500, 64, seed=1).double()

        def by(route: Callable, dtype: torch.dtype = torch.float64) -> float:
            lines.lines.clear()
            route(a.to(dtype), b.to(dtype), settings)
            return float(next(line for line in lines.lines if line.startswith("KEN")).split()[-1])

        compare(
            "KEN, 500 against 500, eigendecomposition",
            lambda: F.ken_score(a, b, k),
            lambda: by(ken.KEN_by_eigendecomposition),
        )
        compare(
            "KEN, Cholesky",
            lambda: F.ken_score(a, b, k),
            lambda: by(ken.KEN_by_cholesky_decomposition, torch.float32),
            "theirs runs in float32 only, and adds 1e-7 to the diagonal",
        )
    if scendi := load(args.peers / "scendi-score/scendi/metric/algorithm_utils.py", "scendi"):
        t = clustered(2000, 64, seed=2)
        settings.kernel = "cosine"
        part = lambda i: scendi.rff_sce_from_feats(t, x, settings)[i]  # noqa: E731
        columns = lambda z: z / z.norm(dim=0, keepdim=True) / 64**0.5 * len(z) ** 0.5  # noqa: E731
        compare(
            "Scendi, cosine",
            lambda: F.scendi_score(x, t),
            lambda: part(0),
            "theirs scales columns of the features, not rows",
        )
        compare(
            "Scendi on features scaled as theirs",
            lambda: F.scendi_score(x, t, (columns(x.double()), columns(t.double()))),
            lambda: part(0),
        )
    return {"rows": rows}


def draw(found: dict, path: Path) -> None:
    """Plot the time of the stream against its length, and the error of random features against their number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if "stream" in found:
        rows = found["stream"]["rows"]
        n = [r["n"] for r in rows]
        left.loglog(n, [r["ours_s"] for r in rows], "o-", color="#2f6fb3", label="streaming Vendi, 4,096 random features")
        left.loglog(
            n, [r["floor_s"] for r in rows], "s--", color="#667085", label="bare float64 products of the same chunks"
        )
        left.set(title="One pass over a stream", xlabel="samples", ylabel="seconds")
        left.legend(frameon=False, fontsize=8)
    if "accuracy" in found:
        for order, name, colour in ((1.0, "Vendi, q = 1", "#2f6fb3"), (2.0, "RKE, q = 2", "#c4572e")):
            rows = [r for r in found["accuracy"]["rows"] if r["order"] == order]
            x, y = [r["features"] for r in rows], [100 * r["relative_rms_error"] for r in rows]
            right.loglog(x, y, "o-", color=colour, label=name)
            right.loglog(x, [y[0] * (x[0] / v) ** 0.5 for v in x], ":", color=colour, linewidth=1)
        right.set(title="Error of random features (dotted: slope -1/2)", xlabel="features D", ylabel="rms error in %")
        right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _first(value: object) -> float:
    """The score, where rke-score returns a dictionary by bandwidth."""
    return float(next(iter(value.values()))) if isinstance(value, dict) else float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {f.__name__: f for f in (memory, stream, exact, rke, accuracy, convergence, peers)}
    parser.add_argument("what", nargs="*", choices=[*parts, []], default=[], help="all by default")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--exact", type=int, default=10_000)
    parser.add_argument("--rke", type=int, default=50_000)
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--out", type=Path, default=RESULTS / "scores.json")
    parser.add_argument("--plot", type=Path, help="plot of stream times and feature errors, from all results so far")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.what or parts:
        found[name] = parts[name](args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot is not None:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
