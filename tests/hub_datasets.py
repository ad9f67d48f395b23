"""A stand-in for the Hub's HTTP API, as far as huggingface_hub asks it for data sets: listing, revisions and files.

Source of the routes and headers: huggingface_hub's hf_api.py (`list_repo_tree`, `dataset_info`) and file_download.py.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from tests.http_server import serving

TOKEN = "hf_of_the_test"
COMMIT = hashlib.sha1(b"commit").hexdigest()


@contextmanager
def serve_hub(repositories: dict[str, dict[str, bytes]], private: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a Hub with these data sets, of one revision each; the `private` ones ask for `TOKEN`."""

    class Handler(_Handler):
        repos, closed = repositories, private

    with serving(Handler) as address:
        yield address


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, dict[str, bytes]]]
    closed: ClassVar[tuple[str, ...]]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""

    def _answer(self, body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        _, owner, name, *rest = parts[is_api:]
        files = self.repos.get(f"{owner}/{name}")
        if files is None or (f"{owner}/{name}" in self.closed and self.headers["Authorization"] != f"Bearer {TOKEN}"):
            return self._send(401 if files else 404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if rest[1:2] and rest[1] not in ("main", COMMIT):
            return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        if is_api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": key, "size": len(data), "oid": _oid(data)} for key, data in files.items()]
            return self._send(200, json.dumps(tree).encode(), body)
        if is_api:
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": key} for key in files]}
            return self._send(200, json.dumps(info).encode(), body)
        data = files.get("/".join(rest[2:]))
        if data is None:
            return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        return self._send(200, data, body, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
