"""What a memory adds over several calls of one prompt, by how it repels, on mixtures with their exact denoisers.

    python benchmarks/several_calls.py --seeds 5    # then python -m benchmarks.arena.page
    python benchmarks/several_calls.py --digits 2    # on a trained model, by the package itself

Strength and end of the guided interval are chosen for each row on the tuning half; the gain at equal quality is then that
of the report half, of the samples of all calls together, over plain sampling of as many.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.agreement import Half, percent, spread
from benchmarks.arena.batched import Setting
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import CALL_SEEDS
from kspec_guidance import SPARKE
from kspec_guidance.bench.fronts import matched, weights
from kspec_guidance.utils.atomic_io import replacing

ROOT = Path(__file__).parents[1]
BEDS_USED = ("mixture-8", "mixture-32")
ORDER_2, VIVID, LOG_DET = Setting(order=2.0), Setting(order=0.5), Setting(log_det=True, exponential=True)
FOUR, ONE_BY_ONE, DIAL = "4 calls of 16", "16 calls of 1", "4 calls of 16, `variety`"
STRENGTHS = {FOUR: (1.0, 2.0, 4.0, 8.0), ONE_BY_ONE: (1.0, 2.0, 4.0, 8.0), DIAL: (25.0, 50.0, 75.0, 100.0)}
STOPS = {FOUR: (0.65, 0.9), ONE_BY_ONE: (0.65, 0.9), DIAL: (0.65,)}
ROWS: dict[str, dict[str, Setting]] = {
    FOUR: {
        **{f"order 2: {recall}": replace(ORDER_2, recall=recall)
           for recall in ("none", "all", "all, same step", "nearest to x0", "nearest")},
        **{f"order 0.5: {recall}": replace(VIVID, recall=recall) for recall in ("none", "all", "nearest")},
        **{f"log det: {recall}": replace(LOG_DET, recall=recall) for recall in ("none", "all", "nearest")},
    },
    ONE_BY_ONE: {
        **{f"order 2: {recall}": replace(ORDER_2, recall=recall) for recall in ("all", "nearest to x0", "nearest")},
        "order 0.5: all": replace(VIVID, recall="all"),  # for one image all objectives recall in the same way
    },
    DIAL: {f"order 2: {recall}": replace(ORDER_2, recall=recall) for recall in ("none", "all", "nearest")},
}  # fmt: skip


class Calls(Half):
    """Cases of one half of a bed's prompts over several calls."""

    def __init__(self, bed: Analytic, half: str, seeds: int, kind: str):
        self.kind, self.shape = kind, {"calls": 16, "images": 1} if kind == ONE_BY_ONE else {"calls": 4, "images": 16}
        super().__init__(bed, half, seeds)

    def samples(self, setting: Setting) -> torch.Tensor:
        return super().samples(replace(setting, **self.shape))

    def front(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """Gain at equal quality over all strengths, and that which keeps agreement as well: bootstrap draws."""
        name = "variety" if self.kind == DIAL else "scale"
        found = [self.change(replace(setting, **{name: value})) for value in STRENGTHS[self.kind]]
        gain, kept, agreement = (np.stack([c[k] for c in found], 1) for k in ("modes", "kept", "agreement"))
        return matched(gain - 1, kept), matched(gain - 1, np.minimum(kept, agreement))


def measure(bed: Analytic, kind: str, seeds: int) -> list[dict[str, Any]]:
    tuning, report = (Calls(bed, half, seeds, kind) for half in ("tune", "report"))
    found, draws = [], {}
    for label, setting in ROWS[kind].items():
        began = time.perf_counter()
        stop = max(STOPS[kind], key=lambda stop: tuning.front(replace(setting, stop=stop))[0][0])
        draws[label], agreed = report.front(replace(setting, stop=stop))
        row: dict[str, Any] = {"label": label, "stop": stop, "kept": spread(draws[label]), "agreed": float(agreed[0])}
        before = label.split(":")[0] + ": all"
        if label.endswith(": nearest") and before in draws:
            row["less"] = spread(draws[label] - draws[before])
        found.append(row)
        print(bed.name, kind, row, f"{time.perf_counter() - began:.0f} s", flush=True)
    return found


def digits(seeds: int) -> dict[str, Any]:
    """Figures of four calls of four images on the model of digits, at variety 50."""
    bed, found = BEDS["digits"](), {label: [] for label in ("plain", "all", "nearest")}
    cases = bed.cases("report", seeds)
    for case in cases:
        for label, mine in found.items():
            guide = None if label == "plain" else SPARKE(variety=50, recall=label)
            with nullcontext() if guide is None else guide.attach(bed.pipe):
                later = [replace(case, seed=case.seed + CALL_SEEDS * call) for call in range(4)]
                mine.append(bed.judge(bed.joined([bed.run(c, 4) for c in later]), case))
        print(case, {k: [round(r["modes"], 2) for r in v] for k, v in found.items()}, flush=True)
    w = weights([c.prompt for c in cases])
    means = {k: {f: w @ np.array([r[f] for r in v]) for f in ("modes", "valid", "vendi")} for k, v in found.items()}
    kept = {k: {f: spread(v) for f, v in figures.items()} for k, figures in means.items()}
    return {"runs": len(cases), "less": spread(means["nearest"]["modes"] - means["all"]["modes"]), **kept}


def digits_table(found: dict[str, Any]) -> str:
    rows = [
        [f"order 2: {k}" if k != "plain" else k, f"{found[k]['modes'][0]:.2f}", f"{found[k]['valid'][0]:.3f}",
         f"{found[k]['vendi'][0]:.3f}", "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found["less"]) if k == "nearest" else ""]
        for k in ("plain", "all", "nearest")
    ]  # fmt: skip
    return pages.table([f"digits, 4 calls of 4, `variety=50`, {found['runs']} runs", "modes", "valid", "Vendi score",
                        "modes less all rows"], rows)  # fmt: skip


def tables(done: dict[str, Any]) -> str:
    parts = []
    for kind in ROWS:
        beds = [d for d in done.values() if kind in d]
        if not beds:
            continue
        head = [kind]
        for d in beds:
            head += [f"{d['bed']}, {d['runs']} runs", "less all rows"]
        rows = []
        for label in ROWS[kind]:
            row = [label]
            for d in beds:
                r = next(r for r in d[kind] if r["label"] == label)
                row += [percent(r["kept"]), percent(r["less"]) if "less" in r else ""]
            rows.append(row)
        parts.append(pages.table(head, rows))
    if "digits" in done:
        parts.append(digits_table(done["digits"]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=list(BEDS_USED), choices=BEDS_USED)
    parser.add_argument("--seeds", type=int, default=0, help="of each half; measure nothing if 0")
    parser.add_argument("--digits", type=int, default=0, help="seeds on the model of digits; measure nothing if 0")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "several_calls.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for kind in ROWS if args.seeds else ():
        for name in args.beds:
            bed = BEDS[name]()
            assert isinstance(bed, Analytic)
            mine = done.setdefault(name, {"bed": bed.name, "runs": len(bed.cases("report", args.seeds))})
            if kind in mine:
                continue
            mine[kind] = measure(bed, kind, args.seeds)
            with replacing(args.out) as fresh:
                fresh.write_text(json.dumps(done, separators=(",", ":")) + "\n", encoding="utf-8")
    if args.digits:
        done["digits"] = digits(args.digits)
        with replacing(args.out) as fresh:
            fresh.write_text(json.dumps(done, separators=(",", ":")) + "\n", encoding="utf-8")
    print(tables(done))


if __name__ == "__main__":
    main()
