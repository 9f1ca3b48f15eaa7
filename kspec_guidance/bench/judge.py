"""Scores of all methods of a comparison, with paired intervals, gains at equal quality, costs, and what was left out.

All methods are scored on the prompts that are finished for each of them. Intervals and differences come from one bootstrap
over prompts and seeds (Owen 2007), the same draws for all scores and methods. The score of a whole set enters it by its
jackknife pseudo-values over groups of prompts: copies of images, which a bootstrap makes, lower every diversity score.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kspec_guidance
from kspec_guidance.bench.fronts import DRAWS, against, hypervolume, matched, resampled, standings
from kspec_guidance.bench.methods import CODES
from kspec_guidance.bench.metrics import ASPECTS, METRICS, Measure, Metric
from kspec_guidance.bench.resources import Resources, Sample, Unavailable, original_emoji
from kspec_guidance.bench.store import PLAIN, Images, Run
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.utils.arguments import choices
from kspec_guidance.utils.atomic_io import replacing
from kspec_guidance.utils.folders import list_files
from kspec_guidance.utils.hashing import hash_json
from kspec_guidance.utils.images import SourceError, image_types

__all__ = ["GROUPS", "judge", "wanted_scores"]

GROUPS = 10  # of prompts, each left out once by the jackknife
DEPTH = 5.0  # of the hypervolume's box, in units of the quality that still counts as equal
FEWEST = 4  # prompts of an interval of a score of all images
ENOUGH = 20  # prompts from which a bootstrap's intervals are about as wide as they say

Progress = Callable[[str], None]
Setting = tuple[str, str | None]  # method, strength


class _Values:
    """Scores that were measured before, in ``scores/<metric>.json`` of the run's folder.

    Args:
        folder: of the run.
        metric: name of the score.
        about: all that values depend on, besides the images and their prompts.
    """

    def __init__(self, folder: Path, metric: str, about: Sequence[Any]):
        self.folder, self.about, self.changed = folder, list(about), False
        self.path = folder / "scores" / f"{metric}.json"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.known: dict[str, Any] = found if isinstance(found, dict) else {}
        self._states: dict[Path, tuple[str, int, int]] = {}

    def _state(self, path: Path) -> tuple[str, int, int]:
        """Name of a file, with its method, since files of a copied folder may have equal times; its size and time."""
        if path not in self._states:
            found = path.stat()
            self._states[path] = path.relative_to(self.folder).as_posix(), found.st_size, found.st_mtime_ns
        return self._states[path]

    def key(self, samples: Sequence[Sample]) -> str:
        return hash_json([self.about, [(*self._state(s.path), s.prompt, s.truth) for s in samples]], 24)

    def of(self, samples: Sequence[Sample], measure: Measure) -> Any:
        """The value of some images as a number or list, measured now if they are new."""
        key = self.key(samples)
        if key not in self.known:
            self.known[key], self.changed = measure(samples).double().tolist(), True
        return self.known[key]

    def save(self) -> None:
        if self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as fresh:
                fresh.write_text(json.dumps(self.known) + "\n", encoding="utf-8")
            self.changed = False


def _groups(metric: Metric, prompts: int, images: int) -> np.ndarray:
    """The group of each prompt that is left out together with it, ``[prompts]``; -1 for prompts that a score leaves out."""
    kept = np.arange(prompts)
    if metric.most and prompts * images > metric.most:
        kept = evenly_spaced(prompts, max(FEWEST, metric.most // images)).numpy()
    out = np.full(prompts, -1)
    out[kept] = np.arange(len(kept)) % GROUPS
    return out


class _Draws:
    """Bootstrap draws of scores, the same for all."""

    def __init__(self, prompts: int, images: int):
        self.prompts, self.images = resampled(prompts, images, DRAWS)

    def of(self, metric: Metric, values: np.ndarray) -> np.ndarray:
        """Draws ``[draws]`` of a score from its values.

        Args:
            metric: the score.
            values: of images ``[prompts, images]``, prompts ``[prompts]``, or of a set and its parts ``[1 + groups]``.
        """
        if metric.unit == "set":
            return self._of_set(_groups(metric, self.prompts.shape[1], self.images.shape[1]), values[0], values[1:])
        known = np.isfinite(values).reshape(len(values), -1)
        of_images = self.images if metric.unit == "image" else np.ones((len(self.prompts), 1))
        total, count = (
            ((self.prompts @ x) * of_images).sum(1) for x in (np.where(known, values.reshape(known.shape), 0), known)
        )
        with np.errstate(invalid="ignore"):
            return total / count

    def _of_set(self, groups: np.ndarray, value: float, left_out: np.ndarray) -> np.ndarray:
        """The score plus its pseudo-values, weighted so that the variance of the draws is the jackknife's."""
        parts = len(left_out)
        if parts < 2:
            return np.full(len(self.prompts), value)
        pseudo = parts * value - (parts - 1) * left_out
        shares = np.stack([self.prompts[:, groups == g].sum(1) for g in range(parts)], 1)
        shares /= shares.sum(1, keepdims=True).clip(1e-12)
        return value + ((groups >= 0).sum() / (parts - 1)) ** 0.5 * (shares - shares[0]) @ pseudo


