"""The Space: inputs that it rejects, the separation of visitors, and all flows in a real browser."""

import io
import json
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "space"))
SETTINGS = {
    "images_per_prompt": 4,
    "method": "SPARKE",
    "variety": 50,
    "seed": 0,
    "steps": 6,
    "reference_set": "noto",
    "files": None,
    "remember": True,
}


def encode_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def false_png(width: int, height: int) -> bytes:
    """Return a PNG whose header has a size that its data does not have."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def write_zip(path: Path, files: dict[str, bytes]) -> str:
    """Write a zip and return its path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def test_images_of_a_zip_are_read_whatever_their_names(tmp_path):
    from uploads import read_uploads

    small = encode_png(Image.new("RGBA", (5, 4), (255, 0, 0, 128)))
    path = write_zip(tmp_path / "a.zip", {"../../up.png": small, "/etc/passwd": small, "x/": b"", "con\n.gif": small})
    assert [(i.size, i.mode) for i in read_uploads([path])] == [((5, 4), "RGB")] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (false_png(5_000, 5_000), "5000 x 5000 pixels"),
        (false_png(60_000, 60_000), "far more pixels"),
        (false_png(100, 100), "cannot be read as an image"),
        (b"<svg onload=alert(1)>", "cannot be read as an image"),
        (b"\0" * (8 * 2**20 + 1), "larger than 8 MB"),
        (b"", "cannot be read as an image"),
    ],
    ids=["large", "bomb", "broken", "svg", "heavy", "empty"],
)
def test_invalid_images_are_rejected(data, message, tmp_path):
    from uploads import UploadError, read_uploads

    (tmp_path / "a.png").write_bytes(data)
    for path in (str(tmp_path / "a.png"), write_zip(tmp_path / "b.zip", {"a.png": data})):
        with pytest.raises(UploadError, match=message):
            read_uploads([path])


def test_every_file_of_an_upload_is_read_or_named_with_the_reason(tmp_path):
    from uploads import UploadError, read_uploads

    good = encode_png(Image.new("RGB", (5, 4)))
    files = {"a/b/0.png": good, "__MACOSX/a/._0.png": b"", "a/.DS_Store": b"", "README.txt": b"x", "<b>.png": b"",
             "big.png": b"\0" * (8 * 2**20 + 1), "in.zip": b"PK", "damaged.png": good * 9}  # fmt: skip
    path = Path(write_zip(tmp_path / "a.zip", files))
    data = bytearray(path.read_bytes())
    start = data.rindex(b"damaged.png", 0, data.index(b"PK\x01\x02")) + len("damaged.png")
    data[start + 5 : start + 25] = b"\xff" * 20
    path.write_bytes(data)
    found = read_uploads([str(path)])
    assert len(found) + len(found.skipped) == len(files)
    assert len(found) == 1
    assert "file 5 of the zip (_b_.png)" in found.skipped
    assert "7 files are left out: " in found.notes()[0]
    write_zip(tmp_path / "b.zip", {"in.zip": path.read_bytes()})
    with pytest.raises(UploadError, match=r"in\.zip\) cannot be read as an image"):
        read_uploads([str(tmp_path / "b.zip")])


def test_uploads_are_read_as_by_evaluate_and_reduced(tmp_path):
    import numpy as np
    from uploads import read_uploads

    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (3000, 30)).save(tmp_path / "wide.png")
    Image.new("L", (9, 9)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (9, 9), 255)])
    deep, turned, wide, first = found = read_uploads(
        [str(tmp_path / n) for n in ("deep.png", "turned.jpg", "wide.png", "a.gif")]
    )
    assert np.abs(np.asarray(deep)[..., 0].astype(int) - (ramp // 257)).max() <= 1
    assert (turned.size, wide.size, first.getpixel((0, 0))) == ((20, 40), (1024, 10), (0, 0, 0))
    assert found.notes() == ["only the first frame is read of 1 animations"]


def test_invalid_zips_are_rejected(tmp_path):
    from uploads import UploadError, read_uploads

    with pytest.raises(UploadError, match="257 files"):
        read_uploads([write_zip(tmp_path / "a.zip", {f"{k}": b"" for k in range(257)})])
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 no zip at all")
    with pytest.raises(UploadError, match="broken"):
        read_uploads([str(tmp_path / "b.zip")])
    with pytest.raises(UploadError, match="first"):
        read_uploads([])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("gradio")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    # the client leaves an empty folder for each file that it downloads
    patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("downloads")))
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    import app

    page = app.build()
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()
    patch.undo()


def connect(server):
    from gradio_client import Client

    return Client(server, verbose=False)


