"""Draws the pictures of docs/board.md: `python -m tests.board_pictures` opens the board in Chromium over made-up runs."""

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.browser import chromium
from tests.cli.test_board import board, page_of
from tests.material import make_base, make_data
from trainer.config import dump_config, parse_config
from trainer.run import layout
from trainer.store.store import Store, open_store

FOLDER = Path(__file__).parents[1] / "docs"
_STEPS = 2000
_HEIGHTS = {"runs": 540, "run": 1080, "compare": 900, "samples": 420, "form": 980}
_PROMPT = "A user asks how to cancel an order that has been shipped. Answer in two sentences."
_ANSWERS = {
    200: "You can cancel the order in your account. The shipped order will be cancelled and refunded to you.",
    400: "A shipped order cannot be cancelled any more. Refuse the parcel or send it back within 30 days for a refund.",
}


def make_run(store: Store, name: str, *, rate: float, rank: int, steps: int, ends: str = "", began: float) -> None:
    """A run of so many `steps` of _STEPS, whose curves have the usual shape. Without `ends` it goes on."""
    draw, run = random.Random(name), store.sub(name)
    tree = {
        "run": {"name": name, "store": "runs"},
        "model": {"base": "meta-llama/Llama-3.1-8B"},
        "tuning": {"rank": rank, "alpha": 2 * rank},
        "data": {"train": [{"path": "tickets.jsonl"}], "sequence_length": 4096},
        "optim": {"lr": rate},
        "train": {"steps": _STEPS, "global_batch": 32},
        "track": {"price_per_gpu_hour": 2.5},
    }
    run.put(layout.CONFIG, dump_config(parse_config(json.dumps(tree))).encode())
    text = "".join(json.dumps(record) + "\n" for record in _records(draw, rate, steps, ends, began))
    run.put(layout.metrics(1), text.encode())
    for step, answer in _ANSWERS.items():
        sample = {"prompt": _PROMPT, "base": "You can cancel an order by clicking on cancel.", "adapter": answer}
        run.put(layout.samples(step), json.dumps(sample).encode())


def _records(draw: random.Random, rate: float, steps: int, ends: str, began: float) -> Iterator[dict[str, Any]]:
    facts = {"world_size": 8, "device": "cuda:0 (NVIDIA H100 80GB HBM3)", "machines": ["gpu7"] * 8}
    yield {"kind": "start", "step": 0, "total_steps": _STEPS, "start_seconds": 70.0, "time": began, **facts}
    for step in range(1, steps + 1):
        at, floor = began + 3.2 * step, 1.12 + 900 * (rate - 2e-4) ** 1
        loss = floor + 1.3 * math.exp(-step * rate * 40) + draw.gauss(0, 0.045)
        warm = min(1.0, step / 60)
        yield {
            "kind": "step",
            "step": step,
            "loss": loss,
            "lr": warm * rate * 0.5 * (1 + math.cos(math.pi * step / _STEPS)),
            "grad_norm": 0.4 + 2 * math.exp(-step / 50) + abs(draw.gauss(0, 0.06)),
            "tokens": 131_000,
            "targets": 44_000,
            "seconds": 3.2 + abs(draw.gauss(0, 0.05)),
            "tokens_per_second": 40_900 + draw.gauss(0, 350),
            "mfu": 0.41 + draw.gauss(0, 0.004),
            "device_peak_bytes": 41_300_000_000 + min(step, 90) * 2_000_000,
            "device_watts": 612 + draw.gauss(0, 9),
            "data_seconds": 0.02,
            "time": at,
        }
        if step % 100 == 0:
            held_out = floor + 0.09 + 1.25 * math.exp(-step * rate * 38)
            yield {"kind": "eval", "step": step, "loss": held_out, "time": at}
            yield {
                "kind": "commit",
                "step": step,
                "bytes": 252_000_000,
                "seconds": 4.0,
                "stall_seconds": 0.1,
                "time": at,
            }
    if ends:
        yield {"kind": "end", "outcome": ends, "step": steps, "reason": "", "time": began + 3.2 * steps}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        base, data = make_base(place / "base"), make_data(place / "tickets.jsonl")
        store, now = open_store(str(place / "runs")), time.time()
        for name, rate, rank, steps, ends, ago in (
            ("llama-8b-rank-16", 2e-4, 16, 1412, "", 1412 * 3.2 + 5),
            ("llama-8b-rank-64", 2.6e-4, 64, 2000, "finished", 20_000),
            ("llama-8b-rank-8", 3.4e-4, 8, 2000, "finished", 40_000),
            ("llama-8b-hot", 4.4e-4, 16, 310, "stopped", 60_000),
        ):
            make_run(store, name, rate=rate, rank=rank, steps=steps, ends=ends, began=now - ago)
        run = "/runs/0/llama-8b-rank-16"
        pages = {
            "runs": "/",
            "run": run,
            "compare": "/compare?run=0/llama-8b-rank-64&run=0/llama-8b-rank-8",
            "samples": f"{run}/samples",
            "form": "/new",
        }
        with (
            chromium() as browser,
            board(place / "runs", folder=place) as (address, token),
            page_of(browser, address, token) as tab,
        ):
            for name, path in pages.items():
                tab.set_viewport_size({"width": 1000, "height": _HEIGHTS[name]})
                tab.goto(f"{address}{path}")
                if name == "form":
                    tab.fill("[name=base]", str(base))
                    tab.fill("[name=data]", str(data))
                    tab.press("[name=data]", "Tab")
                    tab.wait_for_selector("#verdict dt:has-text('length')")
                tab.wait_for_timeout(2000)
                tab.screenshot(path=FOLDER / f"board-{name}.png")
                print(f"wrote docs/board-{name}.png", file=sys.stderr)


if __name__ == "__main__":
    main()
