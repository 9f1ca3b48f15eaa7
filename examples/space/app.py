"""The page.   python app.py, or `make space` in the repository"""

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
    METHODS,
    MOST_EACH,
    MOST_PROMPTS,
    MOST_STEPS,
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
from uploads import UploadError, read_uploads

HOUR = 3600
COLOURS = {"plain": "#8a8f98", "guided": "#4f46e5"}
INTRO = """# Varied images from the same model
Left: plain sampling. Right: the same prompts and seeds under kernel guidance. Nothing is retrained, and the model is asked
nothing more.
"""
ABOUT = """A **Vendi score** is the effective number of different images: 1 if all are alike, the number of images if all
differ. **SPARKE** keeps images of similar prompts apart; **order 0.5** counts rare pictures for more; **novelty** keeps
away from a reference set; **MMD** makes the whole batch distributed as the reference set is. Images *in memory* count too,
so later batches go on where earlier ones ended.
"""
STYLE = ".panel img {width: 100%;} @media (max-width: 640px) {.gradio-container {padding: 8px !important;}}"


def frame(rows: list[tuple], x: str, y: str) -> pd.DataFrame | None:
    """For a plot; None as long as there is nothing, since its axes and colours keep to what they met first."""
    return pd.DataFrame(rows, columns=[x, y, "set"]) if rows else None


def build(model: str | None = None, size: int | None = None) -> gr.Blocks:
    """The page over one pipeline: see :class:`Studio`."""
    studio = Studio(model, size)

    def run(
        visitor: Visitor, text: str, each: float, method: str, strength: float, seed: float, steps: float, chosen: str,
        files: list[str] | None, remember: bool,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        try:
            prompts = read_prompts(text)
            needed = method in ("Novelty", "MMD", "SPARKE + MMD")
            reference = studio.reference(chosen, read_uploads(files) if files else []) if needed else None
            work = studio.generate(
                visitor, prompts, int(each), method, float(strength), int(seed or 0), int(steps), reference, bool(remember)
            )
            with tempfile.TemporaryDirectory() as folder, closing(work):  # gradio copies what is yielded before it goes on
                for now in work:
                    curve = [(k + 1, v, n) for n, p in now.panels.items() for k, v in enumerate(p.curve or [float("nan")])]
                    table, bars, archive = [], [], None
                    if now.done:
                        table, archive, bars = score_table(now, reference), pack(now, visitor, Path(folder)), spectrum(now)
                    plots = frame(curve, "step", "score"), frame(bars, "rank", "share")
                    pictures = (now.picture(name, Path(folder)) for name in now.panels)
                    yield *pictures, now.text, table, *plots, archive, visitor
        except (InputError, UploadError) as error:
            raise gr.Error(str(error), duration=10, print_exception=False) from error

    def clear(visitor: Visitor) -> tuple[str, Visitor]:
        visitor.memory.clear()
        return "Memory: 0 images.", visitor

    def halt(visitor: Visitor) -> None:
        visitor.stops += 1  # seen by the work in progress, which holds the same visitor

    def judge(files: list[str] | None) -> Iterator[tuple[list[list[str]], str, str]]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows, path = evaluate(studio, read_uploads(files), Path(folder))
            except ValueError as error:
                raise gr.Error(str(error), duration=10, print_exception=False) from error
            page = html.escape(Path(path).read_text(), quote=True)
            style = "width:100%;height:70vh;border:0;background:white"
            yield rows, path, f'<iframe sandbox="" title="Report" srcdoc="{page}" style="{style}"></iframe>'

    with gr.Blocks(title="Varied images", delete_cache=(600, HOUR)) as page:
        visitor = gr.State(Visitor(), time_to_live=HOUR)
        gr.Markdown(INTRO)
        with gr.Tab("Generate"):
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    text = gr.Textbox(
                        "heart\nrunner\ncat face", lines=3, max_lines=MOST_PROMPTS, label="Prompts",
                        info=f"One a line, at most {MOST_PROMPTS}." + (" Lower-case emoji names." if studio.demo else ""),
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
                    each = gr.Slider(1, MOST_EACH, 6, step=1, label="Images of each prompt")
                with gr.Column(scale=2, min_width=280):
                    with gr.Row():
                        seed = gr.Number(0, precision=0, label="Seed", minimum=0, maximum=2**31 - 1, min_width=100)
                        steps = gr.Slider(4, MOST_STEPS, 12, step=1, label="Steps", min_width=140)
                    remember = gr.Checkbox(True, label="Add to memory", info="Later images keep away from these")
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", min_width=90)
                        stop = gr.Button("Stop", min_width=70)
                        forget = gr.Button("Clear memory", min_width=90)
            with gr.Accordion("Reference set, for novelty and MMD", open=False):
                chosen = gr.Dropdown(list(REFERENCES), value=REFERENCES[0], label="A set of true art", visible=studio.demo)
                files = gr.File(
                    file_count="multiple", file_types=["image", ".zip"], label="or your own pictures (they take its place)"
                )
            status = gr.Textbox("Ready.", label="Status", lines=1, interactive=False)
            with gr.Row():
                left = gr.Image(label="Plain", type="filepath", interactive=False, elem_classes="panel")
                right = gr.Image(label="Guided", type="filepath", interactive=False, elem_classes="panel")
            table = gr.Dataframe(
                headers=["score", "plain [95%]", "guided [95%]"], label="Scores with jackknife intervals",
                interactive=False, wrap=True, column_count=3,
            )  # fmt: skip
            with gr.Row():
                lines = gr.LinePlot(
                    x="step", y="score", color="set", color_map=COLOURS, title="Vendi score within prompts, at each step",
                    x_title="denoising step", y_title="effective number of images", height=320,
                )  # fmt: skip
                bars = gr.LinePlot(
                    x="rank", y="share", color="set", color_map=COLOURS, title="Spectrum of the kernel matrix",
                    x_title="rank", y_title="eigenvalue / n", height=320,
                )  # fmt: skip
            archive = gr.File(label="Images and memory", interactive=False)
            gr.Markdown(ABOUT)
            go.click(
                run, [visitor, text, each, method, strength, seed, steps, chosen, files, remember],
                [left, right, status, table, lines, bars, archive, visitor], concurrency_limit=1, concurrency_id="model",
                api_name="generate", show_progress="minimal",
            )  # fmt: skip
            stop.click(halt, visitor, None, queue=False, api_name="stop")
            forget.click(clear, visitor, [status, visitor], api_name="clear")
        with gr.Tab("Evaluate"):
            gr.Markdown(
                "How varied is a set of pictures? Upload some, or a zip of them: you get the scores and a full report."
            )
            sets = gr.File(file_count="multiple", file_types=["image", ".zip"], label="Pictures, or a zip")
            ask = gr.Button("Evaluate", variant="primary")
            found = gr.Dataframe(
                headers=["score", "value", "95%"], label="Scores", interactive=False, wrap=True, column_count=3
            )
            report = gr.File(label="Report page", interactive=False)
            shown = gr.HTML()
            ask.click(judge, sets, [found, report, shown], concurrency_limit=1, concurrency_id="model", api_name="evaluate")
    page.queue(max_size=64)
    return page


def launch(page: gr.Blocks, **more: Any) -> Any:
    """With limits on uploads, and fonts that need no other host."""
    theme = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    settings: dict[str, Any] = {"max_file_size": "32mb", "theme": theme, "css": STYLE, "ssr_mode": False}
    return page.launch(**(settings | more))


if __name__ == "__main__":
    size = os.environ.get("KSPEC_SIZE")
    launch(build(os.environ.get("KSPEC_MODEL"), int(size) if size else None))
