"""The command ``kspec-guidance bench``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kspec_guidance.cli.arguments import (
    DTYPES,
    GUIDANCE,
    IMAGES,
    OUTPUT,
    PIPELINE,
    PROMPTS,
    Device,
    Json,
    Option,
    Quiet,
    Seed,
    Version,
    finite,
    folder_option,
    load_pipeline,
    named,
    read_options,
    usable_device,
)
from kspec_guidance.cli.console import Output, command_output

__all__ = ["bench"]

SUITE_NAMES, OFFLOAD_NAMES = ("quick", "paper"), ("auto", "none", "model", "sequential")
SCORES, PROCESSES = "Scores", "Several processes"
DEFAULTS: dict[str, Any] = {"methods": "plain,sparke", "prompts": "bundled:24", "images": 4, "sweep": False}


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="demo, sd-1.5, sdxl, sd-3.5-medium, flux-dev and others (docs/bench.md), a diffusers folder, or a hub id.",
            rich_help_panel=PIPELINE,
        ),
    ] = "demo",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, each with its strengths if wanted: plain,sparke@25/50,cads. By default plain,sparke.",
            rich_help_panel=GUIDANCE,
        ),
    ] = None,
    sweep: Annotated[
        bool | None, typer.Option("--sweep/--no-sweep", help="Run methods at several strengths.", rich_help_panel=GUIDANCE)
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Folder of images whose style method mmd takes on.", rich_help_panel=GUIDANCE, exists=True),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="bundled, coco, geneval, drawbench, parti, dpg, imagenet, dimcim, concepts, or a file; the first N with "
            ":N. By default bundled:24.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    prompts_from: Annotated[
        str | None,
        typer.Option(
            help="Where the published file of --prompts is: its path, its folder (by default this one), or a data set.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Methods, prompts, images and sweep in place of the defaults: quick, or paper.",
            rich_help_panel=PROMPTS,
            callback=named(*SUITE_NAMES),
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            "--images-per-prompt", "--images", min=2, help="Images per prompt; 4 by default.", rich_help_panel=IMAGES
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "--batch", min=1, help="Images at once; all of a prompt by default.", rich_help_panel=IMAGES
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; those of the model by default.", rich_help_panel=PIPELINE)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance; that of the model by default.", rich_help_panel=PIPELINE, callback=finite
        ),
    ] = None,
    option: Option = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; that of the model by default.",
            rich_help_panel=PIPELINE,
            callback=named(*DTYPES),
        ),
    ] = None,
    device: Device = None,
    offload: Annotated[
        str,
        typer.Option(
            help="Where weights are kept: none (on the GPU), model (the part that works), sequential (slow), auto.",
            rich_help_panel=PIPELINE,
            callback=named(*OFFLOAD_NAMES),
        ),
    ] = "auto",
    seed: Seed = 0,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated scores; by default all that can be had.", rich_help_panel=SCORES)
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            help="What tells whether an image shows its prompt: demo (emoji), clip, or auto (demo for the embedded model).",
            rich_help_panel=SCORES,
            callback=named("auto", "demo", "clip"),
        ),
    ] = "auto",
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of real images, for the scores that need them.", rich_help_panel=SCORES, exists=True),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Let scores download their networks from the hub.", rich_help_panel=SCORES)
    ] = False,
    compare_with: Annotated[
        list[str] | None,
        typer.Option(
            help="Print our figures beside those of a paper, e.g. sparke-table-1; may be repeated.", rich_help_panel=SCORES
        ),
    ] = None,
    form: Annotated[
        bool,
        typer.Option("--form", help="Also write a blinded form for people, and its key.", rich_help_panel=SCORES),
    ] = False,
    answers: Annotated[
        list[Path] | None,
        typer.Option(help="Answers to the form, one file a person; may be repeated.", rich_help_panel=SCORES, exists=True),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: plan for this many processes.", rich_help_panel=PROCESSES),
    ] = None,
    out: Annotated[
        Path, folder_option("Folder for images, scores and page; a run in it that was broken off goes on.")
    ] = Path("outputs/bench"),
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print images, hours and gigabytes; write nothing.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Compare methods on one model, prompts and seeds, with the scores and the page that reviewers ask for.

    The same command continues a run that was broken off. Several GPUs:
    torchrun --nproc-per-node 2 -m kspec_guidance bench ...
    """
    if processes is not None and not dry_run:
        raise ValueError(
            f"--processes is for --dry-run; to start several: torchrun --nproc-per-node {processes} -m kspec_guidance "
            "bench ..."
        )
    given: dict[str, Any] = {"methods": methods, "prompts": prompts, "images": images, "sweep": sweep}
    with command_output(as_json, quiet) as output:
        import torch

        from kspec_guidance.bench.compare import Job, compare, plan
        from kspec_guidance.bench.models import choose_offload, find_recipe, place
        from kspec_guidance.bench.plan import SUITES, choose_methods
        from kspec_guidance.bench.prompts import read_bench_prompts

        wanted = _Wanted.of(out, metrics, judge, reference, download, compare_with or [], form, answers or [])
        settings = DEFAULTS | SUITES.get(suite or "", {}) | {k: v for k, v in given.items() if v is not None}
        recipe, own = find_recipe(model)
        if not own:
            output.note(f"settings are those of another {recipe.pipeline}; look at --steps and --guidance-scale")
        where = torch.device(usable_device(device))
        recipe = replace(recipe, dtype=dtype or ("float32" if where.type == "cpu" else recipe.dtype))
        call = _call(recipe, steps, guidance_scale, option)
        if recipe.guidance is not None and call[recipe.guidance] <= 1:
            recipe = replace(recipe, has=recipe.has - {"guidance"})
        names = settings["methods"]
        if methods is None:
            names = _fitting(output, names, recipe)
        chosen = choose_methods(names, recipe, settings["sweep"], like is not None)
        texts = read_bench_prompts(settings["prompts"], prompts_from)
        size = min(batch_size or settings["images"], settings["images"])
        mode = choose_offload(recipe, where, size, offload)
        output.note(f"loading model {recipe.model}" + (f" with --offload {mode}" if mode != "none" else "") + " ...")
        pipe = _loaded(recipe)
        place(pipe, where, mode)
        _note_unknown_words(output, pipe, [p.text for p in texts])
        latents = _encoded(pipe, like, call)
        baseline = _baseline(output, pipe, chosen, call, size, latents, dry_run)
        job = Job(pipe, recipe, texts, chosen, settings["images"], size, seed, call, latents, baseline)
        if dry_run:
            found = plan(job, out, processes)
            output.result(asdict(found) | {"hours": found.hours}, _plan_table(found), str(found))
            return
        output.kept = f"finished images in {out} are kept; run the same command again to continue"
        with output.counter("images") as show:
            made = compare(job, out, show)
        if not made.first:
            return
        output.note(f"{made.made} images made in {made.seconds:.0f} s")
        del pipe, job
        _judge(output, made, out, wanted, str(where))


