"""Uploads to the hub, by the hub's own client over HTTP to an endpoint here."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from fedhds.errors import UsageError
from fedhds_client.export.hub import push

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """What of the hub's API an upload of small files needs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.server.status != 200:
            self._answer({"error": "no"}, self.server.status)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            exists = name in self.server.repositories
            self.server.repositories.setdefault(
                name, asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            self._answer({"url": f"{self.server.url}/{name}"}, 409 if exists else 200)
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/me/adapter/commit/1"
            self._answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").split("/revision")[0].split("?")[0]
        if name in self.server.repositories:
            self._answer({"id": name, "private": self.server.repositories[name], "sha": "1" * 40, "tags": []})
        else:
            self._answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # The variables were read when the library was imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", server.url, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# A card\n")
    return tmp_path


def test_a_new_repository_is_private_and_has_all_files(hub: Hub, folder: Path) -> None:
    assert push(folder, "me/adapter", public=False).endswith("/commit/1")
    assert hub.repositories == {"me/adapter": True}
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    # Again: the same repository.
    push(folder, "me/adapter", public=False)


def test_only_who_says_so_publishes(hub: Hub, folder: Path) -> None:
    push(folder, "me/open", public=True)
    assert hub.repositories == {"me/open": False}
    hub.files.clear()
    with pytest.raises(UsageError, match="everybody can read it; add --public"):
        push(folder, "me/open", public=False)
    assert not hub.files
    push(folder, "me/open", public=True)
    assert hub.files


@pytest.mark.parametrize(("status", "cure"), [(403, "what the token may do"), (400, "try again later")])
def test_what_the_hub_refuses_is_said(status: int, cure: str, hub: Hub, folder: Path) -> None:
    hub.status = status
    with pytest.raises(UsageError, match=rf"HTTP {status}; .*{cure}"):
        push(folder, "me/adapter", public=False)


def test_mistakes_are_named(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no name of a repository"):
        push(folder, "me/../adapter", public=False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "none"))
    with pytest.raises(UsageError, match="there is no token; set HF_TOKEN"):
        push(folder, "me/adapter", public=False)