@pytest.mark.slow
def test_visitors_do_not_share_a_memory(server):
    first, second = connect(server), connect(server)
    generate = lambda client, **kwargs: client.predict(text="heart", api_name="/generate", **(SETTINGS | kwargs))  # noqa: E731
    assert "Memory: 4 images" in generate(first)[1]
    assert "Memory: 8 images" in generate(first)[1]
    assert "Memory: 4 images" in generate(second)[1]
    assert "Memory: 4 images" in generate(second, remember=False, method="MMD")[1]
    assert first.predict(api_name="/clear") == "Memory: 0 images."
    status, table, archive = (generate(second)[k] for k in (1, 2, 4))
    assert "Memory: 8 images" in status
    rows = ["Different images of a prompt", "95% interval", "Images that show their prompt"]
    assert [row[0] for row in table["data"]] == rows
    with zipfile.ZipFile(archive) as files:
        names = files.namelist()
    assert len([n for n in names if n.endswith(".png")]) == 8
    assert {"prompts.tsv", "memory.safetensors"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "images_per_prompt", "rows"),
    [("heart", 1, 1), ("heart", 2, 2), ("heart\nflag\nman", 1, 1), ("heart", 3, 2), ("a lorry", 2, 1)],
)
def test_few_images_have_scores_without_intervals(server, text, images_per_prompt, rows):
    settings = SETTINGS | {"images_per_prompt": images_per_prompt}
    assert len(connect(server).predict(text=text, api_name="/generate", **settings)[2]["data"]) == rows


@pytest.mark.slow
def test_files_of_the_server_are_not_read(server):
    import urllib.error
    import urllib.request

    def call(path):
        """Without the client, which would upload the file of that path of its own machine."""
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}}] * 3
        body, kind = json.dumps({"data": [files]}).encode(), {"Content-Type": "application/json"}
        response = urllib.request.urlopen(urllib.request.Request(f"{server}gradio_api/call/evaluate", body, kind))
        event_id = json.load(response)["event_id"]
        return urllib.request.urlopen(f"{server}gradio_api/call/evaluate/{event_id}").read().decode()

    for path in ("/etc/passwd", str(ROOT / "docs" / "sparke.png"), "app.py", "../../README.md"):
        with pytest.raises(urllib.error.HTTPError, match=r"40\d"):
            urllib.request.urlopen(f"{server}gradio_api/file={path}")
        answer = call(path)
        assert "event: error" in answer
        assert "Vendi" not in answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": " \n"}, "at least one prompt"),
        ({"text": "\n".join("abcdefgh")}, "At most 6 prompts"),
        ({"text": "x" * 301}, "300 characters"),
        ({"images_per_prompt": 400}, "At most 8|maximum"),
        ({"method": "rm -rf"}, "rm -rf"),
    ],
)
def test_invalid_settings_are_rejected_with_a_message(server, settings, message):
    settings = {"text": "heart"} | SETTINGS | settings
    try:
        status = connect(server).predict(api_name="/generate", **settings)[1]
    except Exception as error:  # of gradio, for values that the page does not offer
        status = str(error)
    assert re.search(message, status)
    assert "Done" not in status


def test_the_example_on_load_was_made_with_the_settings_on_the_page():
    pytest.importorskip("gradio")
    from app import DEFAULTS, EXAMPLE

    example = json.loads(EXAMPLE.read_text())
    assert example["settings"] == DEFAULTS
    assert example["board"].count("<img") == 2 * DEFAULTS["images_per_prompt"] * len(DEFAULTS["prompts"])
    assert "Clearly more." in example["report"]


@pytest.fixture(scope="module")
def studio():
    from studio import Studio

    return Studio()


def test_both_batches_take_turns_and_are_those_of_compare(studio):
    from studio import Visitor

    from kspec_guidance import SPARKE

    settings = {"method": "SPARKE", "variety": 50, "seed": 0, "steps": 4, "reference": None, "remember": True}
    lengths = []
    for state in studio.generate(Visitor(), ["heart", "man"], 2, **settings):
        lengths.append([len(panel.curve) for panel in state.panels.values()])
        assert [bool(panel.rows) for panel in state.panels.values()] in ([False, False], [True, True])
    assert lengths[-1] == [4, 4]
    call = {"num_images_per_prompt": 2, "num_inference_steps": 4, "guidance_scale": 5.0}
    generators = [torch.Generator().manual_seed(k) for k in (0, 1, 0, 1)]
    report = SPARKE().compare(studio.pipe, ["heart", "man"], generator=generators, **call).report
    torch.testing.assert_close(state.report.finished, report.finished, atol=1e-3, rtol=1e-3)
    assert (state.report.plain, state.report.guided) == pytest.approx((report.plain, report.guided), rel=1e-3)
    assert state.report.steps_guided == report.steps_guided
    assert state.report.mean_relative_move == pytest.approx(report.mean_relative_move, rel=1e-2)
    assert "lower variety, now 50" in str(state.report) or "raise variety, now 50" in str(state.report)