def _loaded(recipe: Any) -> Any:
    """The pipeline of a recipe, in the memory of the machine."""
    try:
        return load_pipeline(recipe.model, recipe.dtype, "cpu")
    except ValueError as error:
        if recipe.gated:
            page = f"huggingface.co/{recipe.model}"
            raise ValueError(f"{error}; it asks for your consent at {page}, and for a token: hf auth login") from error
        raise


def _call(recipe: Any, steps: int | None, guidance_scale: float | None, option: list[str] | None) -> dict[str, Any]:
    """Arguments of the pipeline's calls: those of the recipe, and in their place those of the options."""
    call = dict(recipe.call)
    if steps is not None:
        call["num_inference_steps"] = steps
    if guidance_scale is not None:
        name = recipe.guidance or next((k for k in call if k == "guidance_scale"), None)
        if name is None:
            raise ValueError(f"{recipe.pipeline} has no known argument for --guidance-scale; give it with --option")
        call[name] = guidance_scale
    return call | read_options(option)


def _fitting(output: Output, names: str, recipe: Any) -> str:
    """The methods of a suite that a model can run."""
    from kspec_guidance.bench.methods import CODES
    from kspec_guidance.bench.plan import unfit

    reasons = {code: unfit(CODES[code], recipe) for code in names.split(",")}
    for code, reason in reasons.items():
        if reason is not None:
            output.note(f"without {code}: it {reason}")
    return ",".join(code for code, reason in reasons.items() if reason is None)


