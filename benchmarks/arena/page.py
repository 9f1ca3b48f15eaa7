"""Write the tables of the arena's pages in docs, and their figures, from the results.

python -m benchmarks.arena.page
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from kspec_guidance.bench.fronts import Standing, runs_needed, weights, weights_of_seeds
from kspec_guidance.bench.methods import METHODS
from kspec_guidance.bench.methods.onebyone import OneByOne

from .. import agreement, clips, digits_target, several_calls, style_early, toward_style
from ..easing import tables
from ..pages import fill, table
from .beds import BEDS
from .figures import APART, DEFAULT, LOG_DET, OURS, OWN, ablation_panels, fronts, overview
from .fronts import pooled, summaries
from .harness import FIDELITY_LOSS, mean, slug
from .quality import WORSE, equal_quality, with_other_half, with_other_tuning

ROOT = Path(__file__).parents[2]
SHORT = {LOG_DET: "log det", APART: "`faithful`", OURS: "`vivid`", DEFAULT: "`default`"}
PRESETS = {m: functools.reduce(lambda text, name: text.replace(name, SHORT[name]), SHORT, m) for m in OWN}
PROMPTS_ALONE = functools.partial(weights, same_seeds=True)
ONE_BY_ONE = "SPARKE, ours, one by one"
OWN_SINGLE = {m: m.removeprefix("SPARKE, ours, ") for m in METHODS if m.startswith(ONE_BY_ONE)}
FOR_USERS = {m: name for m, name in PRESETS.items() if m in OWN[:3]}
PAGES = {  # the tables that each page of the documentation holds, between markers
    "toward-style.md": (
        "style",
        "style_diversity",
        "style_early",
        "style_transformers",
        "style_mixed",
        "style_captions",
        "style_memory",
        "style_tones",
    ),
    "arena/settings.md": ("settings",),
    "arena.md": ("gains",),
    "arena/setup.md": ("beds", "judges"),
    "arena/fronts.md": ("equal", "volumes", "vendi", "tuned"),
    "arena/scores.md": ("scores",),
    "arena/reviewers.md": ("verdicts", "power", "seeds", "again"),
    "arena/target.md": ("matching", "digits_target"),
    "arena/sets.md": ("smallsets", "singles", "calls", "pairs", "recall", "longruns"),
    "arena/costs.md": ("cost",),
    "arena/ablations.md": ("ablations", "easing", "agreement", "clips"),
}


@functools.cache
def order() -> list[str]:
    """Names of the files of results of all beds."""
    return [slug(make().name) for make in BEDS.values()]


def read(path: Path) -> dict[str, Any]:
    """Results of a script; none if there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}  # type: ignore[no-any-return]


def records(folder: Path) -> list[dict[str, Any]]:
    """Results of the beds, in the order of the arena."""
    return [json.loads(path.read_text()) for name in order() if (path := folder / f"{name}.json").exists()]


def of_more_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of the beds that were measured on more cases than those of the folder itself."""
    found = {d["bed"]: d for d in records(folder / "equal")}
    for d in records(folder / "equal" / "swapped"):  # with the halves of the prompts swapped
        found[d["bed"]] = with_other_half(found[d["bed"]], d)
    for d in records(folder / "equal" / "aimed"):  # tuned for the gain at equal quality
        found[d["bed"]] = with_other_tuning(found[d["bed"]], d)
    return found


def with_further_prompts(data: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The beds' results, each followed by those on further prompts, where these are of some of the methods only."""
    further = {d["bed"]: d | {"bed": f"{d['bed']}, further prompts"} for d in records(folder / "equal" / "further")}
    return [each for d in data for each in (d, further.get(d["bed"])) if each is not None]


def with_fronts(data: dict[str, Any]) -> set[str]:
    return {m for m, found in data["methods"].items() if found.get("front")}