def wanted_scores(metrics: Sequence[str] | None, reference: str | Path | None) -> tuple[list[str], list[Path]]:
    """Names of the scores and files of the reference that :func:`judge` will use: to refuse wrong ones before a long run.

    Args:
        metrics: names of scores; None for all.
        reference: folder of real images, or None.

    Raises:
        ValueError: for an unknown score.
        SourceError: for a reference without images.
    """
    names = list(METRICS) if metrics is None else list(dict.fromkeys(metrics))
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown score {name!r}; {choices(name, METRICS)}")
    if reference is None:
        return names, []
    folder = Path(reference)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder of real images")
    files = [path for path in list_files(folder)[0] if path.suffix.lower() in image_types()]
    if not files:
        raise SourceError(f"{folder} contains no images")
    return names, files


def judge(
    run: Run,
    metrics: Sequence[str] | None = None,
    reference: str | Path | None = None,
    device: str = "cpu",
    download: bool = False,
    progress: Progress | None = None,
    emoji: bool | None = None,
) -> dict[str, Any]:
    """Score all methods of a comparison.

    A score whose package, network or reference is absent is left out with the reason, and so is one that fails; the others
    are finished. Values are kept in the folder ``scores`` of the run, so that another call continues.

    Args:
        run: the comparison, finished or not.
        metrics: names of the scores; by default all.
        reference: folder of real images, for the scores that compare with them; by default, for images of the embedded
            model, the emoji that come with it.
        device: of the networks.
        download: whether networks may be downloaded from the hub.
        progress: called with a line before each score.
        emoji: whether the images are emoji, so that the emoji classifier judges them and gives their features; by default
            those of the embedded model are.

    Returns:
        Plain values, ready for JSON. ``methods`` has for each method and score ``value``, ``low`` and ``high`` (95%, None
        where there is no interval); a method with several strengths is there as ``name@strength``, its chosen one as
        ``name``. ``differences`` to plain sampling, with Holm-corrected p-values. ``fronts``: for each score of diversity,
        each method's gain at equal quality and its hypervolume. ``cost``, ``metrics``, ``skipped``, ``notes``, ``verdict``.

    Raises:
        ValueError: for an unknown score, or if no prompt is finished for all methods.
        SourceError: for a reference without images.
    """
    names, files = wanted_scores(metrics, reference)
    settings, images = run.settings, run.groups()
    methods = [m | {"strengths": _from_weakest(m["name"], m["strengths"])} for m in settings["methods"]]
    images = {(m["name"], s): images[m["name"], s] for m in methods for s in m["strengths"]}
    notes: list[str] = []
    shared, images = _finished(images, notes)
    prompts = {p["index"]: p for p in settings["prompts"]}
    samples = {
        setting: [[Sample(path, prompts[k]["text"], prompts[k].get("truth") or {}) for path in of[k].paths] for k in shared]
        for setting, of in images.items()
    }
    texts = [prompts[k]["text"] for k in shared]
    emoji = settings["model"]["name"] == "demo" if emoji is None else emoji
    real = None if reference is None else str(reference)
    if emoji and reference is None and any(METRICS[n].reference for n in names):
        files, real = original_emoji(run.folder / "scores" / "originals"), "Noto Emoji and Twemoji"
    resources = Resources(texts, emoji, files, device, download, run.folder)
    draws = _Draws(len(shared), settings["images"])
    found, skipped = dict[str, dict[Setting, np.ndarray]](), dict[str, str]()
    for name in names:
        if progress is not None:
            progress(METRICS[name].title)
        try:
            values = _measure(METRICS[name], samples, resources, run.folder)
        except Unavailable as error:
            skipped[name] = str(error)
        except Exception as error:  # whatever the code of others raises; the other scores are finished
            skipped[name] = f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        else:
            if all(np.isfinite(v).any() for v in values.values()):
                found[name] = {setting: draws.of(METRICS[name], v) for setting, v in values.items()}
            else:
                skipped[name] = "is not known for these prompts"
        resources.release()
    several = {m["name"] for m in methods if len(m["strengths"]) > 1}
    quality = _quality(found)
    chosen = _chosen(methods, found, quality)
    labels = {
        (method, strength): method if method not in several or chosen[method] == strength else f"{method}@{strength}"
        for method, strength in samples
    }
    fronts = _fronts(methods, found, quality)
    if (PLAIN, None) not in images:
        notes.append("without plain sampling among the methods there are no differences and gains")
    if several:
        notes.append("strengths were chosen on these same images" if quality else "no score of quality chose the strengths")
    if len(shared) < ENOUGH:
        notes.append(f"intervals from fewer than {ENOUGH} prompts, here {len(shared)}, are narrower than they should be")
    most = [METRICS[n].most for n in found if METRICS[n].most]
    if most and len(shared) * settings["images"] > max(most):
        notes.append(f"scores by a kernel matrix of all images take {max(most)} of them, of evenly spaced prompts")
    return {
        "model": settings["model"]["name"],
        "prompts": len(shared),
        "images": settings["images"],
        "steps": settings.get("steps"),
        "device": settings.get("device"),
        "features": resources.embedder("own").name if any(METRICS[n].features == "own" for n in found) else None,
        "prompt_features": resources.texts().name if any(METRICS[n].prompts for n in found) else None,
        "reference": None if real is None else {"path": real, "images": len(files)},
        "methods": {
            labels[s]: {n: _interval(found[n][s], METRICS[n].bounds) for n in found}
            for s in sorted(labels, key=lambda s: _order(s, labels))
        },
        "settings": [{"method": m, "strength": s, "label": labels[m, s]} for m, s in labels],
        "chosen": {m: c for m, c in chosen.items() if m in several},
        "differences": _differences(found, labels),
        "fronts": fronts,
        "quality": {n: {"tolerance": METRICS[n].tolerance, "relative": METRICS[n].relative} for n in quality},
        "cost": _cost(run, labels, shared),
        "metrics": {n: {k: getattr(METRICS[n], k) for k in ("title", "aspect", "unit", "higher", "about")} for n in found},
        "skipped": skipped,
        "notes": notes,
        "verdict": _verdict(fronts, _missing(images, found, quality), quality, len(shared), len(images)),
    }


