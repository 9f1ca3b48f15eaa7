"""The app.   python app.py, or `make space` in the repository"""

import html
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from studio import (
    LABELS,
    MAX_IMAGES_PER_PROMPT,
    MAX_PROMPTS,
    MAX_STEPS,
    METHODS,
    REFERENCES,
    WITH_REFERENCE,
    InputError,
    Progress,
    Studio,
    Visitor,
    evaluate,
    pack,
    read_prompts,
    score_table,
)
from uploads import UploadError, Uploads, read_uploads

from kspec_guidance.guidance.presets import DEFAULT_VARIETY

HOUR = 3600
DEFAULTS: dict[str, Any] = {
    "prompts": ["person", "runner", "health worker", "heart"], "images_per_prompt": 6, "method": METHODS[0],
    "variety": DEFAULT_VARIETY, "seed": 0, "steps": 12,
}  # fmt: skip
EXAMPLE = Path(__file__).parent / "example.json"  # a run with these settings, made by `python app.py --example`
COLOURS = {LABELS["plain"]: "#8a8f98", LABELS["guided"]: "#6366f1"}
INTRO = """# Varied images from the same model
The same prompts and seeds, without and with kernel guidance. Nothing is retrained, and there are no extra denoiser
evaluations.
"""
QUEUED = "() => 'Queued: waiting until the model is free.'"  # JavaScript, shown at once
CAUTION = "Variety counts differences, not quality: look at the images."
ABOUT = """*Different images of a prompt* is the effective number of different images (RKE): 1 if all are alike, the number
of images if all differ. **SPARKE** moves images of similar prompts apart; **order 0.5** gives rare images more weight;
**novelty** moves images away from a reference set; **MMD** moves them toward the style of one, away from 100 images of the
model itself, which are made once for a model; **large early moves**, in the first fifth of the steps, take on more of that
style and leave the images of a prompt more alike. Images *in memory* count as part of the batch, so later batches
differ from earlier ones.
"""
STYLE = """
.board section {margin-bottom: 14px;}
.board h3 {margin: 0 0 2px; font-size: 1rem; overflow-wrap: anywhere;}
.board .pair {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 6px 24px;}
.board figure {margin: 0; min-width: 0;}
.board figcaption {font-size: .85rem; color: var(--body-text-color-subdued);}
.board .tiles {display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 4px;}
.board .tiles > * {width: 100%; max-width: 160px; aspect-ratio: 1; border-radius: 6px; margin: 0;}
.board .tiles > span {background: var(--block-border-color); opacity: .5;}
.report {width: 100%; height: 70vh; border: 0;}
@media (max-width: 640px) {.gradio-container {padding: 8px !important;}}
"""
HEAD = (
    "<style>body {color-scheme: light;} body.dark {color-scheme: dark;}</style>"  # the report in its frame follows the page
)


def curves(state: Progress) -> pd.DataFrame | None:
    """The rows of the plot; None if there are none, since a plot keeps the axes and colours of its first data."""
    rows = [(k + 1, v, LABELS[name]) for name, panel in state.panels.items() for k, v in enumerate(panel.curve)]
    return pd.DataFrame(rows, columns=["step", "different", "set"]) if rows else None


def make_example() -> None:
    """Run the default settings and keep what the page shows on load."""
    settings = {k: v for k, v in DEFAULTS.items() if k != "prompts"}
    *_, state = Studio().generate(Visitor(), DEFAULTS["prompts"], reference=None, remember=False, **settings)
    shown = {
        "settings": DEFAULTS,
        "board": state.board(),
        "report": str(state.report),
        "table": score_table(state, None),
    }
    EXAMPLE.write_text(json.dumps(shown, indent=1) + "\n")


