"""Against the real ComfyUI: ``COMFYUI_PATH=folder pytest tests/integrations/test_comfyui_core.py``.

``COMFYUI_PYTHON`` is the Python that has its requirements and this package; by default the one that runs the tests.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NODES, CORE = ROOT / "integrations" / "comfyui", Path(__file__).parent / "comfyui_core"
COMFYUI = os.environ.get("COMFYUI_PATH", "")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="set COMFYUI_PATH to a folder of ComfyUI to test against it"),
]


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "custom_nodes").mkdir()
    (folder / "input").mkdir()
    (folder / "custom_nodes" / "kspec").symlink_to(NODES)
    (folder / "custom_nodes" / "tiny_models.py").symlink_to(CORE / "tiny_models.py")
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "input" / "example.png")
    return folder


@pytest.fixture(scope="module")
def checked(base):
    command = [PYTHON, str(CORE / "check_core.py"), COMFYUI, str(base)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found, done.stderr[-3000:]
    return json.loads(found[0].removeprefix("RESULT "))


def test_models_and_samplers_of_comfyui(checked):
    for row in checked["rows"]:
        assert row["identical"], row  # at variety 0
        assert row["repeatable"], row
        assert row["restored"], row
        assert row["moved"] > 0.01, row
        assert row["remembered"] == 3, row
        assert row["as returned"] < 1e-5, row  # the memory holds what the sampler returned


def test_special_cases_in_comfyui(checked):
    found = checked["special"]
    assert found["cfg 1"] > 0.01
    assert found["first of one"] == 0
    assert found["second of one"] > 0.01
    assert found["another prompt"] < 1e-3
    assert found["sizes"] == [[4, 8, 8], [4, 16, 8]]
    assert (found["cut short"], found["interrupted"]) == (0, 0)
    assert found["matching"] > 0.01
    assert found["matching, baseline"] > 0.01
    assert found["matching at 0"] == 0
    assert found["two guides"]
    assert found["outside of the mask"] == 0


def test_several_latents_at_once(checked):
    found = checked["several"]
    assert found["identical"]
    assert min(found["moved"]) > 0.01
    assert (found["sizes"], found["remembered"]) == ([[1, 4 * 64 + 2 * 20]], 3)


class Server:
    """A ComfyUI server on this machine, without a frontend."""

    def __init__(self, base):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = open(base / "log.txt", "w")  # noqa: SIM115
        command = [
            PYTHON, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
            "--disable-api-nodes", "--dont-print-server", "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, cwd=COMFYUI, env=environment(), stdout=self.log, stderr=self.log)
        for _ in range(240):
            try:
                self.get("/object_info/KSpecDiversity")
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, (base / "log.txt").read_text()[-3000:]
                time.sleep(0.5)
        raise AssertionError((base / "log.txt").read_text()[-3000:])

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def run(self, workflow):
        body = json.dumps({"prompt": workflow}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        for _ in range(240):
            found = self.get(f"/history/{number}").get(number)
            if found:
                assert found["status"]["status_str"] == "success", found["status"]
                return found["outputs"]
            time.sleep(0.5)
        raise AssertionError("the workflow did not end")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def server(base):
    server = Server(base)
    yield server
    server.stop()


def tiny(example, kind="SD15 v", **changes):
    """An example workflow with a tiny model in place of its checkpoint."""
    flow = json.loads((NODES / "example_workflows" / f"{example}.json").read_text())
    texts = [flow.pop(k)["inputs"]["text"] for k in ("2", "3")]
    flow["1"] = {"class_type": "TinyModel", "inputs": {"kind": kind, "positive": texts[0], "negative": texts[1]}}
    places = {("1", 2): ("1", 1), ("2", 0): ("1", 2), ("3", 0): ("1", 3)}
    for node in flow.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][key] = list(places.get(tuple(value), tuple(value)))
            elif key in ("width", "height"):
                node["inputs"][key] = 64
            elif key == "steps":
                node["inputs"][key] = 4
            if key in changes:
                node["inputs"][key] = changes[key]
    return flow


def pixels(base, outputs):
    files = outputs["8"]["images"]
    return [Image.open(base / "output" / f["subfolder"] / f["filename"]).tobytes() for f in files]


def test_nodes_are_registered_with_their_inputs(server):
    names = ("Diversity", "MatchReference", "Baseline", "LoadMemory", "SaveMemory", "ClearMemory", "Score", "Grid")
    for name in names:
        found = server.get(f"/object_info/KSpec{name}")[f"KSpec{name}"]
        assert found["category"] == "kspec"
        assert found["display_name"].endswith("(kspec)")


def test_workflow_makes_varied_images_and_their_score(server, base):
    plain = server.run(tiny("diversity", variety=0.0))
    guided = server.run(tiny("diversity", variety=80.0))
    again = server.run(tiny("diversity", variety=80.0, filename_prefix="again"))
    assert pixels(base, guided) != pixels(base, plain)
    assert pixels(base, again) == pixels(base, guided)
    assert "different images of 4 (pixels)" in guided["9"]["text"][0]


def test_workflow_with_a_memory(server, base):
    first, second = (pixels(base, server.run(tiny("memory", variety=80.0))) for _ in range(2))
    assert first != second  # the same seed: the second run knows the image of the first
    saved = list((base / "output" / "kspec" / "foxes").glob("*.safetensors"))
    assert [path.name for path in saved] == ["4x8x8.safetensors"]
    cleared = tiny("memory", variety=80.0)
    cleared["20"] = {"class_type": "KSpecClearMemory", "inputs": {"memory": ["10", 0]}}
    cleared["5"]["inputs"]["memory"] = ["20", 0]
    assert pixels(base, server.run(cleared)) == first
    loaded = tiny("memory", variety=80.0, from_file=True)
    assert pixels(base, server.run(loaded)) == second


def test_other_workflows(server, base):
    matched = server.run(tiny("match_reference"))
    assert pixels(base, matched) != pixels(base, server.run(tiny("match_reference", scale=0.0)))
    grid = server.run(tiny("grid"))
    name = grid["8"]["images"][0]["filename"]
    assert Image.open(base / "output" / name).size[0] >= 4 * 64


def test_wrong_inputs_are_named(server):
    with pytest.raises(AssertionError, match="varieties must be numbers"):
        server.run(tiny("grid", varieties="0, lots"))
    with pytest.raises(AssertionError, match="memory's name"):
        server.run(tiny("memory", name="../x"))