def _from_weakest(method: str, strengths: Sequence[str | None]) -> list[str | None]:
    """The strengths as a line from plain sampling meets them: of lower guidance, the largest first."""
    falls = method in CODES and CODES[method].falls
    return sorted(strengths, key=lambda s: 0.0 if s is None else float(s), reverse=falls)


def _finished(
    images: dict[Setting, dict[int, Images]], notes: list[str]
) -> tuple[list[int], dict[Setting, dict[int, Images]]]:
    """The prompts that are finished for all settings; those that have far less than the others are left out."""
    most = max((len(of) for of in images.values()), default=0)
    kept = {setting: of for setting, of in images.items() if of and 2 * len(of) >= most}
    left_out = [f"{_name(s)} ({len(of)})" for s, of in images.items() if s not in kept]
    shared = sorted(set.intersection(*(set(of) for of in kept.values()))) if kept else []
    if not shared:
        raise ValueError("no prompt is finished for all methods; let the run continue, then score it")
    if left_out:
        notes.append(f"left out, with images of less than half of {most} prompts: {', '.join(left_out)}")
    if len(shared) < most:
        notes.append(f"the run is not finished: {len(shared)} prompts are done for all methods, {most} for some")
    return shared, kept


def _name(setting: Setting) -> str:
    return setting[0] if setting[1] is None else f"{setting[0]}@{setting[1]}"


def _order(setting: Setting, labels: Mapping[Setting, str]) -> tuple[int, int]:
    order = list(labels)
    first = next(k for k, s in enumerate(order) if s[0] == setting[0])
    return first, 0 if labels[setting] == setting[0] else 1 + order.index(setting)