def beds(data: list[dict[str, Any]]) -> str:
    rows = []
    for d in data:
        s, base = d["settings"], d["methods"]["plain"]
        found = base[f"report {s['seeds']}"]
        rows.append([
            d["bed"], f"{s['images']}", f"{s['steps']}", f"{s['guidance_scale']:g}", f"{len(s['prompts'])}",
            f"{mean(found['modes']):.2f} of {mean(found['of']):.1f}", f"{mean(found['valid']):.3f}",
        ])  # fmt: skip
    return table(["bed", "images a run", "steps", "CFG", "runs (prompts x seeds)", "modes, plain", "valid, plain"], rows)


def percent(value: float, low: float, high: float) -> str:
    return f"{value:+.0%} [{low:+.0%}, {high:+.0%}]"


def by_method(data: list[dict[str, Any]], cell: Any, bold: Any = None, diversity: str | None = None) -> str:
    found = [summaries(d, OURS, diversity) for d in data]
    names = [m for m in METHODS if any(s.method == m for f in found for s in f)]
    score = {m: mean([s.gain for f in found for s in f if s.method == m]) for m in names}
    rows = []
    for m in sorted(names, key=lambda m: -score[m]):
        row = [m]
        for f in found:
            mine = next((s for s in f if s.method == m), None)
            text = "-" if mine is None else cell(mine)
            best = bold is not None and mine is not None and bold(mine) == max(bold(s) for s in f)
            row.append(f"**{text}**" if best else text)
        rows.append(row)
    return table(["method", *(d["bed"] for d in data)], rows)


def gains(data: list[dict[str, Any]]) -> str:
    return by_method(data, lambda s: percent(s.gain, s.gain_low, s.gain_high), lambda s: s.gain)


def vendi(data: list[dict[str, Any]]) -> str:
    return by_method(data, lambda s: percent(s.gain, s.gain_low, s.gain_high), lambda s: s.gain, "vendi")


def scores(data: list[dict[str, Any]]) -> str:
    """Conditional RKE, Scendi, precision, recall, coverage and Frechet distance, bed by bed."""
    columns = {"conditional_rke": ("cond. RKE", 2), "scendi": ("Scendi", 2), "precision": ("precision", 2),
               "recall": ("recall", 2), "coverage": ("coverage", 2), "frechet_distance": ("Frechet", 2)}  # fmt: skip
    parts = []
    for d in data:
        found = pooled(d)
        if not found:
            continue
        order = sorted(found, key=lambda m: (m != "plain", -found[m]["conditional_rke"]))
        rows = [
            [m, *(f"{v:.{n}f}" if (v := found[m][k]) < 1e6 else f"{v:.0e}" for k, (_, n) in columns.items())] for m in order
        ]
        parts.append(f"## {d['bed']}\n\n" + table(["method", *(head for head, _ in columns.values())], rows))
    return "\n\n".join(parts) or "(not measured)"


def volumes(data: list[dict[str, Any]]) -> str:
    return by_method(data, lambda s: f"{s.volume:.2f} [{s.volume_low:.2f}, {s.volume_high:.2f}]", lambda s: s.volume)


def equal(data: list[dict[str, Any]], reference: str = OURS) -> str:
    """Gains at equal quality, bed by bed."""
    parts = []
    for d in data:
        found = equal_quality(d, reference)
        if not found:
            continue
        rows = [
            [
                s.method, percent(s.gain, s.gain_low, s.gain_high),
                f"{s.volume:.2f} [{s.volume_low:.2f}, {s.volume_high:.2f}]",
                f"{s.agreement:+.3f}", f"{s.gain_agreed:+.0%}",
                lead(s),
                "" if s.p is None else f"{s.p:.3f}",
            ]
            for s in found
        ]  # fmt: skip
        head = ["method", "gain", "hypervolume", "agreement there", "gain that keeps agreement", "ours less it, gain", "p"]
        own, n = d["methods"]["plain"][f"report {d['settings']['seeds']}"], len(d["settings"]["prompts"])
        strengths = len(d["methods"][found[0].method]["front"])
        title = f"### {d['bed']}, {n} runs of {strengths} strengths"
        modes = f"{mean(own['modes']):.1f} of {mean(own['of']):.1f} modes by plain sampling"
        parts.append(f"{title}, {modes}\n\n" + table(head, rows))
    tolerated = (
        f"on the data {WORSE['on_data']}, coverage {WORSE['coverage']}, Frechet distance x{WORSE['frechet_distance']}"
    )
    return f"Tolerances: {tolerated}; agreement {FIDELITY_LOSS}.\n\n" + ("\n\n".join(parts) or "(not measured)")


