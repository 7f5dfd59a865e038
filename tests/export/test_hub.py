"""Upload of an exported folder to a local stand-in for the hub."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clipkd.export.hub import upload


class Hub(BaseHTTPRequestHandler):
    """Takes one repository and one commit of small files."""

    calls: list[tuple[str, Any]]
    refuse = False

    def reply(self, code: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.calls.append((self.path, None))
        self.reply(200, {"id": "me/student", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.calls.append((self.path, text))
        if self.refuse:
            self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif self.path == "/api/repos/create":
            self.reply(200, {"url": f"{server_url(self)}/me/student", "name": "me/student"})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(text)["files"]]
            self.reply(200, {"files": [{**each, "shouldIgnore": False} for each in files]})
        elif "/commit/" in self.path:
            commit = {"commitUrl": f"{server_url(self)}/me/student/commit/{'a' * 40}", "commitOid": "a" * 40}
            self.reply(200, {**commit, "success": True})
        else:
            self.reply(404, {"error": self.path})

    def log_message(self, *_: Any) -> None:
        pass


def server_url(handler: BaseHTTPRequestHandler) -> str:
    return f"http://127.0.0.1:{handler.server.server_address[1]}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[type[Hub], str]]:
    """A signed-in user's hub and its address."""
    kind = type("OneHub", (Hub,), {"calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield kind, address
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "student" / "onnx").mkdir(parents=True)
    (tmp_path / "student" / "README.md").write_text("# student\n")
    (tmp_path / "student" / "onnx" / "vision_model.onnx").write_bytes(b"\x08\x0a")
    return tmp_path / "student"


@pytest.mark.parametrize("private", [True, False])
def test_the_whole_folder_is_one_commit(hub: tuple[type[Hub], str], folder: Path, private: bool) -> None:
    kind, endpoint = hub
    address = upload(folder, "me/student", private=private)
    assert address.startswith(endpoint)
    posts = {path: text for path, text in kind.calls if text is not None}
    made = json.loads(posts["/api/repos/create"])
    assert (made["name"], made["organization"]) == ("student", "me")
    assert made.get("private", made.get("visibility") == "private") is private
    lines = [json.loads(line) for line in posts["/api/models/me/student/commit/main"].splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert files == {"README.md": b"# student\n", "onnx/vision_model.onnx": b"\x08\x0a"}


def test_a_refusal_and_a_wrong_name_are_errors_and_the_folder_stays(hub: tuple[type[Hub], str], folder: Path) -> None:
    hub[0].refuse = True
    words = r"is written, but the hub did not take it as me/student: .*rights.*hf upload me/student"
    with pytest.raises(ValueError, match=words):
        upload(folder, "me/student", private=True)
    with pytest.raises(ValueError, match="is written, but the hub did not take it as no/such/name"):
        upload(folder, "no/such/name", private=True)
    assert (folder / "README.md").is_file()
