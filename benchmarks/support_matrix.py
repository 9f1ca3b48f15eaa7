"""Which pipelines can be guided, with the evidence: writes docs/support.md and benchmarks/results/support.json.

Every pipeline class that diffusers exports is built from tiny random configurations and run on the processor: plain, at
scale 0 (bit-identical), guided (different and finite), plain again (restored), with classifier-free guidance and without,
as a batch of two prompts with two images each where the class takes one, through the callback, ``attach``, the guided
subclass and, where there are such, a block in a modular loop and the pipeline's guiders. Those with a transformer are
also guided in the spaces of its blocks. Every scheduler class gets a verdict too.

    python benchmarks/support_matrix.py [name ...]     a few minutes on two cores; names print verdicts and write nothing
    python benchmarks/support_matrix.py --spaces [name ...]     those of blocks alone, into the record
"""

import collections
import contextlib
import datetime
import inspect
import json
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from kspec_guidance.integrations.modular import insert_guidance  # noqa: E402
from kspec_guidance.loop.prediction import PARAMETRISATIONS, UnsupportedSchedulerError, parametrisation_of  # noqa: E402
from tests.tiny import builders, families, pipeline_checks, scheduler_checks  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "support.json"
LIMIT = 120  # seconds for one class
NEEDS = re.compile(r"dummy_(\w+)_objects")
STEP_CALLS = ("scheduler.step", "generation_pipe", "decoder_pipe")  # combined pipelines call others


def hooked(name: str, reason: str) -> pipeline_checks.Verdict:
    """Static evidence: the source calls a scheduler's step, and may take callbacks."""
    cls = getattr(diffusers, name)
    if "ModularPipeline" in name:  # its blocks are in other modules
        ways = ["attach", "guided"]
        with contextlib.suppress(ValueError):  # its steps are inside a block
            insert_guidance(cls().blocks)
            ways.append("modular block")
        return pipeline_checks.Verdict(name, "hooked", ways=ways, reason=reason)
    if NEEDS.search(cls.__module__):  # a placeholder for a class whose package is not installed
        return pipeline_checks.Verdict(name, "hooked", ways=["attach", "guided"], reason=reason)
    text = inspect.getsource(sys.modules[cls.__module__])
    if not any(call in text for call in STEP_CALLS):
        return pipeline_checks.Verdict(name, "failed", reason="its source calls no scheduler's step")
    ways = (["callback"] if "callback_on_step_end" in text else []) + ["attach", "guided"]
    return pipeline_checks.Verdict(name, "hooked", ways=ways, reason=reason)


def verdict(name: str) -> pipeline_checks.Verdict:
    cls = getattr(diffusers, name)
    rule = families.rule_for(name)
    missing = NEEDS.search(cls.__module__)
    if missing:
        needed = [w for w in missing.group(1).split("_and_") if w not in ("torch", "transformers")]
        return hooked(name, f"not run: it needs {', '.join(needed)}, which is not installed here")
    if rule.unguidable:
        return pipeline_checks.Verdict(name, "not applicable", reason=rule.unguidable)
    if rule.not_run:
        return hooked(name, f"not run: {rule.not_run}")
    if "ModularPipeline" in name and name not in builders.MODULAR:
        return hooked(name, "not run: no tiny build of its components yet")
    try:
        found = pipeline_checks.check_pipeline(name)
        found.spaces = spaces(name)
        return found
    except UnsupportedSchedulerError as error:
        return pipeline_checks.Verdict(name, "not applicable", reason=str(error))
    except LookupError as error:
        return hooked(name, f"not run: no tiny build of its components yet ({str(error)[:90]})")
    except AssertionError as error:
        return pipeline_checks.Verdict(name, "failed", reason=str(error)[:200])
    except Exception as error:
        return hooked(
            name, f"not run: its tiny build does not run yet ({type(error).__name__}: {' '.join(str(error).split())[:110]})"
        )


def spaces(name: str) -> list[str]:
    """The spaces of transformer blocks in which a class is guided; prints why not where that is not that it has none."""
    try:
        found, reason = pipeline_checks.check_spaces(name)
    except Exception as error:
        found, reason = [], f"{type(error).__name__}: {error}"
    if reason and "diffusers registers" not in reason:
        print(f"     {name} in spaces of blocks: {' '.join(reason.split())[:160]}", flush=True)
    return found


