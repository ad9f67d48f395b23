"""A server that keeps the runs which W&B's client sends it, as far as the client asks: its GraphQL queries and its
stream of files.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.http_server import serving


class Runs:
    """`history` has the lines of each run's history by its id; `exits` the exit codes of the clients that have ended in
    order.
    """

    def __init__(self) -> None:
        self.address = ""
        self.history: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.exits: list[int] = []

    def steps(self, run: str) -> list[int]:
        return [line["_step"] for line in self.history[run]]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """To one of the client's queries; empty where it can do without."""
        place = {"name": "p", "id": "p", "entity": {"id": "e", "name": "e"}}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            return {"model": {**place, "bucket": self._bucket(variables["name"])}}
        if operation == "UpsertBucket":
            run = {"id": variables["name"], "name": variables["name"], "project": place, "config": "{}"}
            return {"upsertBucket": {"bucket": run, "inserted": not self.history[variables["name"]]}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.address}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, run: str) -> dict[str, Any] | None:
        """The run so far, for one that goes on; None for a new one."""
        if not (lines := self.history[run]):
            return None
        tail = json.dumps([json.dumps(lines[-1])])
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        texts = {
            "historyTail": tail,
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
        }
        return {"id": run, "name": run, "displayName": run, "tags": [], **counts, **texts}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        if history := body.get("files", {}).get("wandb-history.jsonl"):
            lines = self.history[run]
            lines[history["offset"] :] = map(json.loads, history["content"])
        if body.get("complete"):
            self.exits.append(body["exitcode"])


@contextmanager
def serve() -> Iterator[Runs]:
    """The runs of a server, as they come in."""
    runs = Runs()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data)
            if self.path == "/graphql":
                answer = {"data": runs.answer(body["operationName"], body.get("variables") or {})}
            else:  # /files/<entity>/<project>/<run>/file_stream
                runs.stream(self.path.split("/")[-2], body)
                answer = {}
            self.send(json.dumps(answer).encode())

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send(b"")

        def send(self, text: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with serving(Handler) as runs.address:
        yield runs
