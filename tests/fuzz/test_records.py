"""Whatever lies in a run's folder, no verb that reads it ends in a traceback: it shows what is sound, or says what is
damaged.
"""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from io import StringIO
from typing import Any

import pytest

from launcher.cluster.slurm.queue import attempts, submitted_jobs
from launcher.report.report import read_report
from launcher.view.checkpoints import checkpoint_table, list_checkpoints
from launcher.view.console import Terminal
from launcher.view.listing import list_runs
from launcher.view.runs import find_run
from launcher.view.status import read_status
from launcher.view.watch import render_status
from tests.unit.run.made_records import CONFIG, NOW, end, start, step, write
from trainer.config import Checkpoint
from trainer.errors import CapstanError, StorageError
from trainer.export.card import model_card_evaluation
from trainer.run import layout
from trainer.run.requests import read_stop
from trainer.state.checkpoint.retention import plan_removal
from trainer.store.store import Store, open_store

WRONG: list[Any] = [None, True, -1, 1e308, float("nan"), 2**70, "", "x", [], [1], {}, {"a": 5}, {"a": None}, [[1, 2]]]
SIDE = {"loss": 1.0, "perplexity": 2.0}
EVALUATION = {
    "step": 4,
    "made": 1.0,
    "base": {"path": "base"},
    "sets": {"s": {"tokens": 3, "base": SIDE, "adapter": SIDE, "difference": 0.1, "interval": [-1.0, 1.0]}},
    "tasks": {"t": {"acc": {"base": 1.0, "adapter": 1.0, "stderr": 0.1, "base_stderr": 0.1}}},
    "bias": {"g": {"pairs": 3, "base": {"mean": 1.0, "std": 1.0}, "adapter": {"mean": 1.0, "std": 1.0}}},
}
OBJECTS = {
    layout.evaluation(4): EVALUATION,
    layout.owner(1): {
        "by": "me",
        "host": "h",
        "place": "p",
        "process": 1,
        "born": "1",
        "since": NOW,
        "time": NOW,
        "run": "demo",
    },
    layout.STOP: {"time": NOW, "by": "me", "reason": "x"},
    layout.samples(2): {"prompt": "p", "base": "b", "adapter": "a"},
    layout.manifest(4): {"format": 3, "sha256": "x", "body": {}},
    layout.ENVIRONMENT: {"python": "3", "versions": {"torch": "1"}, "host": "h"},
    layout.SLURM_JOB: {"submission": "a", "job": 7},
    layout.slurm_attempt(1): {"number": 1, "submission": "a", "job": 7, "restart": 0, "nodes": ["n"], "started": NOW},
}
TIMES = {"launch_seconds": 1.0, "load_seconds": 1.0, "restore_seconds": 0.0, "start_seconds": 3.0}
PLANNED = {"parameters": {"total": 1}, "memory_per_gpu": {"total": 5}, "memory_per_host": {"total": 4}}
RECORDS = [
    {**start(1), **TIMES, "machines": ["a", "b"], "hosts": ["a"], "pids": [1], "data": {"train": "x"}},
    step(1, 2.0),
    {**step(2, 2.0), "epoch": 0, "stall_seconds": 1.0},
    {"kind": "eval", "step": 2, "loss": 1.0, "time": NOW, "set": "s"},
    {"kind": "commit", "step": 2, "bytes": 3, "seconds": 1.0, "time": NOW},
    {"kind": "first_step", "step": 1, "seconds": 2.0, "time": NOW},
    {"kind": "plan", "device": "cpu", **PLANNED, "time": NOW},
    {"kind": "change", "setting": "a.b", "old": 1, "new": 2},
    {"kind": "routing", "step": 1, "shares": {"layers.0": [0.5, 0.5]}},
    end("failed", "r"),
    {"kind": "restart", "reason": "again", "time": NOW},
]


def changed(value: Any, draw: random.Random) -> Any:
    """`value` with other types and other names here and there, and parts that are missing."""
    if draw.random() < 0.15:
        return draw.choice(WRONG)
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if draw.random() > 0.05}
        return {name: changed(item, draw) if draw.random() < 0.5 else item for name, item in kept.items()}
    if isinstance(value, list):
        return [changed(item, draw) if draw.random() < 0.5 else item for item in value]
    return value


def fill(run: Store, draw: random.Random) -> None:
    run.put(layout.CONFIG, draw.choice([CONFIG.encode()] * 5 + [b"a: 1", b"[", b"\xff", b"run: 5"]))
    run.put(layout.settings(1), draw.choice([b"a: 1", b"[", b"\xff", b"- 1", CONFIG.encode()]))
    for generation in (1, 2):
        write(run, generation, *(changed(record, draw) for record in RECORDS if draw.random() < 0.8))
    for key, content in OBJECTS.items():
        run.put(key, json.dumps(changed(content, draw)).encode())


def readers(store: Store, run: Store) -> list[Callable[[], Any]]:
    terminal = Terminal(file=StringIO())
    return [
        lambda: terminal.print(render_status(read_status(run))),
        lambda: json.dumps(asdict(read_status(run))),
        lambda: terminal.print(list_runs(store).table()),
        lambda: read_report([run, run]).page(),
        lambda: terminal.print(checkpoint_table(list_checkpoints(run))),
        lambda: plan_removal(run, Checkpoint(keep_last=1), orphan_hours=1),
        lambda: (submitted_jobs(run), attempts(run), read_stop(run)),
        lambda: model_card_evaluation(run, 4),
    ]


@pytest.mark.parametrize("seed", range(12))
def test_no_content_of_a_runs_folder_is_a_traceback(tmp_path: Any, seed: int) -> None:
    draw, store = random.Random(seed), open_store(str(tmp_path))
    fill(store.sub("demo"), draw)
    for read in readers(store, store.sub("demo")):
        with suppress(CapstanError):
            read()


def test_an_evaluation_of_another_shape_leaves_the_card_whole(tmp_path: Any) -> None:
    run = open_store(str(tmp_path)).sub("demo")
    for found in (
        {"sets": {"a": 5}, "tasks": {}, "bias": {}},
        {"sets": {"a": {"base": 5}}},
        {"tasks": {"a": {"b": 5}}},
    ):
        run.put(layout.evaluation(4), json.dumps(found).encode())
        assert model_card_evaluation(run, 4)


def test_a_store_of_a_name_that_none_can_have_is_one_sentence(tmp_path: Any) -> None:
    with pytest.raises(StorageError, match="cannot read file://.*Could not parse path"):
        find_run("x", f"{tmp_path}/a\x01b")
