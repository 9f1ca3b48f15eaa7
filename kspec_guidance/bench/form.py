"""A blinded form for a small user study: pairs of image sets side by side, as one static page.

The page names no method, and its images are encoded again, so that nothing in them tells where they come from. Which set is
whose stands in a file of its own, which the study keeps back. A participant's answers are saved as a JSON file;
:func:`kspec_guidance.bench.preferences.analyse` reads key and answers.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from kspec_guidance.bench.page import TEMPLATES
from kspec_guidance.bench.store import Run
from kspec_guidance.evaluation.image_sets import thumbnail
from kspec_guidance.evaluation.page import page_environment
from kspec_guidance.utils.hashing import hash_json

__all__ = ["QUESTIONS", "write_form"]

QUESTIONS = {
    "variety": "Which set is more varied?",
    "prompt": "Which set shows the text better?",
    "quality": "Which set has the better images?",
    "overall": "Which set would you rather have?",
}
SIDE = 256  # pixels of an image


def write_form(
    run: Run,
    out: str | Path,
    methods: Mapping[str, str | None] | None = None,
    items: int = 40,
    images: int = 4,
    questions: Mapping[str, str] = QUESTIONS,
    seed: int = 0,
) -> list[Path]:
    """Write ``form.html`` and ``form-key.json``.

    Every pair of methods is shown equally often, as far as the number of items allows, and prompts in turn; sides and order
    are random.

    Args:
        run: the comparison.
        out: folder; created if it does not exist.
        methods: methods to compare with the strength of each; by default all, with the chosen strength or else the last.
        items: number of comparisons in the form, at least one for each pair of methods.
        images: images of a set, at most.
        questions: text of each question, by its name.
        seed: of sides and order.

    Returns:
        The paths of both files.

    Raises:
        ValueError: for fewer than two methods, methods that the run does not have, too few items, no questions, or no
            prompt that is finished for all of them.
    """
    known = {m["name"]: m.get("chosen") or m["strengths"][-1] for m in run.settings["methods"]}
    chosen, groups = dict(known if methods is None else methods), run.groups()
    for method, strength in chosen.items():
        if (method, strength) not in groups:
            raise ValueError(f"the run has no method {method!r} with strength {strength!r}; it has {', '.join(known)}")
    pairs = list(combinations(chosen, 2))
    if not pairs or not questions:
        raise ValueError(f"a form compares at least two methods by at least one question, got {list(chosen)}")
    if items < len(pairs):
        raise ValueError(f"{len(pairs)} pairs of methods need at least as many items, got {items}")
    prompts = sorted(set.intersection(*(set(groups[m, s]) for m, s in chosen.items())))
    if not prompts:
        raise ValueError("no prompt is finished for all methods; let the run continue, then write the form")
    rng = np.random.default_rng(seed)
    turns = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-items // len(prompts)))])
    shown = [(*pairs[k % len(pairs)], prompts[turns[k]]) for k in range(items)]
    key: list[dict[str, Any]] = []
    for k in rng.permutation(items):
        first, second, prompt = shown[k]
        left, right = (first, second) if rng.random() < 0.5 else (second, first)
        key.append({"prompt": int(prompt), "left": left, "right": right})
    made_of = {k: v for k, v in run.settings.items() if k not in ("versions", "device")}
    form = hash_json([key, dict(questions), chosen, made_of], 16)
    texts = {p["index"]: p["text"] for p in run.settings["prompts"]}
    rows = []
    for item in key:
        sets = [groups[m, chosen[m]][item["prompt"]] for m in (item["left"], item["right"])]
        rows.append({"text": texts[item["prompt"]], "sides": [_uris(s, images) for s in sets]})
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    page = (
        page_environment(TEMPLATES)
        .get_template("form.html")
        .render(title="Which images are better?", items=rows, questions=questions, form=form)
    )
    (out / "form.html").write_text(page, encoding="utf-8")
    about = {"form": form, "methods": chosen, "questions": dict(questions), "items": key}
    (out / "form-key.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return [out / "form.html", out / "form-key.json"]


def _uris(images: Sequence[Any], most: int) -> list[str]:
    encoded = [thumbnail(images[i], SIDE) for i in range(min(most, len(images)))]
    return ["data:image/jpeg;base64," + base64.b64encode(e).decode() for e in encoded]
