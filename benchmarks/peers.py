"""Scores of this package beside those of other packages and of the papers' code, on the same inputs.

    python -m benchmarks.peers           table in Markdown, as in docs/how-to/migration.md

Values of other code come from tests/data/peers/values.json, which benchmarks/peer_values.py writes from checkouts at the
commits it names. Packages that are installed (vendi-score, torchmetrics, prdc, torch-fidelity, rke-score) are run again.
"""

import contextlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel, l2_normalize

DATA = Path(__file__).parents[1] / "tests" / "data" / "peers"
KERNEL = GaussianKernel(1.5)
NEAREST = 5
Values = dict[str, float]


def vendi_score(x: Tensor, y: Tensor, t: Tensor) -> Values:
    """vendi-score: its exact and its dual route."""
    from vendi_score import vendi

    k, unit = KERNEL(x).numpy(), l2_normalize(x).numpy()
    return {
        "q=1": float(vendi.score_K(k)),
        "q=2": float(vendi.score_K(k, q=2)),
        "q=inf": float(vendi.score_K(k, q="inf")),
        "cosine": float(vendi.score_dual(unit, normalize=False)),
    }


def rke_score(x: Tensor, y: Tensor, t: Tensor) -> Values:
    """rke-score: all pairs. ``compute_rke_mc`` estimates the inverse of this mean from a million random pairs."""
    from rke_score import RKE

    (value,) = RKE(kernel_bandwidth=1.5).compute_rke_mc_frobenius_norm(x.numpy()).values()
    return {"1 / Frobenius": 1 / float(value)}


def prdc(x: Tensor, y: Tensor, t: Tensor) -> Values:
    """prdc, of clovaai."""
    from prdc import compute_prdc

    return {k: float(v) for k, v in compute_prdc(y.numpy(), x.numpy(), NEAREST).items()}


def torch_fidelity(x: Tensor, y: Tensor, t: Tensor) -> Values:
    """torch-fidelity, from features; its KID needs subsets as large as the smaller set here."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    fid = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    equal = x[: len(y)]
    kid = kid_features_to_metric(equal, y, kid_subset_size=len(y), kid_subsets=2, verbose=False)
    precision, recall = calculate_precision_recall_full(x, y, NEAREST)
    found = {"FID": fid["frechet_inception_distance"], "KID": kid["kernel_inception_distance_mean"]}
    return {**found, "precision": precision, "recall": recall}


def torchmetrics(x: Tensor, y: Tensor, t: Tensor) -> Values:
    """torchmetrics' FID and the estimate of its KID, from features."""
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    fid = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    return {"FID": float(fid), "KID": float(poly_mmd(x[: len(y)], y))}


INSTALLABLE: dict[str, Callable[[Tensor, Tensor, Tensor], Values]] = {
    "vendi-score": vendi_score,
    "rke-score": rke_score,
    "prdc": prdc,
    "torch-fidelity": torch_fidelity,
    "torchmetrics": torchmetrics,
}


def ours(z: dict[str, Tensor]) -> dict[str, Values]:
    """The same scores by this package."""
    x, y, t = z["x"], z["y"], z["prompt_features"]

    def feature_map(rows: Tensor) -> Tensor:
        product = rows @ z["frequencies"]
        return torch.cat([product.cos(), product.sin()], dim=1) / z["frequencies"].shape[1] ** 0.5

    def columns(rows: Tensor) -> Tensor:
        """Scaled as the published code of Scendi does it: by the norms of columns, not of rows."""
        return rows / rows.norm(dim=0, keepdim=True) * (len(rows) / rows.shape[1]) ** 0.5

    found = {
        "FKEA": {
            name: F.vendi_score(x, order=q, feature_map=feature_map)
            for name, q in {"VENDI-1": 1.0, "VENDI-1.5": 1.5, "RKE": 2.0, "VENDI-inf": math.inf}.items()
        },
        "KEN": {f"eta={eta:g}": F.ken_score(x, y, KERNEL, eta=eta) for eta in (1.0, 3.0)},
        "Scendi": {
            "images": F.scendi_score(x, t, (columns(x), columns(t))),
            "prompts": F.prompt_vendi_score(x, t, (columns(x), columns(t))),
        },
        "Conditional-Vendi": {
            "conditional": F.conditional_vendi_score(x, t, KERNEL, KERNEL),
            "information": F.information_vendi_score(x, t, KERNEL, KERNEL),
            "conditional, q=2": F.conditional_rke_score(x, t, KERNEL, KERNEL),
        },
        "truncated-vendi": {"t=10": F.vendi_score(x, KERNEL, truncation=10)},
        "vendi-score": {f"q={q:g}": F.vendi_score(x, KERNEL, q) for q in (1, 2, math.inf)} | {"cosine": F.vendi_score(x)},
        "rke-score": {"1 / Frobenius": F.rke_score(x, KERNEL)},
    }
    fidelity = vars(F.fidelity_scores(x, y, NEAREST))
    distances = {"FID": fidelity["frechet_distance"], "KID": F.kid(x[: len(y)], y, subsets=1, subset_size=len(y))[0]}
    found["prdc"] = {name: fidelity[name] for name in ("precision", "recall", "density", "coverage")}
    found["torch-fidelity"] = {**distances, "precision": fidelity["precision"], "recall": fidelity["recall"]}
    found["torchmetrics"] = distances
    return {peer: {name: float(value) for name, value in scores.items()} for peer, scores in found.items()}


@dataclass(frozen=True)
class Row:
    """A score of other code, and ours.

    Attributes:
        peer: name of the package or paper.
        score: name of the score.
        theirs, ours: values.
        tolerance: largest difference by rounding: that of the printed value, or of float64.
        source: repository and commit, or version of a package without one.
        live: whether the installed package was run, instead of reading the stored value.
    """

    peer: str
    score: str
    theirs: float
    ours: float
    tolerance: float
    source: str
    live: bool


def table(live: bool = True) -> list[Row]:
    """All rows; ``live`` runs the packages that are installed."""
    z, stored, rows = load_file(DATA / "inputs.safetensors"), json.loads((DATA / "values.json").read_text()), []
    own = ours(z)
    for peer, record in stored.items():
        values, ran = record["printed"], False
        if live and peer in INSTALLABLE:
            with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
                values, ran = INSTALLABLE[peer](z["x"], z["y"], z["prompt_features"]), True
        source = f"{record['repository']} {record['commit'][:7]}" if record["commit"] else f"version {record['version']}"
        for score, theirs in values.items():
            tolerance = max(record["rounding"], 1e-9 * abs(theirs))
            rows.append(Row(peer, score, theirs, own[peer][score], tolerance, source, ran))
    return rows


def markdown(rows: list[Row]) -> str:
    """The table of the documentation."""
    lines = ["| code | score | its value | ours | tolerance | source |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r.peer} | {r.score} | {r.theirs:.6g} | {r.ours:.6g} | {r.tolerance:.0e} | {r.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    found = table()
    print(markdown(found))
    print(f"\nrun again: {', '.join(sorted({r.peer for r in found if r.live})) or 'none'}")
    wrong = [r for r in found if abs(r.theirs - r.ours) > r.tolerance]
    print(f"{len(found) - len(wrong)} of {len(found)} agree", *(f"differs: {r}" for r in wrong), sep="\n")