@torch.inference_mode(False)
@torch.no_grad()
def _measure(
    metric: Metric, samples: Mapping[Setting, list[list[Sample]]], resources: Resources, folder: Path
) -> dict[Setting, np.ndarray]:
    """Values of each setting; see :class:`_Draws` for their shapes."""
    if metric.reference and not resources.reference:
        raise Unavailable("needs real images: --reference FOLDER")
    measure, features = metric.load(resources), metric.features
    about: list[Any] = [kspec_guidance.__version__, resources.embedder(features).fingerprint if features else ""]
    if metric.reference:
        about.append([(str(p), p.stat().st_mtime_ns) for p in resources.reference])
    if metric.prompts:
        about.append(resources.texts().fingerprint)
    out: dict[Setting, np.ndarray] = {}
    values = _Values(folder, metric.name, about)
    try:
        for setting, groups in samples.items():
            parts = _parts(metric, groups) if metric.unit == "set" else groups
            if features and not all(values.key(part) in values.known for part in parts):
                resources.rows(features, [s.path for group in groups for s in group])  # in large batches
            found = [values.of(part, measure) for part in parts]
            for part, value in zip(parts, found, strict=True):
                shape = [len(value)] if isinstance(value, list) else []
                if shape != ([len(part)] if metric.unit == "image" else []):
                    raise ValueError(f"values of shape {shape} for {len(part)} images")
            out[setting] = np.array(found, dtype=float)
            values.save()
    finally:
        values.save()
    return out


def _parts(metric: Metric, groups: list[list[Sample]]) -> list[list[Sample]]:
    """The images of a score of a set, and those without each group of prompts; the first alone if prompts are few."""
    group_of = _groups(metric, len(groups), len(groups[0]))
    left_out = range(group_of.max() + 1) if len(groups) >= FEWEST else []
    return [
        [s for group, g in zip(groups, group_of, strict=True) if g >= 0 and g != without for s in group]
        for without in [-1, *left_out]
    ]


def _interval(draws: np.ndarray, bounds: tuple[float, float]) -> dict[str, float | None]:
    known = draws[np.isfinite(draws)]
    if len(known) == 0 or np.ptp(known) == 0:
        return {"value": float(draws[0]), "low": None, "high": None}
    low, high = np.quantile(known, [0.025, 0.975]).clip(*bounds)  # a set's are from a linear approximation
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}


def _differences(
    found: Mapping[str, Mapping[Setting, np.ndarray]], labels: Mapping[Setting, str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Each setting less plain sampling; p-values are corrected for the number of settings."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, by in found.items():
        compared = against({labels[s]: np.nan_to_num(d, nan=float(d[0])) for s, d in by.items()}, PLAIN)
        constant = all(np.ptp(d) == 0 for d in by.values())
        for label, (value, low, high, p) in compared.items():
            entry = {"value": -value} if constant else {"value": -value, "low": -high, "high": -low, "p": p}
            out.setdefault(label, {})[name] = entry
    return out


def _quality(found: Mapping[str, Mapping[Setting, np.ndarray]]) -> list[str]:
    """Scores that decide what counts as equal quality: the first of each aspect that was measured."""
    out = []
    for aspect in ASPECTS[1:]:
        for name, by in found.items():
            plain = by.get((PLAIN, None))
            metric = METRICS[name]
            if metric.aspect == aspect and plain is not None and (not metric.relative or (plain > 0).all()):
                out.append(name)
                break
    return out


def _kept(found: Mapping[str, Mapping[Setting, np.ndarray]], quality: Sequence[str], setting: Setting) -> np.ndarray:
    """Change of quality against plain sampling, in units of what counts as equal: the worst of its scores."""
    parts = []
    for name in quality:
        metric, plain = METRICS[name], found[name][PLAIN, None]
        unit = metric.tolerance * plain if metric.relative else metric.tolerance
        parts.append((1 if metric.higher else -1) * (found[name][setting] - plain) / unit)
    return np.minimum.reduce([np.nan_to_num(p, nan=0.0) for p in parts])


def _chosen(
    methods: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[Setting, np.ndarray]], quality: Sequence[str]
) -> dict[str, str | None]:
    """The strength of each method: as the run states, else the most diverse one of equal quality, else the best."""
    out: dict[str, str | None] = {}
    diversity = next(iter(_diversity(found)), None)
    for method in methods:
        name, settings = method["name"], [(method["name"], s) for s in method["strengths"]]
        begun = [s for s in settings if diversity is None or s in found[diversity]]
        out[name] = method.get("chosen") or (begun or settings)[-1][1]
        if method.get("chosen") is None and diversity is not None and quality and len(begun) > 1:
            kept = {s: float(_kept(found, quality, s)[0]) for s in begun}
            equal = [s for s in begun if kept[s] >= -1]
            best = max(equal, key=lambda s: found[diversity][s][0]) if equal else max(begun, key=lambda s: kept[s])
            out[name] = best[1]
    return out


def _diversity(found: Mapping[str, Mapping[Setting, np.ndarray]]) -> list[str]:
    return [n for n in found if METRICS[n].aspect == "diversity" and METRICS[n].higher]


def _fronts(
    methods: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[Setting, np.ndarray]], quality: Sequence[str]
) -> dict[str, Any]:
    """For each score of diversity: gain at equal quality and hypervolume of each method, compared with the first one.

    ``order``: methods by their gain; ``ahead``: interval of how far the best is ahead of the next one.
    """
    out: dict[str, Any] = {}
    others = [m for m in methods if m["name"] != PLAIN]
    if not quality or not others:
        return out
    for name in _diversity(found):
        by = found[name]
        plain = by[PLAIN, None]
        if not (plain > 0).all():
            continue
        gains, volumes = {}, {}
        for method in others:
            settings = [(method["name"], s) for s in method["strengths"] if (method["name"], s) in by]
            if settings:
                gain = np.stack([np.nan_to_num(by[s] / plain - 1) for s in settings], 1)
                kept = np.stack([_kept(found, quality, s) for s in settings], 1)
                gains[method["name"]] = matched(gain, kept, loss=1.0)
                volumes[method["name"]] = hypervolume(gain, kept, depth=DEPTH)
        reference = next(iter(gains), "")
        order = sorted(gains, key=lambda m: -gains[m][0])
        ahead = [float(v) for v in np.quantile(gains[order[0]] - gains[order[1]], [0.025, 0.975])] if order[1:] else None
        out[name] = {
            "reference": reference,
            "order": order,
            "ahead": ahead,
            "methods": {
                m: {k: v for k, v in vars(s).items() if k != "method"}
                for m, s in standings(gains, volumes, reference).items()
            },
        }
    return out


