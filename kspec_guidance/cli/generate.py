"""The command ``kspec-guidance generate``."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kspec_guidance.cli.arguments import (
    ENGINES,
    FORMATS,
    GUIDANCE,
    IMAGES,
    MEMORY_KINDS,
    OUTPUT,
    PROMPTS,
    SELECT,
    BatchSize,
    Device,
    Dtype,
    GuidanceScale,
    ImagesPerPrompt,
    Json,
    Model,
    Option,
    Prompts,
    PromptTexts,
    Quiet,
    Scale,
    Steps,
    Variety,
    Version,
    check_prompt_source,
    check_strength,
    file_option,
    finite,
    folder_option,
    load_pipeline,
    named,
    read_options,
    read_pairs,
)
from kspec_guidance.cli.console import Output, command_output

__all__ = ["generate"]

PROCESSES, PUBLISHING = "Processes", "Publishing"
WITH_REPRODUCE = (
    "reproduce", "out", "model", "device", "report", "force", "join", "sign", "no_sign", "as_json", "quiet", "version",
)  # fmt: skip


def _toward(
    output: Output, pipe: Any, folder: Path, scale: float | None, early: bool, captions: list[str] | None,
    call: dict[str, Any], batch_size: int,
) -> Any:  # fmt: skip
    """A guide toward the images of a folder, with the pipeline's baseline."""
    from kspec_guidance import toward_reference

    output.note("making the baseline: images of many prompts without guidance, once for this model and settings ...")
    settings = _given_values(call)
    with output.counter("baseline") as show:
        return toward_reference(
            pipe, folder, scale, call=settings, captions=captions, early=early, batch_size=batch_size,
            progress_callback=show,
        )  # fmt: skip


