"""The app.   python app.py, or `make space` in the repository"""

import html
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from studio import (
    MAX_IMAGES_PER_PROMPT,
    MAX_PROMPTS,
    MAX_STEPS,
    METHODS,
    REFERENCES,
    InputError,
    Studio,
    Visitor,
    evaluate,
    pack,
    read_prompts,
    score_table,
    spectrum,
)
from uploads import UploadError, Uploads, read_uploads

HOUR = 3600
COLOURS = {"plain": "#8a8f98", "guided": "#4f46e5"}
INTRO = """# Varied images from the same model
Left: plain sampling. Right: the same prompts and seeds with kernel guidance. Nothing is retrained, and there are no extra
denoiser evaluations.
"""
ABOUT = """The **Vendi score** is the effective number of different images: 1 if all are alike, the number of images if all
differ. **SPARKE** moves images of similar prompts apart; **order 0.5** gives rare images more weight; **novelty** moves
images away from a reference set; **MMD** matches the distribution of the batch to that of a reference set. Images *in
memory* count as part of the batch, so later batches differ from earlier ones.
"""
STYLE = ".panel img {width: 100%;} @media (max-width: 640px) {.gradio-container {padding: 8px !important;}}"


def plot_data(rows: list[tuple], x: str, y: str) -> pd.DataFrame | None:
    """Return the rows of a plot; None if there are none, since a plot keeps the axes and colours of its first data."""
    return pd.DataFrame(rows, columns=[x, y, "set"]) if rows else None


