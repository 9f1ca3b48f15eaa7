"""The Space: what it refuses, that visitors do not meet, and every flow in a real browser."""

import io
import json
import shutil
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "space"))
CHROMIUM = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
ASK = {
    "each": 4,
    "method": "SPARKE",
    "strength": 1.0,
    "seed": 0,
    "steps": 6,
    "chosen": "noto",
    "files": None,
    "remember": True,
}


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its data does not hold."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def zipped(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def test_pictures_of_a_zip_are_read_whatever_their_names(tmp_path):
    from uploads import read_uploads

    small = png(Image.new("RGBA", (5, 4), (255, 0, 0, 128)))
    path = zipped(tmp_path / "a.zip", {"../../up.png": small, "/etc/passwd": small, "x/": b"", "con\n.gif": small})
    assert [(i.size, i.mode) for i in read_uploads([path])] == [((5, 4), "RGB")] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (claims(5_000, 5_000), "5000 x 5000 pixels"),
        (claims(60_000, 60_000), "far more pixels"),
        (claims(100, 100), "cannot be read as a picture"),
        (b"<svg onload=alert(1)>", "cannot be read as a picture"),
        (b"\0" * (8 * 2**20 + 1), "larger than 8 MB"),
        (b"", "cannot be read as a picture"),
    ],
    ids=["large", "bomb", "broken", "svg", "heavy", "empty"],
)
def test_what_is_no_picture_is_refused(data, said, tmp_path):
    from uploads import UploadError, read_uploads

    (tmp_path / "a.png").write_bytes(data)
    for path in (str(tmp_path / "a.png"), zipped(tmp_path / "b.zip", {"a.png": data})):
        with pytest.raises(UploadError, match=said):
            read_uploads([path])


def test_other_zips_are_refused(tmp_path):
    from uploads import UploadError, read_uploads

    with pytest.raises(UploadError, match="257 files"):
        read_uploads([zipped(tmp_path / "a.zip", {f"{k}": b"" for k in range(257)})])
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
    # the client leaves an empty folder for each file that it has fetched
    patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("fetched")))
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    import app

    page = app.build()
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()
    patch.undo()


def client(server):
    from gradio_client import Client

    return Client(server, verbose=False)


@pytest.mark.slow
def test_visitors_have_memories_of_their_own(server):
    first, second = client(server), client(server)
    ask = lambda c, **more: c.predict(text="heart", api_name="/generate", **(ASK | more))  # noqa: E731
    assert "Memory: 4 images" in ask(first)[2]
    assert "Memory: 8 images" in ask(first)[2]
    assert "Memory: 4 images" in ask(second)[2]
    assert "Memory: 4 images" in ask(second, remember=False, method="MMD")[2]
    assert first.predict(api_name="/clear") == "Memory: 0 images."
    status, table, archive = (ask(second)[k] for k in (2, 3, 6))
    assert "Memory: 8 images" in status
    assert [row[0] for row in table["data"]][:2] == ["Vendi score, all images", "RKE, all images"]
    with zipfile.ZipFile(archive) as files:
        names = files.namelist()
    assert len([n for n in names if n.endswith(".png")]) == 8
    assert {"prompts.tsv", "memory.safetensors"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "each", "rows"), [("heart", 1, 0), ("heart", 2, 2), ("heart\nflag\nman", 1, 3), ("heart", 3, 2)]
)
def test_few_images_have_scores_without_intervals(server, text, each, rows):
    table = client(server).predict(text=text, api_name="/generate", **(ASK | {"each": each}))[3]["data"]
    assert len(table) == rows
    assert not [cell for row in table for cell in row if "[" in cell]