def all_verdicts(names: list[str]) -> list[dict[str, Any]]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    signal.signal(signal.SIGALRM, late)
    found = []
    for k, name in enumerate(names):
        signal.alarm(LIMIT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = verdict(name)
        signal.alarm(0)
        kind = ""
        if result.scheduler:
            kind = type(parametrisation_of(scheduler_checks.build_scheduler(result.scheduler))).__name__
        found.append({"family": pipeline_checks.family_of(getattr(diffusers, name)), "kind": kind, **result.as_dict()})
        print(
            f"{k + 1:4d}/{len(names)} {name:52s} {result.evidence:14s} {result.layout:9s} {result.seconds:5.1f} s  "
            f"{result.reason[:80]}",
            flush=True,
        )
    return found


INTRODUCTION = """# What is supported

Which pipelines and schedulers of diffusers can be guided, and how that was found out.
Written by `python benchmarks/support_matrix.py` for diffusers {diffusers}, {date}. Every class named *run* was built
from tiny random configurations and run: plain, at scale 0 (bit-identical to plain), guided (different, finite), plain
again (restored), with classifier-free guidance and without, through every way in that is listed. *hooked* means that
its loop calls `scheduler.step` in its source, but was not run here, for the reason given (where its
package is not installed, the source was not seen either). *not applicable* has no
step that could be guided. *Parametrisation* is a class of `kspec_guidance.loop.prediction`, see below.
"""
WAYS = """
Ways in: *callback* is `callback_on_step_end=guide`, from the second step on; *callback (no prompts)*: the class
hides its prompts from callbacks, so a warning is issued and all images count as images of one prompt; *attach* is
`with guide.attach(pipe):`; *guided* is `guided(PipelineClass)`; *modular block* is `insert_guidance(blocks, guide)`;
*guider* is `KernelGuider(inner, guide)` around each of the pipeline's guiders; the largest difference of
the outputs of {guiders} pipelines from those with *attach* is {difference:.1g}.
*Spaces of blocks* are those of [`block` and `context`](pipelines.md#inside-transformer-blocks) in which the class was
guided through *attach*, with a row of features in memory for each guided step, and bit-identical to plain at scale 0;
UNets, transformers whose blocks are unknown and calls with three predictions a sample have none, and `context` needs text
tokens that a further block reads.
*Prompt encoder* is what prompt features are read from; those *with padding* are means over all tokens. The batch is the
number of samples in one call; the memory holds one row for each, as is checked here (Marigold: one for each member of
an ensemble; Text2Video-Zero: one for a clip). LoRA, IP-Adapter, several
ControlNets and the hand-over from a base model to a refiner are run in
[tests/loop/test_scheduler_hook.py](../tests/loop/test_scheduler_hook.py).

## Pipelines that were run
"""
SCHEDULERS = """
## Schedulers

x0 is recovered from the model output m and the noisy sample x as `x0 = A x + B m`, with A and B from the scheduler's
parametrisation:

{parametrisations}

It was compared with what the scheduler itself predicts, converts or ends at. The error is the largest difference relative
to x0. At scale 0 all runs are bit-identical.
"""


def parametrisations() -> str:
    """A list of the parametrisation classes with the first lines of their docstrings."""
    classes = dict.fromkeys(type(found) for found in PARAMETRISATIONS.values())
    return "\n".join(f"* `{cls.__name__}`: {inspect.getdoc(cls).splitlines()[0]}".replace("``", "`") for cls in classes)


def page(record: dict[str, Any]) -> str:
    """docs/support.md."""
    rows, counts = record["pipelines"], record["counts"]
    differences = [r["checks"]["guider less attach"] for r in rows if "guider less attach" in r["checks"]]
    lines = [
        INTRODUCTION.format(**record),
        "| run | hooked | not applicable | in all |",
        "|---|---|---|---|",
        f"| {counts['run']} | {counts['hooked']} | {counts['not applicable']} | {len(rows)} |",
        WAYS.format(guiders=len(differences), difference=max(differences)),
        "| class | family | scheduler | parametrisation | layout | prompt encoder | ways in | spaces of blocks | batch "
        "| without guidance |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["evidence"] == "run":
            off = r["checks"].get("guidance off", "-")
            note = f" ({r['checks']['callback']})" if "callback" in r["checks"] else ""
            cells = [
                r["name"],
                r["family"],
                r["scheduler"].removesuffix("Scheduler"),
                r["kind"],
                r["layout"],
                r["prompts"] or "-",
            ]
            cells += [", ".join(r["ways"]) + note, ", ".join(r["spaces"]) or "-", str(r["checks"]["batch"]), off]
            lines.append(f"| {' | '.join(cells)} |")
    for title, evidence in (("Hooked, not run", "hooked"), ("Not applicable", "not applicable"), ("Failed", "failed")):
        chosen = [r for r in rows if r["evidence"] == evidence]
        if chosen:
            lines += ["", f"## {title}", "", "| class | family | ways in | reason |", "|---|---|---|---|"]
            lines += [
                f"| {r['name']} | {r['family']} | {', '.join(r['ways']) or '-'} | {r['reason'].replace('|', '/')} |"
                for r in chosen
            ]
    lines += [
        SCHEDULERS.format(parametrisations=parametrisations()),
        "| scheduler | parametrisation | prediction types | compared with | largest error |",
        "|---|---|---|---|---|",
    ]
    for s in record["schedulers"]:
        if s["evidence"] == "not applicable":
            lines.append(f"| {s['name']} | - | - | not applicable: {s['reason']} | - |")
        else:
            lines.append(
                f"| {s['name']} | {s['kind']} | {', '.join(s['predictions'])} | {s['evidence']} | {s['error']:.0e} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    diffusers.logging.set_verbosity(50)
    transformers.logging.set_verbosity(50)
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    names = builders.pipeline_names()
    if sys.argv[1:2] == ["--spaces"]:
        record, patterns = json.loads(RECORD.read_text()), sys.argv[2:] or ["."]
        for row in record["pipelines"]:
            if row["evidence"] == "run" and any(re.search(p, row["name"]) for p in patterns):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row["spaces"] = spaces(row["name"])
        write(record)
        return
    if len(sys.argv) > 1:
        all_verdicts([n for n in names if any(re.search(p, n) for p in sys.argv[1:])])
        return
    rows = all_verdicts(names)
    schedulers = []
    for name in scheduler_checks.scheduler_names():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedulers.append(scheduler_checks.check_scheduler(name).as_dict())
    for row in rows:
        row["seconds"] = round(row["seconds"], 1)
    counts = collections.Counter(r["evidence"] for r in rows)
    record = {
        "date": datetime.date.today().isoformat(),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "counts": {k: counts.get(k, 0) for k in ("run", "hooked", "not applicable", "failed")},
        "pipelines": rows,
        "schedulers": schedulers,
    }
    write(record)
    print(record["counts"])


def write(record: dict[str, Any]) -> None:
    """Write the record and its page."""
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    (ROOT / "docs" / "support.md").write_text(page(record))


if __name__ == "__main__":
    main()
