"""A stand-in for the Hugging Face Hub's HTTP API, as far as an upload needs it, on this machine.

Its answers are those that huggingface_hub 2.4 reads (hf_api.py, _commit_api.py, lfs.py). A large object is one whose
file is a safetensors file or larger than 2,000 bytes; it is kept by its hash, and no commit names one that was never
uploaded.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

import yaml

from tests.http_server import serving

TOKEN, READER = "hf_writer", "hf_reader"


@dataclass
class Hub:
    """It keeps what it holds, and what it was asked. `hold_after`: so many large objects are taken; the next upload
    never ends, and `holding` is set."""

    url: str = ""
    repositories: dict[str, str] = field(default_factory=dict)  # name -> visibility
    branches: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)  # hashes, in the order in which they came
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # branch -> path -> content
    cards: list[dict[str, Any]] = field(default_factory=list)
    hold_after: int | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)  # one upload at a time is taken or held
    holding: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that pushes to it. Without Xet, whose storage is another service: huggingface_hub
        then uploads as it does to older Hubs."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if token != TOKEN:
            said = "Invalid credentials." if token != READER else "You don't have the rights to do this."
            return self._answer({"error": said}, 403 if token == READER else 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        parts = path.split("/")
        handlers = {"preupload": self._preupload, "commit": self._commit, "branch": self._branch}
        if path.endswith("/objects/batch"):
            return self._batch(json.loads(body))
        return handlers[parts[5]](parts[6], body)

    def _validate(self, card: str) -> None:
        data = yaml.safe_load(card.split("---")[1])
        self.hub.cards.append(data)
        wrong = isinstance(data.get("base_model"), str) and data["base_model"].count("/") != 1
        errors = [{"message": '"base_model" must be a Hub id'}] if wrong else []
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, asked["visibility"])
        self._answer({"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, status)

    def _branch(self, branch: str, body: bytes) -> None:
        there, _ = branch in self.hub.branches, self.hub.branches.add(branch)
        self._answer({"error": "Reference already exists"} if there else {}, 409 if there else 200)

    def _preupload(self, branch: str, body: bytes) -> None:
        def mode(file: dict[str, Any]) -> str:
            return "lfs" if file["path"].endswith(".safetensors") or file["size"] > 2000 else "regular"

        files = json.loads(body)["files"]
        self._answer({"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in files]})

    def _batch(self, asked: dict[str, Any]) -> None:
        def actions(oid: str) -> dict[str, Any]:
            return {} if oid in self.hub.objects else {"actions": {"upload": {"href": f"{self.hub.url}/objects/{oid}"}}}

        objects = [{"oid": o["oid"], "size": o["size"], **actions(o["oid"])} for o in asked["objects"]]
        self._answer({"transfer": "basic", "objects": objects})

    def do_GET(self) -> None:
        """Answers whether a repository is private, or with the files of a branch."""
        parts = self.path.partition("?")[0].split("/")
        if parts[5:6] == ["tree"]:
            files = self.hub.files.get(parts[6], {})
            rows = [{"type": "file", "path": name, "oid": "0", "size": len(data)} for name, data in files.items()]
            self._answer(rows)
        elif (name := "/".join(parts[3:5])) in self.hub.repositories:
            self._answer({"id": name, "private": self.hub.repositories[name] == "private"})
        else:
            self._answer({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        with self.hub.turn:
            taken = self.hub.hold_after is None or len(self.hub.objects) < self.hub.hold_after
            if taken:
                data = self._body()
                assert hashlib.sha256(data).hexdigest() == oid
                self.hub.objects[oid] = data
                self.hub.uploads.append(oid)
        if taken:
            self._answer({})
        else:
            self.hub.holding.set()
            self.hub.released.wait(60)

    def _commit(self, branch: str, body: bytes) -> None:
        files = self.hub.files.setdefault(branch, {})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit, repository = hashlib.sha1(body).hexdigest(), "/".join(self.path.split("/")[3:5])
        self._answer(
            {
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.hub.url}/{repository}/commit/{commit}",
                "hookOutput": "",
            }
        )


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    with serving(type("Answers", (_Answers,), {"hub": hub})) as hub.url:
        try:
            yield hub
        finally:
            hub.released.set()
