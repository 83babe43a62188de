"""push_to_hub against a server on this machine that speaks the hub's upload protocol; nothing else is contacted."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mim_refiner.errors import InputError
from mim_refiner.export.hub import push_to_hub
from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit

TOKEN = "hf_of_the_test"

# huggingface_hub hands httpx an upload in a way that httpx is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """What was created and uploaded: {repository: {path: content}}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}  # large files by hash

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        self.answer({"id": "someone/encoder", "xetEnabled": False})  # old versions of the client ask

    def do_PUT(self) -> None:
        content = self.body()
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        body, path, hub = self.body(), self.path.partition("?")[0], self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs"):
            self.answer({"error": "not allowed"}, 401)
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            hub.created.append(wanted)
            known = name in hub.repositories
            hub.repositories.setdefault(name, {})
            self.answer({"url": f"{hub.address}/{name}"}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.address}/lfs/{item['oid']}", "header": {}}}}
                for item in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            repository = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repositories[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repositories[repository][value["path"]] = hub.stored[value["oid"]]
            self.answer({"commitUrl": f"{hub.address}/{repository}/commit/abc", "commitOid": "abc"})
        else:
            self.answer({"error": f"unknown {path}"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "export"
    export_timm(Backbone.wrap(create_vit("vit_w32_d2_h4_p8", 16), licence="CC-BY-NC-4.0"), out)
    return out


def test_every_file_arrives_byte_for_byte(hub: Hub, folder: Path) -> None:
    address = push_to_hub(folder, "someone/encoder", private=True)
    assert address == f"{hub.address}/someone/encoder"
    assert hub.repositories == {"someone/encoder": {path.name: path.read_bytes() for path in folder.iterdir()}}
    assert "model.safetensors" in hub.repositories["someone/encoder"]
    assert hub.created[0].get("visibility") == "private" or hub.created[0]["private"] is True  # new client, old client
    push_to_hub(folder, "someone/encoder")  # a repository that exists gets a new commit
    assert len(hub.created) == 2


def test_through_the_command_line(hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mim_refiner.cli.app import main

    out = tmp_path / "out"
    words = ["export", "--model", folder, "--out", out, "--push-to-hub", "someone/again", "--json", "--quiet"]
    assert main([str(word) for word in words]) == 0
    assert json.loads(capsys.readouterr().out)["repository"] == f"{hub.address}/someone/again"
    assert hub.repositories["someone/again"]["config.json"] == (out / "config.json").read_bytes()


def test_a_refusal_keeps_the_export_and_says_how_to_go_on(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mim_refiner import export

    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"status 401; set HF_TOKEN.*the export is complete in .*hf upload someone/x"):
        export(model=str(folder), out=str(out), push_to_hub="someone/x")
    assert (out / "model.safetensors").exists()
    assert hub.repositories == {}


def test_offline_and_unreachable(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(InputError, match="the hub cannot be reached or failed"):
        push_to_hub(folder, "someone/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()  # old clients read it once a session
    with pytest.raises(InputError, match="offline mode is on"):
        push_to_hub(folder, "someone/x")


def test_a_wrong_name_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    from mim_refiner import export

    with pytest.raises(InputError, match="write the repository as owner/name"):
        export(model=str(folder), out=str(tmp_path / "out"), push_to_hub="name-only")
    assert list(tmp_path.iterdir()) == []