def test_variety_0_is_plain_and_said_so(studio):
    from studio import Visitor

    *_, state = studio.generate(Visitor(), ["heart"], 2, "SPARKE", 0, 0, 4, None, False)
    torch.testing.assert_close(state.report.finished, state.report.finished_plain, atol=0, rtol=0)
    assert "Nothing was guided: no step of 4, since variety is 0" in state.text


def test_an_error_of_one_batch_ends_the_other(studio, monkeypatch):
    from studio import Visitor

    monkeypatch.setattr("studio.mean_different", lambda x, prompts: 1 / 0)
    visitor = Visitor()
    with pytest.raises(ZeroDivisionError):
        list(studio.generate(visitor, ["heart"], 2, "SPARKE", 50, 0, 4, None, True))
    assert not len(visitor.memory)
    assert not studio.lock.locked()


def test_words_that_the_model_never_saw_are_named(studio):
    assert studio.unknown_words(["Runner, dark skin tone", "quantum cat", "\u00e9t\u00e9 42"]) == [
        "quantum",
        "\u00e9t\u00e9",
    ]


def test_prompts_are_text_on_the_page():
    from studio import Panel, Progress

    board = Progress({"plain": Panel(), "guided": Panel()}, ['<b>"x'], 2, "").board()
    assert "<b>" not in board
    assert board.count("<span></span>") == 4


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "QwenImagePipeline", "SanaPipeline"])
def test_another_model_in_place_of_the_embedded_one(name, tmp_path, monkeypatch):
    import studio as module
    from studio import Studio, Visitor, score_table

    from tests import tiny

    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "BASELINE", 4)
    monkeypatch.setattr(module, "BASELINE_STEPS_SLOW", 2)
    tiny.build(name).save_pretrained(tmp_path / "model", safe_serialization=True)
    studio, visitor = Studio(str(tmp_path / "model"), 64), Visitor()
    colours = [Image.new("RGB", (80, 60), (40 * k, 90, 200 - 40 * k)) for k in range(5)]
    reference = studio.reference("", colours)
    states = studio.generate(visitor, ["a cat", "a dog"], 2, "MMD", 50, 0, 5, reference, True)
    texts = [next(states).text for _ in range(2)]
    visitor.stop_count += 1  # while the model's own images are made
    texts += [state.text for state in states]
    assert texts[:2] == ["Waiting for the model.", "Images of the model itself, made once for it: 1 of 4."]
    assert texts[-1] == "Stopped. Memory: 0 images."
    assert len(list((tmp_path / "home").rglob("*.safetensors"))) == 1  # a later run goes on from there
    updates = 0
    for state in studio.generate(visitor, ["a cat", "a dog"], 2, "SPARKE + MMD", 50, 0, 5, reference, True):
        updates += bool(state.panels["guided"].rows) and state.report is None
    assert updates >= 1  # a preview
    assert [image.size for row in state.panels["guided"].rows for image in row] == [(64, 64)] * 4
    assert len(visitor.memory) == 4
    assert [row[0] for row in score_table(state, reference)] == [
        "Different images of a prompt",
        "Squared MMD to the reference",
    ]


def test_other_kinds_of_models_are_rejected(tmp_path):
    from studio import Studio

    from tests import tiny

    tiny.build("WanPipeline").save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="needs a text-to-image pipeline"):
        Studio(str(tmp_path))


@pytest.fixture
def tab(browser):
    """A page in a browser context of its own, which is closed after the test."""
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


def wait_for(page, text):
    page.wait_for_function("t => [...document.querySelectorAll('textarea,input')].some(e => e.value.includes(t))", arg=text)


def wait_for_images(page, number):
    """Wait until the board has this many images."""
    page.wait_for_function("n => document.querySelectorAll('.board img').length == n", arg=number)


def upload(page, which, files):
    """Upload files, and wait until the page lists them; again if the page was not ready yet."""
    from playwright.sync_api import TimeoutError

    listed = page.locator(".file-preview").filter(visible=True).get_by_text(Path(files[-1]).stem)
    for timeout in (10_000, 20_000, 60_000):
        getattr(page.locator("input[type=file][multiple]"), which).set_input_files(files)
        try:
            return listed.first.wait_for(timeout=timeout)
        except TimeoutError:
            if timeout == 60_000:
                raise