def _given_values(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if value is not None}


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, and does not have its default."""
    return str(getattr(context.get_parameter_source(name), "name", "")) not in ("DEFAULT", "DEFAULT_MAP")


def _check_alone(context: typer.Context) -> None:
    """Refuse options that say again, or otherwise, what reproduce.yaml says.

    Raises:
        ValueError: naming them.
    """
    others = [name for name in context.params if name not in WITH_REPRODUCE and _given(context, name)]
    if others:
        listed = ", ".join("prompts" if name == "prompt" else "--" + name.replace("_", "-") for name in others)
        raise ValueError(f"--reproduce takes all settings of the images from its file; leave out {listed}")


def _reproduce(
    output: Output,
    path: Path,
    out: Path | None,
    model: str | None,
    device: str | None,
    report: bool,
    force: bool,
    join: str | None,
    sign: str | None,
) -> None:
    """Make a set again, and print how many images are as before; with ``join``, work in the run of the recipe."""
    from kspec_guidance.synthesis.api import reproduce
    from kspec_guidance.synthesis.reproduction import read_recipe

    about = read_recipe(path).model
    name = model or str(about.get("name"))
    output.note(f"loading model {name} ...")
    dtype = str(about.get("dtype")).removeprefix("torch.")
    pipe = load_pipeline(name, dtype, device, about.get("revision") if model is None else None)
    output.kept = f"finished images in {out or join} are kept; run the same command again to resume"
    with output.synthesis_progress() as show:
        result = reproduce(path, out, pipe, report=report, force=force, progress_callback=show, join=join, sign=sign)
    _print_result(output, result)


def _print_result(output: Output, result: Any) -> None:
    if result.first:
        if result.report is not None:
            output.wrote(result.report)
        record = asdict(result)
        del record["first"]
        output.result(record, str(result))


def generate(
    context: typer.Context,
    prompt: PromptTexts = None,
    prompts: Prompts = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(
            help="group=number: images of a group of prompts, instead of --images-per-prompt.", rich_help_panel=PROMPTS
        ),
    ] = None,
    model: Model = "demo",
    dtype: Dtype = "float32",
    device: Device = None,
    guidance_scale: GuidanceScale = 5.0,
    steps: Steps = 20,
    option: Option = None,
    images_per_prompt: ImagesPerPrompt = 8,
    batch_size: BatchSize = 8,
    seed: Annotated[
        int,
        typer.Option(help="Seed of the run, from which the seeds of images are derived.", rich_help_panel=IMAGES),
    ] = 0,
    target: Annotated[
        str | None,
        typer.Option(
            help="'6 of 8': raise the strength of a prompt from batch to batch until of 8 images 6 look different. "
            "'vendi>=12': stop a prompt early.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    filter: Annotated[
        list[str] | None,
        typer.Option(
            help="blur<=0.6, agreement>=25, nsfw<=0.2:transformers:MODEL:LABEL, aesthetic>=5:module:function, or "
            "module:function, called with image and row; True keeps, False or a reason drops.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    duplicates: Annotated[
        float | None,
        typer.Option(help="Drop images with at least this cosine to a kept one, e.g. 0.98.", rich_help_panel=IMAGES),
    ] = None,
    semantic_duplicates: Annotated[
        float | None,
        typer.Option(
            help="At the end, list images with at least this cosine to an earlier one of any prompt, e.g. 0.95.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    drop: Annotated[
        Path | None,
        file_option("File of names of finished images, one a line, to leave out; others are made in their place.", IMAGES),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(min=1, help="Images made for each kept one; the most diverse one is kept.", rich_help_panel=IMAGES),
    ] = 1,
    start_candidates: Annotated[
        int,
        typer.Option(
            min=1,
            help="Noises for each image; the one with the most diverse first prediction is used. For few steps.",
            rich_help_panel=IMAGES,
        ),
    ] = 1,
    variety: Variety = None,
    scale: Scale = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images whose style or domain to take on; 20 to 50 are enough.",
            rich_help_panel=GUIDANCE,
            exists=True,
        ),
    ] = None,
    like_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Strength of --like: 1 by default, 2 for nearly all of a style.",
            rich_help_panel=GUIDANCE,
            callback=finite,
        ),
    ] = None,
    like_early: Annotated[
        bool,
        typer.Option(
            "--like-early",
            help="Few large moves of --like at the start: more of a style, at --like-scale 3, below 8 steps 2.",
            rich_help_panel=GUIDANCE,
        ),
    ] = False,
    like_captions: Annotated[
        bool,
        typer.Option(
            "--like-captions",
            help="Compare prompts with images of --like of similar captions: metadata.jsonl, or texts beside the images.",
            rich_help_panel=GUIDANCE,
        ),
    ] = False,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            help="name=folder:share: share of images to keep near a reference set; two or more sets.",
            rich_help_panel=GUIDANCE,
        ),
    ] = None,
    arms: Annotated[
        Path | None,
        file_option(
            "TOML file of settings or models, a table for each arm, among which --select chooses for each batch.", IMAGES
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help=f"With --arms: {', '.join(SELECT)}; mixture-greedy by default.",
            rich_help_panel=IMAGES,
            callback=named(*SELECT),
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="With --arms: a judge of images and prompts (demo, open_clip:NAME:FILE_OR_TAG, transformers:FOLDER), or "
            "module:function of image and row, whose number --select compares.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            help="Kind of memory: auto, exact or centroids.", rich_help_panel=GUIDANCE, callback=named(*MEMORY_KINDS)
        ),
    ] = "auto",
    memory_by: Annotated[
        str,
        typer.Option(
            help="One memory for 'all' prompts, or one per 'group'.",
            rich_help_panel=GUIDANCE,
            callback=named("all", "group"),
        ),
    ] = "all",
    memory_file: Annotated[
        Path | None,
        typer.Option(
            help="Memory file: read if it exists, and written at the end with the new images.",
            rich_help_panel=GUIDANCE,
            dir_okay=False,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="With --dry-run: plan for this many processes.", rich_help_panel=PROCESSES),
    ] = None,
    exchange: Annotated[
        int,
        typer.Option(min=1, help="Batches between two exchanges of the processes' memories.", rich_help_panel=PROCESSES),
    ] = 8,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Worker processes, which share out groups of similar prompts. Each may end at any time.",
            rich_help_panel=PROCESSES,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help=f"With --workers: {', '.join(ENGINES)}.", rich_help_panel=PROCESSES, callback=named(*ENGINES)),
    ] = "processes",
    join: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL (s3://bucket/run) of a run that any number of such commands share at any time; with "
            "--out, the set is made there at the end.",
            rich_help_panel=PROCESSES,
        ),
    ] = None,
    lease_seconds: Annotated[
        float,
        typer.Option(min=0.1, help="After which a worker that shows no life counts as dead.", rich_help_panel=PROCESSES),
    ] = 120.0,
    out: Annotated[Path, folder_option("Folder for images and metadata; an interrupted run in it is resumed.")] = Path(
        "outputs/images"
    ),
    format: Annotated[
        str, typer.Option(help=f"{', '.join(FORMATS)}.", rich_help_panel=OUTPUT, callback=named(*FORMATS))
    ] = "imagefolder",
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images in a shard of webdataset or parquet.", rich_help_panel=OUTPUT)
    ] = 1000,
    licence: Annotated[
        str | None,
        typer.Option(
            help="Licence of the images, an SPDX identifier such as CC0-1.0, for metadata, marks and card.",
            rich_help_panel=PUBLISHING,
        ),
    ] = None,
    marks: Annotated[
        bool,
        typer.Option(
            help="Write into each image that a model made it (IPTC digital source type).", rich_help_panel=PUBLISHING
        ),
    ] = True,
    sign: Annotated[
        str,
        typer.Option(
            help="C2PA manifests in images, signed with a PEM file of certificates and private key, or 'self-signed'; "
            "'auto' is self-signed where c2pa-python is installed.",
            rich_help_panel=PUBLISHING,
        ),
    ] = "auto",
    no_sign: Annotated[
        bool,
        typer.Option(
            "--no-sign", help="No C2PA manifests: the same run writes the same bytes.", rich_help_panel=PUBLISHING
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Upload the finished set to this dataset on the Hugging Face hub, user/name; needs a token (HF_TOKEN).",
            rich_help_panel=PUBLISHING,
        ),
    ] = None,
    reproduce: Annotated[
        Path | None,
        file_option(
            "reproduce.yaml of a set, which is made again in --out; only --model, --device and options of output go "
            "with it.",
            PUBLISHING,
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.", rich_help_panel=OUTPUT)] = True,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Continue despite changed settings or damage; keep finished images.", rich_help_panel=OUTPUT
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print estimates of images, time, memory and disk, also of each process; write nothing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Generate images that differ from each other, and from those in memory, if their prompts are similar.

    The same command resumes an interrupted run. Several processes: --workers 2, or in step
    torchrun --nproc-per-node 2 -m kspec_guidance generate ...
    """
    place = out if join is None or _given(context, "out") else None
    if no_sign and _given(context, "sign"):
        raise ValueError("--sign adds signatures, and --no-sign leaves them out; give one of them")
    signature = None if no_sign else sign
    if reproduce is not None:
        _check_alone(context)
        with command_output(as_json, quiet) as output:
            name = model if _given(context, "model") else None
            _reproduce(output, reproduce, place, name, device, report, force, join, signature)
        return
    check_prompt_source(prompt, prompts)
    raised = target if target is not None and re.fullmatch(r"[^<>=]*\bof\b[^<>=]*", target) else None
    check_strength(variety, scale, raised)
    if like_scale is not None and like is None:
        raise ValueError("--like-scale is the strength of --like; give its folder")
    if like_early and like is None:
        raise ValueError("--like-early is how the images of --like are approached; give its folder")
    if like_captions and like is None:
        raise ValueError("--like-captions are those of the images of --like; give its folder")
    if processes is not None and not dry_run:
        raise ValueError(
            "--processes is for --dry-run; to start a run of several processes: torchrun --nproc-per-node "
            f"{processes} -m kspec_guidance generate ..., or --workers {processes}"
        )
    if workers is None and _given(context, "engine"):
        raise ValueError("--engine starts the workers of --workers; give their number")
    if workers is None and join is None and _given(context, "lease_seconds"):
        raise ValueError("--lease-seconds is for workers that come and go; give --workers or --join")
    if workers is not None and join is not None:
        raise ValueError("--workers starts workers, and --join makes this process one; give one of them")
    if select is not None and arms is None:
        raise ValueError("--select chooses among arms; give them with --arms FILE")
    if reward is not None and arms is None:
        raise ValueError("--reward is told to the selector of arms; give them with --arms FILE")
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **read_options(option)}
    quotas: dict[str, Any] = {}
    for name, number in read_pairs(quota, "--quota").items():
        if not number.isdecimal():
            raise ValueError(f"--quota {name} is a number of images, got {number!r}")
        quotas[name] = int(number)
    attributes = read_pairs(attribute, "--attribute")
    for name in attributes.keys() & quotas.keys():
        raise ValueError(f"{name!r} is both a --quota and an --attribute; give them different names")
    with command_output(as_json, quiet) as output:
        output.note(f"loading model {model} ...")
        from kspec_guidance import SPARKE, MemoryBank, MMDGuidance, encode_reference
        from kspec_guidance.baseline import EARLY_STOP, baseline_left
        from kspec_guidance.evaluation.image_sets import folder_captions, read_names
        from kspec_guidance.loop.components import call_parameters
        from kspec_guidance.synthesis import estimate, read_arms, read_prompts, synthesize
        from kspec_guidance.synthesis.deduplication import check_cosine
        from kspec_guidance.synthesis.quotas import read_attribute
        from kspec_guidance.synthesis.run import check_plain
        from kspec_guidance.synthesis.signing import AUTO, can_sign, resolve_sign
        from kspec_guidance.synthesis.stages import is_score, load_function

        source = read_prompts(list(prompt or []) if prompts is None else prompts)
        bank = MemoryBank.load(memory_file) if memory_file is not None and memory_file.exists() else MemoryBank()
        names = set() if drop is None else read_names(drop)
        functions = [name if is_score(name) else load_function(name) for name in filter or []]
        several = None if arms is None else read_arms(arms)
        guide: Any = SPARKE(scale, memory=bank, variety=variety, target=raised)
        plain: dict[str, Any] = {
            "images_per_prompt": images_per_prompt, "batch_size": batch_size, "seed": seed,
            "target": None if raised else target, "duplicates": duplicates, "candidates": candidates,
            "start_candidates": start_candidates, "memory": memory, "memory_by": memory_by, "exchange": exchange,
            "format": format, "shard_size": shard_size, "licence": licence, "marks": marks,
            "sign": resolve_sign(signature, marks),
        }  # fmt: skip
        check_plain(**plain)  # before the model is loaded, and a baseline made
        check_cosine(semantic_duplicates)
        captions = folder_captions(like) if like is not None and like_captions else None
        pipe = load_pipeline(model, dtype, device)
        height = call.get("height")
        size = (height, call.get("width", height)) if height else None
        for name, references in attributes.items():
            quotas[name] = read_attribute(pipe, references, size)
        if like is not None:
            if dry_run:  # references stand for the baseline
                reference = encode_reference(pipe, like, size=size)
                window = {"stop": EARLY_STOP} if like_early else {}
                guide = guide + MMDGuidance(reference, like_scale, baseline=reference, **window)
            else:
                guide = guide + _toward(output, pipe, like, like_scale, like_early, captions, call, batch_size)
        if dry_run:
            plan = estimate(
                source, out, pipe, guide, images_per_prompt, batch_size, call=call, quotas=quotas, memory=memory,
                memory_by=memory_by, processes=processes, candidates=candidates, start_candidates=start_candidates,
            )  # fmt: skip
            if like is not None and "prompt" in call_parameters(type(pipe)):
                plan = plan.with_baseline(baseline_left(pipe, call=_given_values(call)), batch_size)
            if several is not None:
                output.note("the estimate is for the settings of the run, without those of its arms")
            if output.first:
                output.result(asdict(plan), str(plan))
            return
        if marks and signature == AUTO and not can_sign():
            output.note(
                "images say that a model made them (IPTC), without a C2PA signature: c2pa-python is not installed "
                "(pip install 'kspec-guidance[publish]'; --no-sign omits this note)"
            )
        output.kept = f"finished images in {place or join} are kept; run the same command again to resume"
        with output.synthesis_progress() as show:

            def progress_callback(now: Any) -> None:
                show(now)
                kept = f"{now.done} of {now.total} images are kept in {place or join}"
                output.kept = f"{kept}; run the same command again to resume"

            result = synthesize(
                source, place, pipe, guide, call=call, quotas=quotas, filter=functions or None, arms=several,
                select=select or "mixture-greedy", reward=reward, report=report, push_to_hub=push_to_hub,
                semantic_duplicates=semantic_duplicates, drop=names, force=force,
                progress_callback=progress_callback, memory_file=memory_file, workers=workers, engine=engine, join=join,
                lease_seconds=lease_seconds, **plain,
            )  # fmt: skip
        _print_result(output, result)
