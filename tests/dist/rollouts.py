"""The processes beside a run of rollouts: the one that has servers sample, by the function that `capstan rollout`
calls, and a server.
"""

import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.dist.runs import outcome_of
from trainer.evaluate.program import Ask
from trainer.evaluate.rollout.serving import judge_answers, roll_out


def sample(run: str) -> dict[str, Any]:
    return outcome_of(lambda: roll_out(Ask("rollout", run), lambda told: None))


def judge(config_text: str) -> dict[str, Any]:
    """The pass of all ranks of `capstan teach`."""
    return judge_answers(Ask("judge", "", config=config_text), lambda told: None)


def serve(port: int) -> None:
    """Answer as a vLLM does, whose adapters say anything, by the seed; now and then it fails. It has the adapters that
    it was told of, until it ends.
    """
    loaded = set[str]()

    def answer(body: dict[str, Any]) -> Any:
        if "lora_name" in body:
            loaded.add(body["lora_name"])
            return b"done"
        if body["model"] not in loaded:
            return 404
        if random.random() < 0.02:
            return 500
        draw = random.Random(body["seed"])
        texts = [[draw.randrange(3, 259) for _ in range(body["max_tokens"])] for _ in range(body["n"])]
        drawn = [{"token_logprobs": [-5.5 - draw.random() for _ in text]} for text in texts]
        return {"choices": [{"token_ids": text, "logprobs": log_p} for text, log_p in zip(texts, drawn, strict=True)]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(found if isinstance(found, int) else 200)
            self.end_headers()
            if not isinstance(found, int):
                self.wfile.write(found if isinstance(found, bytes) else json.dumps(found).encode())

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