def _cost(run: Run, labels: Mapping[Setting, str], shared: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """Seconds an image and peak memory: medians, and the largest."""
    records: dict[str, list[dict[str, Any]]] = {}
    wanted = set(shared)
    for record in run.records():
        setting = record["method"], record["strength"]
        if setting in labels and record["prompt"] in wanted:
            records.setdefault(labels[setting], []).append(record)
    out = {}
    for label, rows in records.items():
        seconds = [r["seconds"] for r in rows]
        added = [r["added_seconds"] for r in rows if r.get("added_seconds") is not None]
        peaks = [r["peak_bytes"] for r in rows if r.get("peak_bytes") is not None]
        out[label] = {
            "seconds": float(np.median(seconds)),
            "added_seconds": float(np.median(added)) if added else None,
            "peak_bytes": max(peaks) if peaks else None,
        }
    return out


def _missing(
    images: Mapping[Setting, Any], found: Mapping[str, Mapping[Setting, np.ndarray]], quality: Sequence[str]
) -> str:
    """What a comparison at equal quality lacks."""
    if (PLAIN, None) not in images:
        return "plain sampling"
    if not quality:
        return "a score of quality"
    return "another method" if _diversity(found) else "a score of diversity"


def _verdict(fronts: Mapping[str, Any], missing: str, quality: Sequence[str], prompts: int, settings: int) -> str:
    """One sentence on what the comparison shows."""
    if not fronts:
        return (
            f"Scores of {settings} settings on {prompts} prompts; without {missing} nothing is compared at equal quality."
        )
    name, front = next(iter(fronts.items()))
    best, *others = front["order"]
    found = front["methods"][best]
    kept = " and ".join(METRICS[q].title for q in quality)
    if not found["gain_low"] > 0:
        return f"No method has a sure gain in {METRICS[name].title} over plain sampling at equal {kept}."
    text = (
        f"At equal {kept}, {best} gains most in {METRICS[name].title}: {100 * found['gain']:+.0f}% over plain sampling "
        f"[{100 * found['gain_low']:+.0f}%, {100 * found['gain_high']:+.0f}%]"
    )
    if others:
        chance = "" if front["ahead"][0] > 0 else ", a difference that may be chance"
        text += f"; next is {others[0]} with {100 * front['methods'][others[0]]['gain']:+.0f}%{chance}"
    return text + "."
