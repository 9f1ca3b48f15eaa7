"""Pictures of the example workflows in ComfyUI's own frontend: writes docs/comfyui*.png.

    COMFYUI_PATH=folder python benchmarks/comfyui_pictures.py        a minute; needs playwright and Chromium

``COMFYUI_PYTHON`` is the Python that has ComfyUI's requirements and this package; by default the one that runs the script.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
NODES = ROOT / "integrations" / "comfyui"
PICTURES = {"diversity": "comfyui", "memory": "comfyui-memory", "match_reference": "comfyui-match", "grid": "comfyui-grid"}
VIEW, LEFT, TOP, BOTTOM, MARGIN = (1600, 1000), 80, 90, 60, 20  # pixels; bars of the frontend are around the canvas
SHOW = """flow => {
    const app = window.app || window.comfyAPI.app.app;
    app.loadApiJson(flow, "kspec");
    return app.graph._nodes.length;
}"""
FIT = """([left, top, width, height]) => {
    const app = window.app || window.comfyAPI.app.app, title = 30, box = [1e9, 1e9, -1e9, -1e9];
    for (const n of app.graph._nodes) if (n.type == "CLIPTextEncode") n.setSize([320, 110]);
    app.graph.arrange(60);
    for (const n of app.graph._nodes) {
        box[0] = Math.min(box[0], n.pos[0]); box[1] = Math.min(box[1], n.pos[1] - title);
        box[2] = Math.max(box[2], n.pos[0] + n.size[0]); box[3] = Math.max(box[3], n.pos[1] + n.size[1]);
    }
    const scale = Math.min(1, width / (box[2] - box[0]), height / (box[3] - box[1])), view = app.canvas.ds;
    view.scale = scale; view.offset[0] = left / scale - box[0]; view.offset[1] = top / scale - box[1];
    app.canvas.setDirty(true, true);
    return [(box[2] - box[0]) * scale, (box[3] - box[1]) * scale];
}"""


def serve(base: Path, port: int) -> subprocess.Popen:
    """A ComfyUI server with the nodes of this repository."""
    (base / "custom_nodes").mkdir()
    (base / "input").mkdir()
    (base / "custom_nodes" / "kspec").symlink_to(NODES)
    Image.effect_noise((8, 8), 120).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC).save(
        base / "input" / "example.png"
    )
    command = [
        os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--port", str(port),
        "--base-directory", str(base), "--disable-api-nodes",
        "--dont-print-server", "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, cwd=os.environ["COMFYUI_PATH"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/object_info/KSpecGrid", timeout=10)
            return server
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the server does not answer")


def main() -> None:
    from playwright.sync_api import sync_playwright

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        server = serve(Path(folder), port)
        try:
            browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport=dict(zip(("width", "height"), VIEW, strict=True)))
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function(
                "() => (window.app || window.comfyAPI?.app?.app)?.graph?._nodes?.length >= 0", timeout=60_000
            )
            page.wait_for_timeout(8000)
            page.evaluate("() => window.app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
            room = [LEFT + MARGIN, TOP + MARGIN, VIEW[0] - LEFT - 3 * MARGIN, VIEW[1] - TOP - 3 * MARGIN - BOTTOM]
            for name, target in PICTURES.items():
                page.keyboard.press("Escape")
                flow = json.loads((NODES / "example_workflows" / f"{name}.json").read_text())
                assert page.evaluate(SHOW, flow) == len(flow)
                page.wait_for_timeout(2000)
                width, height = page.evaluate(FIT, room)
                page.wait_for_timeout(1500)
                clip = {"x": LEFT, "y": TOP, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
                page.screenshot(path=ROOT / "docs" / f"{target}.png", clip=clip)
                print(target, round(width), round(height))
            browser.close()
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