def build(model: str | None = None, size: int | None = None) -> gr.Blocks:
    """Build the app for one pipeline; arguments as of :class:`Studio`."""
    studio = Studio(model, size)

    def run(
        visitor: Visitor, text: str, images_per_prompt: float, method: str, strength: float, seed: float, steps: float,
        reference_set: str, files: list[str] | None, remember: bool,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        try:
            prompts = read_prompts(text)
            needed = method in ("Novelty", "MMD", "SPARKE + MMD")
            uploads = read_uploads(files) if files and needed else Uploads()
            for line in uploads.notes():
                gr.Warning(line)
            reference = studio.reference(reference_set, uploads) if needed else None
            states = studio.generate(
                visitor, prompts, int(images_per_prompt), method, float(strength), int(seed or 0), int(steps), reference,
                bool(remember),
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder, closing(states):  # gradio copies files before it resumes
                for state in states:
                    curves = [
                        (k + 1, v, name)
                        for name, p in state.panels.items()
                        for k, v in enumerate(p.curve or [float("nan")])
                    ]
                    table, bars, archive = [], [], None
                    if state.done:
                        table, bars = score_table(state, reference), spectrum(state)
                        archive = pack(state, visitor, Path(folder))
                    plots = plot_data(curves, "step", "score"), plot_data(bars, "rank", "share")
                    images = (state.render(name, Path(folder)) for name in state.panels)
                    yield *images, state.text, table, *plots, archive, visitor
        except (InputError, UploadError) as error:
            raise gr.Error(str(error), duration=10, print_exception=False) from error

    def clear(visitor: Visitor) -> tuple[str, Visitor]:
        visitor.memory.clear()
        return "Memory: 0 images.", visitor

    def request_stop(visitor: Visitor) -> None:
        visitor.stop_count += 1  # the run in progress reads it from the same object

    def evaluate_files(files: list[str] | None) -> Iterator[tuple[list[list[str]], str, str]]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                uploads = read_uploads(files)
                for line in uploads.notes():
                    gr.Warning(line)
                rows, report_path = evaluate(studio, uploads, Path(folder), uploads.notes())
            except ValueError as error:
                raise gr.Error(str(error), duration=10, print_exception=False) from error
            source = html.escape(Path(report_path).read_text(), quote=True)
            style = "width:100%;height:70vh;border:0;background:white"
            yield rows, report_path, f'<iframe sandbox="" title="Report" srcdoc="{source}" style="{style}"></iframe>'

    with gr.Blocks(title="Varied images", delete_cache=(600, HOUR)) as page:
        visitor = gr.State(Visitor(), time_to_live=HOUR)
        gr.Markdown(INTRO)
        with gr.Tab("Generate"):
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    text = gr.Textbox(
                        "heart\nrunner\ncat face", lines=3, max_lines=MAX_PROMPTS, label="Prompts",
                        info=f"One per line, at most {MAX_PROMPTS}." + (" Lower-case emoji names." if studio.demo else ""),
                    )  # fmt: skip
                    if studio.demo:
                        gr.Examples(
                            [["heart\nflag\nface"], ["health worker\nman\nfarmer\nstudent"], ["car\nhouse\ntree"]],
                            [text],
                            label="Try",
                        )
                with gr.Column(scale=2, min_width=280):
                    method = gr.Dropdown(list(METHODS), value=METHODS[0], label="Method")
                    strength = gr.Slider(0, 3, 1, step=0.1, label="Strength", info="1 is the default; 0 is plain sampling")
                    images_per_prompt = gr.Slider(1, MAX_IMAGES_PER_PROMPT, 6, step=1, label="Images per prompt")
                with gr.Column(scale=2, min_width=280):
                    with gr.Row():
                        seed = gr.Number(0, precision=0, label="Seed", minimum=0, maximum=2**31 - 1, min_width=100)
                        steps = gr.Slider(4, MAX_STEPS, 12, step=1, label="Steps", min_width=140)
                    remember = gr.Checkbox(True, label="Add to memory", info="Later images are kept away from these")
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", min_width=90)
                        stop = gr.Button("Stop", min_width=70)
                        forget = gr.Button("Clear memory", min_width=90)
            with gr.Accordion("Reference set, for novelty and MMD", open=False):
                reference_set = gr.Dropdown(
                    list(REFERENCES), value=REFERENCES[0], label="Original emoji", visible=studio.demo
                )
                files = gr.File(file_count="multiple", file_types=["image", ".zip"], label="Your own images, used instead")
            status = gr.Textbox("Ready.", label="Status", lines=1, interactive=False)
            with gr.Row():
                left = gr.Image(label="Plain", type="filepath", interactive=False, elem_classes="panel")
                right = gr.Image(label="Guided", type="filepath", interactive=False, elem_classes="panel")
            table = gr.Dataframe(
                headers=["score", "plain [95%]", "guided [95%]"], label="Scores with jackknife intervals",
                interactive=False, wrap=True, column_count=3, column_widths=["40%", "30%", "30%"],
            )  # fmt: skip
            with gr.Row():
                lines = gr.LinePlot(
                    x="step", y="score", color="set", color_map=COLOURS, title="Vendi score within prompts",
                    x_title="denoising step", y_title="effective number of images", height=320,
                )  # fmt: skip
                bars = gr.LinePlot(
                    x="rank", y="share", color="set", color_map=COLOURS, title="Spectrum of the kernel matrix",
                    x_title="rank", y_title="eigenvalue / n", height=320,
                )  # fmt: skip
            archive = gr.File(label="Images and memory", interactive=False)
            gr.Markdown(ABOUT)
            go.click(
                run, [visitor, text, images_per_prompt, method, strength, seed, steps, reference_set, files, remember],
                [left, right, status, table, lines, bars, archive, visitor], concurrency_limit=1, concurrency_id="model",
                api_name="generate", show_progress="minimal",
            )  # fmt: skip
            stop.click(request_stop, visitor, None, queue=False, api_name="stop")
            forget.click(clear, visitor, [status, visitor], api_name="clear")
        with gr.Tab("Evaluate"):
            gr.Markdown(
                "How varied is a set of images? Upload images, or a zip of them, for their scores and a full report."
            )
            sets = gr.File(file_count="multiple", file_types=["image", ".zip"], label="Images, or a zip")
            ask = gr.Button("Evaluate", variant="primary")
            scores = gr.Dataframe(
                headers=["score", "value", "95%"], label="Scores", interactive=False, wrap=True, column_count=3
            )
            report = gr.File(label="Report page", interactive=False)
            shown = gr.HTML()
            ask.click(
                evaluate_files,
                sets,
                [scores, report, shown],
                concurrency_limit=1,
                concurrency_id="model",
                api_name="evaluate",
            )
    page.queue(max_size=64)
    return page


def launch(page: gr.Blocks, **kwargs: Any) -> Any:
    """Launch the app with a limit on uploads and with system fonts, which need no other host."""
    theme = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    settings: dict[str, Any] = {"max_file_size": "32mb", "theme": theme, "css": STYLE, "ssr_mode": False}
    return page.launch(**(settings | kwargs))


if __name__ == "__main__":
    size = os.environ.get("KSPEC_SIZE")
    launch(build(os.environ.get("KSPEC_MODEL"), int(size) if size else None))
