import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from kspec_guidance.synthesis import SynthesisError
from kspec_guidance.synthesis.hub import HubUpload
from tests.synthesis.small_runs import make


class Hub(ThreadingHTTPServer):
    """Stands in for the hub: takes what its library sends, and keeps the files of commits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.url, self.files, self.tokens, self.created, self.refuses = (
            f"http://127.0.0.1:{self.server_port}",
            {},
            set(),
            [],
            "",
        )


class Requests(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self):
        hub, data, status = self.server, self.body(), 200
        found = {"id": "me/set", "sha": "0" * 40, "siblings": [], "private": False, "tags": [], "downloads": 0, "likes": 0}
        if hub.refuses and hub.refuses in self.path:
            status, found = 403, {"error": "You don't have the rights to create a dataset under this namespace"}
        elif self.path.startswith("/api/repos/create"):
            hub.created.append(json.loads(data))
            hub.tokens.add(self.headers.get("Authorization"))
            found = {"url": f"{hub.url}/datasets/me/set", "name": "me/set"}
        elif "/preupload/" in self.path:
            listed = [file["path"] for file in json.loads(data)["files"]]
            found = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in listed]}
        elif "/commit/" in self.path:
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{hub.url}/datasets/me/set/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        reply = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_HEAD = answer


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(hub, monkeypatch):
    """The command line on this hub, in this process."""
    from kspec_guidance.cli import app

    own = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in own.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def run(out):
        words = ["generate", "heart", "--out", str(out), "--steps", "1", "--images", "2", "--no-report",
                 "--licence", "CC0-1.0", "--push-to-hub", "me/set", "--json", "--quiet"]  # fmt: skip
        return CliRunner().invoke(app, words)

    return run


@pytest.mark.slow
def test_a_finished_set_is_uploaded_without_the_state_of_the_run(hub, command, tmp_path):
    done = command(tmp_path / "set")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["url"] == f"{hub.url}/datasets/me/set"
    assert hub.created[0]["type"] == "dataset"
    assert hub.tokens == {"Bearer hf_secret"}
    folder = {
        p.relative_to(tmp_path / "set").as_posix(): p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()
    }
    assert hub.files == {name: data for name, data in folder.items() if not name.startswith(".kspec/")}
    assert json.loads(hub.files["croissant.json"])["url"] == f"{hub.url}/datasets/me/set"
    hub.refuses = "/commit/"
    hub.files.clear()
    done = command(tmp_path / "set2")
    assert done.exit_code == 1
    assert "the set is finished, and the same command uploads it" in done.stderr
    assert isinstance(done.exception, SystemExit)  # no traceback
    hub.refuses = ""
    done = command(tmp_path / "set2")
    assert json.loads(done.stdout)["made"] == 0
    assert "metadata.jsonl" in hub.files


@pytest.mark.slow
def test_a_hub_that_refuses_stops_the_run_before_the_first_image(hub, command, tmp_path):
    hub.refuses = "/api/"
    done = command(tmp_path / "set")
    assert done.exit_code == 2
    assert "cannot create or find the dataset me/set" in done.stderr
    assert "rights to create" in done.stderr
    assert not list((tmp_path / "set").rglob("*.png"))


def test_an_upload_that_cannot_be_is_refused_before_the_run(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SynthesisError, match="needs a token that may write"):
        make(tmp_path / "set", pipe, ["heart"], 1, push_to_hub="me/set")
    with pytest.raises(SynthesisError, match="such as user/name, got 'a b'"):
        make(tmp_path / "set", pipe, ["heart"], 1, push_to_hub="a b")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    with pytest.raises(SynthesisError, match=r"the hub takes about 100,000 files .*--format"):
        HubUpload("me/set").prepare(200_000, "imagefolder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SynthesisError, match="HF_HUB_OFFLINE is set"):
        make(tmp_path / "set", pipe, ["heart"], 1, push_to_hub="me/set")
    assert not (tmp_path / "set").exists()