@pytest.mark.slow
def test_no_file_of_the_machine_is_read(server):
    import urllib.error
    import urllib.request

    def call(path):
        """By hand: the client would upload its own machine's file of that name."""
        given = [{"path": path, "meta": {"_type": "gradio.FileData"}}] * 3
        body, kind = json.dumps({"data": [given]}).encode(), {"Content-Type": "application/json"}
        begun = urllib.request.urlopen(urllib.request.Request(f"{server}gradio_api/call/evaluate", body, kind))
        number = json.load(begun)["event_id"]
        return urllib.request.urlopen(f"{server}gradio_api/call/evaluate/{number}").read().decode()

    for path in ("/etc/passwd", str(ROOT / "docs" / "sparke.png"), "app.py", "../../README.md"):
        with pytest.raises(urllib.error.HTTPError, match=r"40\d"):
            urllib.request.urlopen(f"{server}gradio_api/file={path}")
        said = call(path)
        assert "event: error" in said
        assert "Vendi" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text": " \n"}, "at least one prompt"),
        ({"text": "\n".join("abcdefgh")}, "At most 6 prompts"),
        ({"text": "x" * 301}, "300 characters"),
        ({"each": 400}, "At most 8|maximum"),
        ({"method": "rm -rf"}, "rm -rf"),
    ],
)
def test_requests_out_of_bounds_are_refused_in_words(server, more, said):
    with pytest.raises(Exception, match=said):
        client(server).predict(api_name="/generate", **({"text": "heart"} | ASK | more))


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "QwenImagePipeline", "SanaPipeline"])
def test_another_model_in_place_of_the_embedded_one(name, tmp_path):
    from studio import Studio, Visitor, score_table

    from tests.tiny import making

    making.build(name).save_pretrained(tmp_path, safe_serialization=True)
    studio, visitor = Studio(str(tmp_path), 64), Visitor()
    colours = [Image.new("RGB", (80, 60), (40 * k, 90, 200 - 40 * k)) for k in range(5)]
    reference = studio.reference("", colours)
    shown = 0
    for now in studio.generate(visitor, ["a cat", "a dog"], 2, "SPARKE + MMD", 1.0, 0, 5, reference, True):
        shown += bool(now.panels["guided"].rows) and not now.done
    assert shown >= 2  # a preview, and the end
    assert [image.size for row in now.panels["guided"].rows for image in row] == [(64, 64)] * 4
    assert len(visitor.memory) == 4
    assert score_table(now, None)[0][0] == "Vendi score, all images"


def test_models_of_another_kind_are_refused_in_words(tmp_path):
    from studio import Studio

    from tests.tiny import making

    making.build("WanPipeline").save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="needs a text-to-image pipeline"):
        Studio(str(tmp_path))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the flows of the Space were not clicked through")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A page of a visitor of its own, gone after the test whatever happens."""
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


def wait_for(page, text, seconds=60):
    page.wait_for_function(
        "t => [...document.querySelectorAll('textarea,input')].some(e => e.value.includes(t))",
        arg=text,
        timeout=seconds * 1000,
    )


def upload(page, which, files):
    """Once more if the page was not listening yet."""
    for _ in range(5):
        getattr(page.locator("input[type=file][multiple]"), which).set_input_files(files)
        page.wait_for_timeout(4000)
        if any(found.is_visible() for found in page.get_by_text(Path(files[-1]).stem).all()):
            return
    raise AssertionError("the upload never showed")


@pytest.mark.slow
def test_generating_stopping_and_clearing_in_a_browser(server, tab, tmp_path):
    page = tab
    broken: list[str] = []
    page.on("pageerror", lambda e: broken.append(str(e)))
    page.goto(server)
    page.get_by_label("Prompts").fill("heart\ncat face")
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "guided: step")
    assert page.locator(".panel img").count() >= 1  # previews stand there while the work goes on
    wait_for(page, "Done: 12 images of each kind. Memory: 12 images.")
    assert page.locator(".panel img").count() == 2
    assert page.get_by_text("Conditional Vendi, within prompts").count() >= 1
    assert page.locator("a[href*='images.zip']").count() >= 1
    for name in ("plain", "guided"):  # in the legends of both plots
        assert page.locator("svg text", has_text=name).count() == 2
    page.screenshot(path=tmp_path / "generated.png", full_page=True)
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "plain: step")
    page.get_by_role("button", name="Stop").click()
    wait_for(page, "Stopped. Memory: 12 images.")
    page.get_by_role("button", name="Clear memory").click()
    wait_for(page, "Memory: 0 images")
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Enter")  # the model is free again, and a keyboard is enough
    wait_for(page, "Done: 12 images of each kind. Memory: 12 images.")
    assert not broken


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
    page.get_by_label("Method").click()
    page.get_by_role("option", name="Novelty").click()
    page.get_by_text("Reference set, for novelty and MMD").click()
    page.get_by_label("A set of true art").wait_for()
    upload(page, "first", files)
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "Done: 18 images")
    assert page.get_by_text("Squared MMD to the reference").count() >= 1
    page.get_by_role("tab", name="Evaluate").click()
    upload(page, "last", files)
    page.get_by_role("button", name="Evaluate", exact=True).click()
    report = page.frame_locator("iframe[title=Report]")
    report.get_by_text("Vendi").first.wait_for(timeout=60_000)
    page.screenshot(path=tmp_path / "evaluated.png", full_page=True)


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_in_dark(server, tab, theme, tmp_path):
    page = tab
    page.set_viewport_size({"width": 375, "height": 800})
    page.goto(f"{server}?__theme={theme}")
    page.get_by_role("button", name="Generate").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("document.body.classList.contains('dark')") is (theme == "dark")
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
