"""A program that answers as `vllm serve` does, whose adapters say anything, by the seed: `python stub_server.py BASE
--host=A --port=N ...`.

It takes adapters by their paths, and each answer holds which GPUs it has. With --silent it never answers, with --broken
it ends at once; --engine starts a process that outlives it unless somebody sees to that, as one of vLLM's does.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer(body: dict[str, Any], loaded: set[str]) -> Any:
    if "lora_path" in body:
        loaded.add(body["lora_name"])
        return b"done"
    if "lora_name" in body:
        loaded.discard(body["lora_name"])
        return b"done"
    if body["model"] not in loaded or "max_tokens" not in body:
        return 404
    draw = random.Random(body["seed"])
    texts = [[draw.randrange(3, 259) for _ in range(body["max_tokens"])] for _ in range(body["n"])]
    drawn = [{"token_logprobs": [-5.5 - draw.random() for _ in text]} for text in texts]
    return {"choices": [{"token_ids": text, "logprobs": log_p} for text, log_p in zip(texts, drawn, strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    for name in ("--silent", "--broken", "--engine"):
        parser.add_argument(name, action="store_true")
    given, _ = parser.parse_known_args()
    loaded = set[str]()
    print(f"serves {given.base} on GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')} of {sys.argv[1:]}", flush=True)
    if given.broken:
        sys.exit("the engine did not start")
    if given.engine:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "engine of " + given.base])
    while given.silent:
        time.sleep(1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(b"")

        def do_POST(self) -> None:
            self._send(answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), loaded))

        def _send(self, found: Any) -> None:
            self.send_response(found if isinstance(found, int) else 200)
            self.end_headers()
            if not isinstance(found, int):
                self.wfile.write(found if isinstance(found, bytes) else json.dumps(found).encode())

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    ThreadingHTTPServer((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