def verdict(s: Standing) -> str:
    if s.p is None or s.ahead is None:
        return "not compared"
    if s.p >= 0.05:
        return "tie"
    return "ahead" if s.ahead > 0 else "behind"


def lead(s: Standing) -> str:
    """How far the reference is ahead of a method, with its interval."""
    return "" if s.ahead is None else percent(s.ahead, s.ahead_low or 0, s.ahead_high or 0)


def settings(data: list[dict[str, Any]]) -> str:
    """Our presets beside the best other method, bed by bed; for users."""
    rows = []
    for d in data:
        found = {s.method: s for s in summaries(d, OURS)}
        best = max((s for m, s in found.items() if m not in OWN), key=lambda s: s.gain)
        own = [percent(s.gain, s.gain_low, s.gain_high) if (s := found.get(m)) else "-" for m in FOR_USERS]
        rows.append([d["bed"], *own, f"{best.method}: {percent(best.gain, best.gain_low, best.gain_high)}",
                     f"{lead(best)}: {verdict(best)}"])  # fmt: skip
    head = ["model", *FOR_USERS.values(), "best of the others", "`vivid` less it"]
    return table(head, rows)


def verdicts(data: list[dict[str, Any]], equal: list[dict[str, Any]], calls: list[dict[str, Any]]) -> str:
    """How many methods each of our settings is ahead of, ties with and is behind.

    At matched validity, at equal quality, so that agreement is kept too, and at equal quality of several calls.
    """
    parts = []
    for title, found_by, source in (
        ("modes at matched validity", summaries, data),
        ("modes at equal quality", equal_quality, equal),
        ("modes at equal quality and agreement", functools.partial(equal_quality, agreed=True), equal),
        ("modes of several calls at equal quality", equal_quality, calls),
    ):
        rows, notes = [], []
        own_measured = [m for m in OWN if any(m in with_fronts(d) for d in source)]
        for d in source:
            measured = {s.method for s in found_by(d, OURS)}
            if not measured:
                continue
            row = [d["bed"], f"{len(d['settings']['prompts'])}", f"{len(measured - set(OWN))}"]
            for own in own_measured:
                others = [s for s in found_by(d, own) if s.method not in OWN] if own in measured else []
                found = [verdict(s) for s in others]
                text = " / ".join(str(found.count(v)) for v in ("ahead", "tie", "behind")) if others else "-"
                if "not compared" in found:
                    text = "too few prompts"
                if set(found) == {"ahead"}:
                    text, nearest = f"**{text}**", min(others, key=lambda s: s.ahead or 0)
                    notes.append(f"{d['bed']}: {PRESETS[own]} less {nearest.method}, the nearest: {lead(nearest)}, p "
                                 f"{nearest.p:.3f}.")  # fmt: skip
                row.append(text)
            rows.append(row)
        parts += [table([f"bed, {title}", "runs", "other methods", *(PRESETS[m] for m in own_measured)], rows), *notes]
    return "\n\n".join(parts)