@pytest.mark.slow
def test_generating_stopping_and_clearing_in_a_browser(server, tab, tmp_path):
    page = tab
    errors: list[str] = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(server)
    wait_for_images(page, 48)  # the example
    page.get_by_label("Prompts").fill("heart\ncat face")
    other = connect(server)
    busy = other.submit(text="heart", api_name="/generate", **(SETTINGS | {"steps": 30, "images_per_prompt": 8}))
    while not busy.outputs():
        page.wait_for_timeout(50)
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "Queued")
    other.predict(api_name="/stop")
    wait_for(page, "Step ")
    wait_for_images(page, 24)  # previews of both
    wait_for(page, "Done: 12 images of each kind. Memory: 12 images.")
    wait_for_images(page, 24)
    page.get_by_text("Step by step").click()
    page.locator("a[href*='images.zip']").wait_for()
    for name in ("without guidance", "with guidance"):  # in the legend
        page.locator("svg text", has_text=re.compile(f"^{name}$")).first.wait_for()
    page.screenshot(path=tmp_path / "generated.png", full_page=True)
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "Step ")
    page.get_by_role("button", name="Stop").click()
    wait_for(page, "Stopped. Memory: 12 images.")
    page.get_by_text("More settings").click()
    page.get_by_role("button", name="Clear memory").click()
    wait_for(page, "Memory: 0 images")
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Enter")  # the model is not busy after a stop, and the keyboard works
    wait_for(page, "Done: 12 images of each kind. Memory: 12 images.")
    assert not errors


@pytest.mark.slow
def test_a_reference_and_a_report_from_uploads_in_a_browser(server, tab, tmp_path):
    page = tab
    files = []
    for k in range(9):
        image = Image.new("RGB", (40, 40), (255 - 25 * k, 200, 25 * k))
        image.paste((0, 0, 0), (k, 3, k + 20, 30))
        image.save(tmp_path / f"{k}<b>.png")
        files.append(str(tmp_path / f"{k}<b>.png"))
    page.goto(server)
    page.get_by_text("More settings").click()
    page.get_by_label("Method").click()
    page.get_by_role("option", name="Novelty").click()
    page.get_by_label("Original emoji").wait_for()
    upload(page, "first", files)
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "Done: 24 images")
    page.get_by_text("Squared MMD to the reference").first.wait_for(state="attached")
    page.get_by_role("tab", name="Evaluate").click()
    upload(page, "last", files)
    page.get_by_role("button", name="Evaluate", exact=True).click()
    wait_for(page, "Done: 9 images, compared by features of")
    report = page.frame_locator("iframe[title=Report]")
    report.locator("h1").first.wait_for(timeout=60_000)
    page.screenshot(path=tmp_path / "evaluated.png", full_page=True)


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark_mode(server, tab, theme, tmp_path):
    page = tab
    page.set_viewport_size({"width": 375, "height": 800})
    page.goto(f"{server}?__theme={theme}")
    page.get_by_role("button", name="Generate").wait_for()
    wait_for_images(page, 48)
    shown = page.get_by_text("with guidance", exact=True).filter(visible=True)
    shown.last.wait_for()
    page.wait_for_function("document.documentElement.scrollWidth <= 375")
    page.wait_for_function("dark => document.body.classList.contains('dark') == dark", arg=theme == "dark")
    page.wait_for_function("t => getComputedStyle(document.body).colorScheme == t", arg=theme)  # also of the report's frame
    top = page.get_by_role("button", name="Generate").bounding_box()
    assert top["y"] + top["height"] <= 800  # seen without scrolling
    boxes = [cell.bounding_box() for cell in shown.all()]
    assert boxes
    assert all(box["x"] + box["width"] <= 375 for box in boxes)  # the scores are not scrolled out of sight
    page.get_by_label("Prompts").fill(" ")
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "Not started: Write at least one prompt")
    assert page.get_by_text("Error", exact=True).count() == 0
    wait_for_images(page, 48)  # still there
    page.screenshot(path=tmp_path / "phone.png", full_page=True)


@pytest.mark.parametrize("steps", [4, 12])
def test_large_early_moves_are_those_of_toward_reference(steps, monkeypatch, tmp_path):
    import torch
    from studio import InputError, Studio, Visitor

    from kspec_guidance import load_demo_pipeline, toward_reference

    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path))
    studio = Studio()
    rows = torch.randn(5, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Studio, "_baseline", lambda self, callback: rows)
    make = lambda method: studio.make_guide(method, 50, Visitor(), rows, steps, lambda done, total: None)  # noqa: E731
    call = {"num_inference_steps": steps, "guidance_scale": 5.0}
    images = torch.zeros(4, 3, 64, 64)
    prompts = ["heart", "cat face", "book", "bird", "runner", "teacher", "surfer", "clock face"]
    (expected,) = toward_reference(load_demo_pipeline(), images, early=True, call=call, prompts=prompts, n=8).terms
    (term,) = make("MMD, large early moves").terms
    assert (term.scale, term.interval(steps)) == (expected.scale, expected.interval(steps))
    assert make("MMD").terms[0].interval(steps) != term.interval(steps)
    with pytest.raises(InputError, match="There is no method 'MND'"):
        make("MND")
