"""What the participants of a blinded comparison prefer: Bradley-Terry strengths with intervals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kspec_guidance.bench.fronts import DRAWS, resampled
from kspec_guidance.bench.store import PLAIN
from kspec_guidance.bench.tables import Cell, Table

__all__ = ["PRIOR", "analyse", "analyse_folder", "bradley_terry", "preference_table", "read_answers"]

PRIOR = 0.5  # wins in either direction that are added to each pair that was compared
STEPS, CLOSE = 2000, 1e-10
CHOICES = ("left", "right", "equal")


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """Log strengths ``[..., m]`` with mean 0, of which ``P(i beats j) = 1 / (1 + exp(s_j - s_i))`` (Bradley, Terry 1952).

    The maximum of the likelihood with ``prior`` wins added in both directions of each pair that was compared, which keeps
    strengths finite if a method wins always. Found by the fixed-point iteration of Hunter (2004).

    Args:
        wins: ``[..., m, m]``, how often the method of the row was preferred to that of the column; ties count as half a
            win of each.
        prior: at least 0.

    Raises:
        ValueError: for negative or unknown numbers, or methods that no chain of comparisons connects.

    >>> bradley_terry(np.array([[0, 6], [2, 0]]), prior=0).round(3)  # log(6 / 2) apart
    array([ 0.549, -0.549])
    """
    wins = np.asarray(wins, float)
    m = wins.shape[-1]
    if wins.shape[-2] != m or not np.isfinite(wins).all() or (wins < 0).any():
        raise ValueError(f"wins must be a matrix of numbers of at least 0, got shape {list(wins.shape)}")
    compared = (wins + wins.swapaxes(-1, -2)).reshape(-1, m, m).sum(0) > 0
    reached = np.linalg.matrix_power(compared + np.eye(m), m) > 0
    if not reached.all():
        raise ValueError("some methods were never compared with the others, not even through a third one")
    wins = wins + prior * (compared & ~np.eye(m, dtype=bool))
    count, own = wins + wins.swapaxes(-1, -2), wins.sum(-1)
    p = np.ones(wins.shape[:-1])
    for _ in range(STEPS):
        new = own / (count / (p[..., :, None] + p[..., None, :])).sum(-1)
        new = new / np.exp(np.log(new).mean(-1, keepdims=True))
        done = np.abs(new / p - 1).max() < CLOSE
        p = new
        if done:
            break
    return np.log(p)


def read_answers(path: str | Path) -> dict[str, Any]:
    """The answers of one participant, from the file that the form saves.

    Raises:
        ValueError: if the file is none of a form.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        _ = found["form"], found["participant"], [(a["item"], a["answers"].items()) for a in found["answers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no answers to a form ({error}); pass the files that the form has saved") from None
    return found


def analyse(key: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Strengths of the methods for each question, with 95% intervals from a bootstrap over participants and items.

    Args:
        key: what ``form-key.json`` holds.
        answers: of each participant, see :func:`read_answers`; some may be missing.

    Returns:
        Plain values: ``participants``; for each question ``answers``, and for each method its log ``strength`` with ``low``
        and ``high``, ``preferred``: how probably it is preferred to plain sampling, or to the first method without it, with
        interval, and ``wins``, ``losses``, ``ties``.

    Raises:
        ValueError: without answers, for two files of one participant, answers to another form, unknown items or choices, or
            methods that no chain of answers connects.
    """
    methods, items = list(key["methods"]), key["items"]
    names = [found["participant"] for found in answers]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"several files are of the same participant: {', '.join(sorted(repeated))}; pass the last of each")
    for found in answers:
        if found["form"] != key["form"]:
            raise ValueError(f"answers to the form {found['form']!r}, and the key is that of {key['form']!r}")
    reference = PLAIN if PLAIN in methods else methods[0]
    people, of_items = resampled(max(1, len(answers)), len(items), DRAWS)
    out: dict[str, Any] = {"participants": len(answers), "reference": reference, "questions": {}}
    for question in key["questions"]:
        wins = np.zeros((DRAWS, len(methods), len(methods)))
        counts = {m: {"wins": 0, "losses": 0, "ties": 0} for m in methods}
        total = 0
        for person, found in enumerate(answers):
            for answer in found["answers"]:
                choice, item = answer["answers"].get(question), answer["item"]
                if choice is None:
                    continue
                if choice not in CHOICES or not isinstance(item, int) or not 0 <= item < len(items):
                    known = f"choices are {', '.join(CHOICES)}, items 0 to {len(items) - 1}"
                    raise ValueError(f"answer {choice!r} to item {item!r}; {known}")
                left, right = items[item]["left"], items[item]["right"]
                a, b = methods.index(left), methods.index(right)
                weight = people[:, person] * of_items[:, item] * len(answers) * len(items)
                share = {"left": 1.0, "right": 0.0, "equal": 0.5}[choice]
                wins[:, a, b] += share * weight
                wins[:, b, a] += (1 - share) * weight
                for m, won in ((left, share), (right, 1 - share)):
                    counts[m]["ties" if won == 0.5 else "wins" if won else "losses"] += 1
                total += 1
        if not total:
            raise ValueError(f"nobody has answered the question {question!r}")
        s = bradley_terry(wins)
        against = 1 / (1 + np.exp(s[:, [methods.index(reference)]] - s))
        out["questions"][question] = {
            "answers": total,
            "methods": {
                m: {**_interval("strength", s[:, k]), "preferred": _interval("value", against[:, k]), **counts[m]}
                for k, m in enumerate(methods)
            },
        }
    return out


def analyse_folder(folder: str | Path, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same with the key that :func:`~kspec_guidance.bench.form.write_form` has written into a folder.

    Raises:
        ValueError: if the folder has no key, or as :func:`analyse`.
    """
    path = Path(folder) / "form-key.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: it tells which set of the form is whose; copy it there")
    return analyse(json.loads(path.read_text(encoding="utf-8")), answers)


def preference_table(found: Mapping[str, Any]) -> Table:
    """How probably each method is preferred to the reference, for each question.

    Args:
        found: of :func:`analyse`.
    """
    questions, reference = found["questions"], found["reference"]
    methods = next(iter(questions.values()))["methods"]
    rows = []
    for method in methods:
        if method != reference:
            v = [q["methods"][method]["preferred"] for q in questions.values()]
            cells = [Cell(f"{100 * x['value']:.0f}%", f"{100 * x['low']:.0f}%, {100 * x['high']:.0f}%") for x in v]
            rows.append((method, cells))
    about = (
        f"How probably a participant prefers a method's images to those of {reference} (Bradley-Terry, 95%), of "
        f"{found['participants']} participants."
    )
    return Table("What people prefer", about, ["method", *questions], rows)


def _interval(name: str, draws: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {name: float(draws[0]), "low": float(low), "high": float(high)}