def power(data: list[dict[str, Any]], equal: list[dict[str, Any]]) -> str:
    """The best of ours beside the best of the others, how wide the interval is, and the runs that would tell them apart."""
    parts = []
    for title, found_by, source in (("matched validity", summaries, data), ("equal quality", equal_quality, equal)):
        rows = []
        for d in source:
            measured = found_by(d, OURS)
            own = next((s.method for s in measured if s.method in OWN), None)  # the best, as they are sorted
            others = [] if own is None else [s for s in found_by(d, own) if s.method not in OWN]
            if own is None or not others:
                continue
            runs = len(d["settings"]["prompts"])
            best, low, high = others[0], others[0].ahead_low or 0.0, others[0].ahead_high or 0.0
            mine, told = next(s for s in measured if s.method == own), verdict(best)
            fixed = next(s for s in found_by(d, own, weigh=PROMPTS_ALONE) if s.method == best.method)
            left = 100 * ((fixed.ahead_high or 0.0) - (fixed.ahead_low or 0.0))
            told = "too few prompts" if told == "not compared" else told
            needed = runs_needed(best.ahead or 0.0, low, high, runs, len(others))
            rows.append([
                d["bed"], f"{runs}", f"{PRESETS[own]} {mine.gain:+.0%}", f"{best.method} {best.gain:+.0%}", lead(best),
                f"{100 * (high - low):.0f}", f"{left:.0f}", told if told != "tie" else f"tie; {rounded(needed)}",
            ])  # fmt: skip
        head = [f"bed, {title}", "runs", "best of ours", "best of the others", "difference", "width, points",
                "of prompts alone", "runs needed"]  # fmt: skip
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def of_one_call(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The beds' results without methods that make images one by one in place of one call."""
    return [d | {"methods": {m: v for m, v in d["methods"].items() if not issubclass(METHODS[m], OneByOne)}} for d in data]


def singles(data: list[dict[str, Any]]) -> str:
    """Methods that make one image a call, of the beds on which ours was measured so, beside the best of one call."""
    rows = []
    for d in data:
        if ONE_BY_ONE not in with_fronts(d):
            continue
        alone = d | {"methods": {m: v for m, v in d["methods"].items() if METHODS[m].single}}
        found = {s.method: s for s in equal_quality(alone, ONE_BY_ONE)}
        others = [s for m, s in found.items() if m not in OWN_SINGLE]
        cells = []
        for own in OWN_SINGLE:
            if own not in found:
                cells.append("-")
                continue
            told = [verdict(s) for s in equal_quality(alone, own) if s.method not in OWN_SINGLE]
            text = " / ".join(str(told.count(v)) for v in ("ahead", "tie", "behind"))
            mine = found[own]
            text = f"**{text}**" if set(told) == {"ahead"} else text
            cells.append(f"{percent(mine.gain, mine.gain_low, mine.gain_high)}; {mine.agreement:+.2f}; {text}")
        best = next(m for m in found if m in OWN_SINGLE)  # they are sorted
        (batch,) = of_one_call([d])
        together = equal_quality(batch | {"methods": batch["methods"] | {best: d["methods"][best]}}, best)
        first = next(s for s in together if s.method not in (*OWN, best))
        rows.append([
            d["bed"], f"{len(d['settings']['prompts'])}", *cells, f"{others[0].method} {others[0].gain:+.0%}",
            f"{first.method} {first.gain:+.0%}", f"{lead(first)}: {verdict(first)}",
        ])  # fmt: skip
    head = ["bed", "runs", *(f"{name}: gain; agreement there; ahead / tie / behind" for name in OWN_SINGLE.values())]
    head += ["best of the others", "best of the others in one call of all images", "best of ours one by one less it"]
    return table(head, rows)


def rounded(runs: float) -> str:
    """A number of runs, to two digits."""
    return "over 100,000" if runs > 1e5 else f"{float(f'{runs:.2g}'):,.0f}"


def tuned(data: list[dict[str, Any]]) -> str:
    names = [m for m in METHODS if any("tuned" in d["methods"].get(m, {}) for d in data)]
    rows = []
    for m in names:
        row = [m]
        for d in data:
            has = d["methods"].get(m, {})
            both = [found for name in ("tuned", "other_tuned") if (found := has.get(name))]
            row.append("; ".join(", ".join(f"{k} {v:.3g}" for k, v in found.items()) for found in both) or "-")
        rows.append(row)
    return table(["method", *(d["bed"] for d in data)], rows)


def cost(folder: Path) -> str:
    path = folder / "cost.json"
    if not path.exists():
        return "(not measured)"
    found = json.loads(path.read_text())
    methods = dict.fromkeys(m for size in found.values() for m in size["methods"])
    rows = []
    for m in methods:
        by = [size["methods"].get(m) for size in found.values()]
        own = [f"{r['own_seconds'] * 1e3:.1f} ms" if r else "-" for r in by]
        rows.append(
            [m, f"{next(r['calls'] for r in by if r):+.2f}", *own, *(f"{r['added']:+.3%}" if r else "-" for r in by)]
        )
    sizes = [f"{n} (a step of 4 images takes {size['step_seconds']:.0f} s)" for n, size in found.items()]
    head = ["method", "extra denoiser calls", *(f"own time, {n}" for n in found), *(f"added, {n}" for n in sizes)]
    return table(head, rows)


def matching(folder: Path) -> str:
    path = folder / "matching.json"
    if not path.exists():
        return "(not measured)"
    found, parts = json.loads(path.read_text()), []
    for bed, by in found.items():
        rows = [
            [m, size, *(f"{r[k]:.3f} [{r[k + '_low']:.3f}, {r[k + '_high']:.3f}]" for k in by["figures"])]
            for m, at in by["methods"].items()
            for size, r in at.items()
        ]
        parts.append(f"## {bed}\n\n{by['about']}:\n\n" + table(["method", "references", *by["figures"]], rows))
    return "\n\n".join(parts)


def ablations(folder: Path) -> str:
    path = folder / "ablations.json"
    if not path.exists():
        return "(not measured)"
    found, rows = json.loads(path.read_text()), []
    names = list(found["beds"])
    for group, variants in found["groups"].items():
        for k, (label, by) in enumerate(variants.items()):
            rows.append([group if k == 0 else "", label, *(f"{by[b]['gain']:+.0%}" if b in by else "-" for b in names)])
    return table(["", "variant", *names], rows)


def longruns(folder: Path) -> str:
    path = folder / "longruns.json"
    if not path.exists():
        return "(not measured)"
    found, rows = json.loads(path.read_text()), []
    for batch, by in found.items():
        for k, (label, r) in enumerate(by.items()):
            rows.append([
                batch if k == 0 else "", label, f"{r['scale']:g}", f"{r['evenness']:.1f} of {r['of']:.1f}",
                f"{r['rare']:.1f}", f"{r['valid']:.3f}",
            ])  # fmt: skip
    return table(["", "guide", "strength", "effective number of modes", "modes with half a fair share", "valid"], rows)


def smallsets(folder: Path) -> str:
    path = folder / "smallsets.json"
    if not path.exists():
        return "(not measured)"
    found, parts = json.loads(path.read_text()), []
    for bed, by in found.items():
        rows = []
        for method, at in by.items():
            gain = (lambda r: "") if method == "plain" else (lambda r: f" ({percent(r['gain'], r['low'], r['high'])})")
            rows.append([method, *(f"{r['modes']:.2f}{gain(r)}, {r['valid']:.3f}" for r in at.values())])
        parts.append(table([bed, *(f"{n} images: modes, valid" for n in next(iter(by.values())))], rows))
    return "\n\n".join(parts)


def again(data: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Gains at equal quality of methods that were tuned once more, beside those of the tunings before."""
    before, parts = {d["bed"]: d for d in data}, []
    for d in others:
        known = {s.method: s for s in equal_quality(before[d["bed"]], OURS)}
        rows = [
            [s.method, *(percent(x.gain, x.gain_low, x.gain_high) for x in (known[s.method], s))]
            for s in equal_quality(d, OURS)
        ]
        parts.append(table([d["bed"], "tuned before", "tuned once more"], rows))
    return "\n\n".join(parts) or "(not measured)"


def of_seeds(folder: Path) -> str:
    """Gains at equal quality on all prompts that there are: intervals over seeds alone, and as if prompts were drawn."""
    other, parts = {d["bed"]: d for d in records(folder / "swapped")}, []
    for d in records(folder):
        both = with_other_half(d, other[d["bed"]])
        drawn = {s.method: s for s in equal_quality(both, OURS)}
        rows = [
            [s.method, percent(s.gain, s.gain_low, s.gain_high), f"{s.agreement:+.3f}", lead(s),
             "" if s.p is None else f"{s.p:.3f}",
             f"[{drawn[s.method].gain_low:+.0%}, {drawn[s.method].gain_high:+.0%}]"]
            for s in equal_quality(both, OURS, weigh=weights_of_seeds)
        ]  # fmt: skip
        runs = len(both["settings"]["prompts"])
        head = [
            f"{d['bed']}, {runs} runs",
            "gain",
            "agreement there",
            "`vivid` less it",
            "p",
            "gain if prompts are drawn too",
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts) or "(not measured)"


def judges() -> str:
    measured = json.loads((Path(__file__).parent / "weights" / "measured.json").read_text())
    e, d = measured["emoji_judge"], measured["digit_judge"]
    rows = [
        ["digits, class", f"{d['held_out']}", f"{d['accuracy']:.1%}"],
        ["emoji, which one, those with a skin tone", f"{e['with_skin_tone']}", f"{e['accuracy_code_with_skin_tone']:.1%}"],
        ["emoji, which one, the others", f"{e['held_out'] - e['with_skin_tone']}", f"{e['accuracy_code_without']:.1%}"],
        ["emoji, skin tone", f"{e['held_out']}", f"{e['accuracy_tone']:.1%}"],
        ["emoji, art style", f"{e['held_out']}", f"{e['accuracy_style']:.1%}"],
        ["emoji, family", f"{e['held_out']}", f"{e['accuracy_family']:.1%}"],
    ]
    return table(["judge", "held-out images", "accuracy"], rows)


def write(folder: Path, docs: Path) -> None:
    """Fill the pages of the folder ``docs`` with the tables of a folder of results, and draw the figures there."""
    alone, more = records(folder), of_more_cases(folder)
    best_measured = [more.get(d["bed"], d) for d in alone]
    # both measures of equal worth are of the same runs, where those are of all methods
    data = [b if with_fronts(d) <= with_fronts(b) else d for d, b in zip(alone, best_measured, strict=True)]
    together = [d if "pooled" in d["methods"]["plain"] else a for d, a in zip(data, alone, strict=True)]
    every, calls = with_further_prompts(best_measured, folder), records(folder / "calls")
    all_tuned, (together, data, all_measured) = data, (of_one_call(x) for x in (together, data, every))
    parts = {
        "equal": equal(all_measured), "verdicts": verdicts(data, all_measured, calls),
        "power": power(data, all_measured), "beds": beds(data),
        "calls": equal(calls, DEFAULT), "pairs": equal(records(folder / "pairs"), DEFAULT),
        "singles": singles(every),
        "seeds": of_seeds(folder / "equal" / "seeds"),
        "again": again(all_measured, records(folder / "equal" / "again")),
        "recall": several_calls.tables(read(folder / "several_calls.json")),
        "gains": gains(data), "volumes": volumes(data), "vendi": vendi(data), "settings": settings(data),
        "scores": scores(together), "tuned": tuned(all_tuned), "cost": cost(folder), "matching": matching(folder),
        "smallsets": smallsets(folder), "longruns": longruns(folder), "ablations": ablations(folder), "judges": judges(),
        "easing": tables(folder / "easing.json"),
        "agreement": agreement.tables(read(folder / "agreement.json")),
        **toward_style.parts(read(folder.parent / "toward_style.json").get("rows", [])),
        "style_early": style_early.early_table(read(folder.parent / "style_early.json").get("rows", [])),
        "digits_target": digits_target.tables(read(folder.parent / "digits_target.json").get("rows", [])),
        "clips": clips.tables(read(folder.parent / "clips.json")),
    }  # fmt: skip
    for page, names in PAGES.items():
        fill(docs / page, {name: parts[name] for name in names})
    fronts(data, docs / "arena.png")
    overview(data, docs / "which-method.png")
    ablation_panels(folder, docs / "arena-ablations.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "arena")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages and figures")
    args = parser.parse_args()
    write(args.results, args.docs)


if __name__ == "__main__":
    main()