def _note_unknown_words(output: Output, pipe: Any, texts: Sequence[str]) -> None:
    from kspec_guidance.demo.pipeline import unknown_words

    unknown = [text for text in texts if unknown_words(pipe, text)]
    if unknown:
        output.warning(
            f"the embedded model knows the names of emoji only: {len(unknown)} of {len(texts)} prompts have words that it "
            f"never saw, for instance {unknown[0]!r}; bundled:24 has none"
        )


def _encoded(pipe: Any, like: Path | None, call: dict[str, Any]) -> Any:
    """Latents of reference images, in the size of the images that are made."""
    from kspec_guidance import encode_reference

    size = (call["height"], call["width"]) if {"height", "width"} <= set(call) else None
    return None if like is None else encode_reference(pipe, like, size=size)


def _baseline(
    output: Output, pipe: Any, chosen: Sequence[Any], call: dict[str, Any], size: int, reference: Any, dry_run: bool
) -> Any:
    """Samples of the pipeline without guidance, if a method compares the references with them."""
    from kspec_guidance.baseline import baseline_left, make_baseline
    from kspec_guidance.bench.methods.guides import TowardReference

    counts = [choice.method().baseline_samples for choice in chosen if issubclass(choice.method, TowardReference)]
    if reference is None or not counts:
        return reference
    if dry_run:  # references stand for the baseline
        left = baseline_left(pipe, n=max(counts), call=call)
        if left:
            output.note(
                f"before that, {left} images without guidance are made as a baseline, once for this model and settings"
            )
        return reference
    output.note("making the baseline: images of many prompts without guidance, once for this model and settings ...")
    with output.counter("baseline") as show:
        return make_baseline(pipe, n=max(counts), batch_size=size, call=call, progress_callback=show)


def _plan_table(found: Any) -> Table:
    table = Table(title="seconds an image")
    table.add_column("method")
    table.add_column("seconds", justify="right")
    table.add_column("beside plain", justify="right")
    plain = found.seconds.get("plain")
    for method, seconds in found.seconds.items():
        table.add_row(method, f"{seconds:.3g}", "" if plain is None else f"{seconds / plain - 1:+.0%}")
    return table


@dataclass(frozen=True)
class _Wanted:
    """What is done with the images, checked before any is made.

    Attributes:
        scores: names of scores; None for all.
        emoji: whether the emoji classifier judges the images; None if it depends on the model.
        reference: folder of real images.
        download: whether scores may download their networks.
        papers: names of tables of papers.
        form: whether to write a blinded form.
        preferences: what the participants of a form prefer; None without answers.
    """

    scores: list[str] | None
    emoji: bool | None
    reference: Path | None
    download: bool
    papers: list[str]
    form: bool
    preferences: dict[str, Any] | None

    @classmethod
    def of(
        cls, out: Path, metrics: str | None, judge: str, reference: Path | None, download: bool, papers: Sequence[str],
        form: bool, answers: Sequence[Path],
    ) -> "_Wanted":  # fmt: skip
        """From the options of the command."""
        from kspec_guidance.bench.judge import wanted_scores
        from kspec_guidance.bench.preferences import analyse_folder, read_answers
        from kspec_guidance.bench.targets import figures

        scores = None if metrics is None else [name.strip() for name in metrics.split(",")]
        wanted_scores(scores, reference)
        for name in papers:
            figures(name)
        people = [read_answers(path) for path in answers]
        emoji = None if judge == "auto" else judge == "demo"
        preferences = analyse_folder(out, people) if people else None
        return cls(scores, emoji, reference, download, list(papers), form, preferences)


def _judge(output: Output, made: Any, out: Path, wanted: _Wanted, device: str) -> None:
    """Score the images, and write the page."""
    from kspec_guidance.bench.form import write_form
    from kspec_guidance.bench.judge import judge
    from kspec_guidance.bench.page import write

    output.kept = f"all images are in {out}; run the same command again to score them"
    results = judge(
        made.run, wanted.scores, wanted.reference, device, wanted.download, lambda title: output.note(f"scoring: {title}"),
        wanted.emoji,
    )  # fmt: skip
    results |= {"failed": made.failed, "compare_with": wanted.papers}
    if wanted.preferences is not None:
        results["preferences"] = wanted.preferences
    output.wrote(*write(results, made.run, out))
    if wanted.form:
        output.wrote(*write_form(made.run, out))
    output.result(results, results["verdict"])