def build(model: str | None = None, size: int | None = None) -> gr.Blocks:
    """Build the app for one pipeline; arguments as of :class:`Studio`."""
    studio = Studio(model, size)
    example = json.loads(EXAMPLE.read_text()) if studio.demo else {"board": "", "table": [], "report": ""}
    ready = f"An example, made before with these settings.\n{example['report']}" if studio.demo else "Ready."

    def run(
        visitor: Visitor, text: str, images_per_prompt: float, method: str, variety: float, seed: float, steps: float,
        reference_set: str, files: list[str] | None, remember: bool,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        try:
            prompts = read_prompts(text)
            notes = []
            if unknown := studio.unknown_words(prompts):
                notes.append(
                    f"This small model never saw {', '.join(map(repr, unknown[:5]))}: expect shapeless images, whose "
                    "variety means nothing. It knows emoji names."
                )
            needed = method in WITH_REFERENCE
            uploads = read_uploads(files) if files and needed else Uploads()
            notes += uploads.notes()
            reference = studio.reference(reference_set, uploads) if needed else None
            states = studio.generate(
                visitor, prompts, int(images_per_prompt), method, float(variety), int(seed or 0), int(steps), reference,
                bool(remember),
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder, closing(states):  # gradio copies files before it resumes
                for state in states:
                    table, archive = [], None
                    if state.report is not None:
                        table, archive = score_table(state, reference), pack(state, visitor, Path(folder))
                    yield state.board(), "\n".join([*notes, state.text]), table, curves(state), archive, visitor
        except (InputError, UploadError) as error:
            yield gr.skip(), f"Not started: {error}", gr.skip(), gr.skip(), gr.skip(), visitor

    def clear(visitor: Visitor) -> tuple[str, Visitor]:
        visitor.memory.clear()
        return "Memory: 0 images.", visitor

    def request_stop(visitor: Visitor) -> None:
        visitor.stop_count += 1  # the run in progress reads it from the same object

    def evaluate_files(files: list[str] | None) -> Iterator[tuple[Any, ...]]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                uploads = read_uploads(files)
                rows, report_path, features = evaluate(studio, uploads, Path(folder), uploads.notes())
            except ValueError as error:
                yield gr.skip(), gr.skip(), gr.skip(), f"Not started: {error}"
                return
            source = html.escape(Path(report_path).read_text(), quote=True)
            frame = f'<iframe class="report" sandbox="" title="Report" srcdoc="{source}"></iframe>'
            done = f"Done: {len(uploads)} images, compared by features of {features}."
            yield rows, gr.update(value=report_path, visible=True), frame, "\n".join([done, *uploads.notes()])

    with gr.Blocks(title="Varied images", delete_cache=(600, HOUR)) as page:
        visitor = gr.State(Visitor(), time_to_live=HOUR)
        gr.Markdown(INTRO)
        with gr.Tab("Generate"):
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    text = gr.Textbox(
                        "\n".join(DEFAULTS["prompts"]), lines=4, max_lines=MAX_PROMPTS, label="Prompts",
                        info=f"One per line, at most {MAX_PROMPTS}." + (" Lower-case emoji names." if studio.demo else ""),
                    )  # fmt: skip
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", min_width=120)
                        stop = gr.Button("Stop", min_width=90)
                    status = gr.Textbox(ready, label="Status", lines=2, max_lines=20, interactive=False)
                with gr.Column(scale=2, min_width=300):
                    variety = gr.Slider(
                        0, 100, DEFAULTS["variety"], step=5, label="Variety",
                        info="How far images move apart: 0 changes nothing, 50 is clearly more varied, 100 may break them.",
                    )  # fmt: skip
                    images_per_prompt = gr.Slider(
                        1, MAX_IMAGES_PER_PROMPT, DEFAULTS["images_per_prompt"], step=1, label="Images per prompt"
                    )
                    with gr.Accordion("More settings", open=False):
                        method = gr.Dropdown(list(METHODS), value=DEFAULTS["method"], label="Method")
                        with gr.Row():
                            seed = gr.Number(
                                DEFAULTS["seed"], precision=0, label="Seed", minimum=0, maximum=2**31 - 1, min_width=100
                            )
                            steps = gr.Slider(4, MAX_STEPS, DEFAULTS["steps"], step=1, label="Steps", min_width=140)
                        remember = gr.Checkbox(True, label="Add to memory", info="Later images are kept away from these")
                        forget = gr.Button("Clear memory")
                        reference_set = gr.Dropdown(
                            list(REFERENCES), value=REFERENCES[0], label="Original emoji, the reference of novelty and MMD",
                            visible=studio.demo,
                        )  # fmt: skip
                        files = gr.File(
                            file_count="multiple",
                            file_types=["image", ".zip"],
                            label="Your own images as the reference",
                            height=120,
                        )
            board = gr.HTML(example["board"], elem_id="board")
            table = gr.Dataframe(
                example["table"], headers=["", "without", "with guidance"],
                label="How many different images these look like",
                interactive=False, wrap=True, column_count=3, column_widths=["40%", "30%", "30%"],
            )  # fmt: skip
            gr.Markdown(CAUTION)
            with gr.Accordion("Step by step, download, and what the words mean", open=False):
                lines = gr.LinePlot(
                    x="step", y="different", color="set", color_map=COLOURS, title="Different images of a prompt",
                    x_title="denoising step", y_title="effective number", height=300,
                )  # fmt: skip
                archive = gr.File(label="Images and memory", interactive=False)
                gr.Markdown(ABOUT)
            if studio.demo:
                gr.Examples(
                    [["health worker\nman\nfarmer\nstudent"], ["flag\nface\nheart"], ["car\nhouse\ntree"]],
                    [text],
                    label="Try",
                )
            go.click(None, None, status, js=QUEUED, api_visibility="private").then(
                run, [visitor, text, images_per_prompt, method, variety, seed, steps, reference_set, files, remember],
                [board, status, table, lines, archive, visitor], concurrency_limit=1, concurrency_id="model",
                api_name="generate", show_progress="minimal", show_progress_on=status,
            )  # fmt: skip
            stop.click(request_stop, visitor, None, queue=False, api_name="stop")
            forget.click(clear, visitor, [status, visitor], api_name="clear")
        with gr.Tab("Evaluate"):
            gr.Markdown(
                "How varied is a set of images? Upload images, or a zip of them, for their scores and a full report."
            )
            sets = gr.File(file_count="multiple", file_types=["image", ".zip"], label="Images, or a zip")
            ask = gr.Button("Evaluate", variant="primary")
            note = gr.Textbox("Ready.", label="Status", interactive=False)
            scores = gr.Dataframe(
                headers=["score", "value", "95%"], label="Scores", interactive=False, wrap=True, column_count=3,
                column_widths=["40%", "25%", "35%"],
            )  # fmt: skip
            report = gr.File(label="Report page", interactive=False, visible=False)
            shown = gr.HTML()
            ask.click(None, None, note, js=QUEUED, api_visibility="private").then(
                evaluate_files, sets, [scores, report, shown, note], concurrency_limit=1, concurrency_id="model",
                api_name="evaluate", show_progress="minimal", show_progress_on=note,
            )  # fmt: skip
    page.queue(max_size=64)
    return page


def launch(page: gr.Blocks, **kwargs: Any) -> Any:
    """Launch the app with a limit on uploads and with system fonts, which need no other host."""
    theme = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    settings: dict[str, Any] = {"max_file_size": "32mb", "theme": theme, "css": STYLE, "head": HEAD, "ssr_mode": False}
    return page.launch(**(settings | kwargs))


if __name__ == "__main__" and sys.argv[1:] == ["--example"]:
    make_example()
elif __name__ == "__main__":
    size = os.environ.get("KSPEC_SIZE")
    launch(build(os.environ.get("KSPEC_MODEL"), int(size) if size else None))
