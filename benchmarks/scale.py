"""The load of a run of 16 to 1,024 ranks on rank 0 and on the store, simulated without training.

    python benchmarks/scale.py [--ranks 16 64 256 1024] [--checkpoints 100] [--of run starts meetings groups]

The adapter is that of Llama-3.1-405B with LoRA rank 16 on all linear layers. The code is the run's own, over a store in
memory that counts requests as S3 does: a listing is one for each thousand objects. What a start asks for is counted by
benchmarks/starts.py. Ends with exit code 1 when a bound breaks.
"""

import argparse
import pickle
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for what counts a start

import trainer.run.metrics
import trainer.run.requests
from benchmarks.starts import BASES, PIECE, CountedBase, Groups, Meeting, Start, groups, meeting
from launcher.view.status import read_status
from trainer.config import Checkpoint
from trainer.run import layout
from trainer.run.log import log_allowance
from trainer.run.metrics import Curves, JsonLines
from trainer.run.records import record_line
from trainer.run.segments import Appender
from trainer.state.checkpoint.manifest import (
    CheckpointManifest,
    committed_steps,
    parse_manifest,
    plan_reads,
    read_manifest,
)
from trainer.state.checkpoint.retention import plan_removal, remove
from trainer.state.checkpoint.shard import Contents, EvenDivision, Shard
from trainer.store.store import Buffer, Entry, Store, open_store

LAYERS, HIDDEN, INTERMEDIATE, KEY_VALUE, LORA_RANK = 126, 16384, 53248, 1024, 16
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
HOUR = 3600
STEP_SECONDS, FLUSH_SECONDS = 2, 5  # how often each rank prints a line; `track.flush_seconds`
BOUNDS = {"manifest": 1e6, "commit": 0.2, "requests an hour": 2000}


class CountingStore(Store):
    """In memory; `requests` as a bucket would bill them."""

    def __init__(self) -> None:
        inner = open_store("memory://")
        super().__init__(inner.uri, inner._backend)
        self.requests = 0

    def get(self, key: str) -> bytes:
        self.requests += 1
        return super().get(key)

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        self.requests += 1
        return super().get_range(key, start, end)

    def put_chunks(self, key: str, chunks: Iterable[Buffer], size: int) -> None:
        self.requests += 1
        super().put_chunks(key, chunks, size)

    def create(self, key: str, data: bytes) -> None:
        self.requests += 1
        super().create(key, data)

    def head(self, key: str) -> Entry:
        self.requests += 1
        return super().head(key)

    def delete(self, key: str) -> None:
        self.requests += 1
        super().delete(key)

    def children(self, prefix: str = "") -> tuple[list[str], list[Entry]]:
        names, entries = super().children(prefix)
        self.requests += _pages(len(names) + len(entries))
        return names, entries

    def list(self, prefix: str = "") -> list[Entry]:
        entries = super().list(prefix)
        self.requests += _pages(len(entries))
        return entries


def _pages(count: int) -> int:
    return max(1, -(-count // 1000))


def shapes() -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for layer in range(LAYERS):
        for linear, (inputs, outputs) in LINEARS.items():
            path = f"model.layers.{layer}.{linear}"
            found[f"{path}.lora_A.default.weight"] = [LORA_RANK, inputs]
            found[f"{path}.lora_B.default.weight"] = [outputs, LORA_RANK]
    return found


def manifest(step: int, ranks: int, size: int) -> CheckpointManifest:
    shards = [
        Shard(layout.shard(step, layout.attempt(1, step), rank), size, f"{step * ranks + rank:064x}")
        for rank in range(ranks)
    ]
    return CheckpointManifest(step, 1, ranks, 0.0, step, {}, "d" * 20, {}, {}, {}, {}, {}, 1 / step, shapes(), shards)


@dataclass
class Measured:
    """Seconds and requests of one action on the store."""

    seconds: float
    requests: int
    result: Any


def measured(store: CountingStore, action: Callable[[], Any]) -> Measured:
    before, started = store.requests, time.perf_counter()
    result = action()
    return Measured(time.perf_counter() - started, store.requests - before, result)


@dataclass
class Row:
    """The costs of a run of `ranks` ranks."""

    ranks: int
    manifest_bytes: int
    gathered_bytes: int  # to each rank at a commit
    commit: Measured
    restore: Measured  # read and check the newest manifest, and plan what a rank of another number reads
    retention: Measured
    status: Measured
    hourly: int


def simulate(ranks: int, checkpoints: int) -> Row:
    store = CountingStore()
    numel = sum(rows * columns for rows, columns in shapes().values())
    size = 12 * -(-numel // ranks) + 600_000  # with the header
    for step in range(1, checkpoints + 1):
        saved = manifest(step, ranks, size)
        for shard in saved.shards:
            store.put(shard.key, b"")
        store.put(layout.manifest(step), saved.to_json())
    records = [
        record_line("step", {"step": step, "loss": 1.0, "tokens": 1, "seconds": 2.0})
        for step in range(1, checkpoints + 1)
    ]
    store.put(
        layout.metrics(1), record_line("start", {"generation": 1, "world_size": ranks, "step": 0}) + b"".join(records)
    )
    for rank in range(ranks):
        store.put(layout.rank_log(1, rank), b"step done\n")
    newest = manifest(checkpoints + 1, ranks, size)
    commit = measured(store, lambda: store.create(layout.manifest(newest.step), newest.to_json()))
    content = store.get(layout.manifest(newest.step))
    assert replace(parse_manifest(content, "here"), created=0.0) == newest

    def restore() -> int:
        step = committed_steps(store)[0]
        found = read_manifest(store, step)
        others = max(1, 3 * ranks // 4)
        mine = Contents(EvenDivision(found.numels, others), found.contents.states, others).of(others // 2)
        return len(list(plan_reads(found.contents, mine)))

    rules = Checkpoint(
        keep_last=checkpoints - 1, keep_best=1
    )  # all but one stay, and the best is asked of each manifest
    return Row(
        ranks,
        len(content),
        ranks * len(pickle.dumps(newest.shards[0])),
        commit,
        measured(store, restore),
        measured(store, lambda: remove(store, plan_removal(store, rules, proven=newest.step))),
        measured(store, lambda: read_status(store)),
        requests_at_rest(ranks),
    )


class Timer:
    """In the place of `Every`: the simulated time calls the action."""

    timers: list[tuple[float, Callable[[], object]]]

    def __init__(self, seconds: float, action: Callable[[], object], what: str) -> None:
        self.timers.append((seconds, action))

    def stop(self) -> None:
        """The simulated time has ended already."""


def requests_at_rest(ranks: int) -> int:
    """Requests of all ranks in the second hour of training: each prints a line a step, rank 0 writes records and looks
    for requests. Logs take the decisions of `trainer.run.log`, which reads real pipes and so cannot run a thousand
    times here.
    """
    store, now = CountingStore(), 0.0
    Timer.timers = []
    trainer.run.metrics.Every = trainer.run.requests.Every = Timer  # type: ignore[misc,assignment]
    records, curves = JsonLines(store, 1, FLUSH_SECONDS), Curves(store, 1, trainer.run.metrics.CURVES_SECONDS)
    metrics = trainer.run.metrics.Metrics([records, curves])
    trainer.run.requests.StopSignal(store, watches=True, seconds=FLUSH_SECONDS)
    logs = [Appender(store, layout.rank_log(1, rank)) for rank in range(ranks)]
    allowances = [log_allowance(rank, ranks, lambda: now) for rank in range(ranks)]
    due: dict[int, list[Callable[[], object]]] = defaultdict(list)
    for seconds, action in Timer.timers:
        for moment in range(int(seconds), 2 * HOUR + 1, int(seconds)):
            due[moment].append(action)
    first_hour = 0
    for second in range(1, 2 * HOUR + 1):
        now = float(second)
        if second % STEP_SECONDS == 0:
            metrics.write("step", step=second // STEP_SECONDS, loss=1.0)
            for each in logs:
                each.append(b"step done\n")
        if second % FLUSH_SECONDS == 0:
            for each, allowance in zip(logs, allowances, strict=True):
                if each.unsent and allowance.take():
                    each.flush()
        for action in due[second]:
            action()
        if second == HOUR:
            first_hour = store.requests
    return store.requests - first_hour


def show(rows: list[Row], checkpoints: int) -> Table:
    table = Table(title=f"LoRA rank 16 of a 405B model, {checkpoints} checkpoints in the store")
    for column in ("ranks", "manifest, KB", "gathered, KB", "commit, s", "restore plan, s", "shards read"):
        table.add_column(column, justify="right")
    for column in ("retention, s", "requests", "status, s", "requests", "at rest, requests an hour"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row.ranks:,}",
            f"{row.manifest_bytes / 1000:,.0f}",
            f"{row.gathered_bytes / 1000:,.0f}",
            f"{row.commit.seconds:.3f}",
            f"{row.restore.seconds:.3f}",
            f"{row.restore.result}",
            f"{row.retention.seconds:.2f}",
            f"{row.retention.requests:,}",
            f"{row.status.seconds:.3f}",
            f"{row.status.requests:,}",
            f"{row.hourly:,}",
        )
    return table


def broken_bounds(row: Row) -> list[str]:
    values = {"manifest": row.manifest_bytes, "commit": row.commit.seconds, "requests an hour": row.hourly}
    return [
        f"{row.ranks} ranks: {name} is {value}, allowed {BOUNDS[name]}"
        for name, value in values.items()
        if value > BOUNDS[name]
    ]


def show_starts(rows: list[Start]) -> Table:
    table = Table(title="A start: what all ranks ask a bucket for")
    for column in ("base", "ranks", "scope", "cached"):
        table.add_column(column)
    for column in ("before the weights", "manifest, KB", "GETs", "of 4 MiB", "most of a rank", "TB", "of all"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            *(row.base, f"{row.ranks:,}", row.scope, "yes" if row.cached else "no"),
            *(
                f"{row.metadata:,}",
                f"{row.metadata_bytes / 1000:,.0f}",
                f"{row.gets:,}",
                f"{row.gets * PIECE / row.bytes:.2f}",
            ),
            *(f"{row.most_of_a_rank:,}", f"{row.read / 1e12:.3f}", f"{row.read / row.bytes:.3f}"),
        )
    return table


def show_meetings(rows: list[Meeting]) -> Table:
    table = Table(title="Ranks that meet")
    for column in ("ranks", "one comes later, s", "requests", "a rank", "s after it has come", "CPU s of rank 0"):
        table.add_column(column, justify="right")
    for row in rows:
        each = f"{row.requests / row.ranks:.1f}"
        table.add_row(
            f"{row.ranks:,}", f"{row.late:.0f}", f"{row.requests:,}", each, f"{row.seconds:.2f}", f"{row.cpu:.2f}"
        )
    return table


def show_groups(rows: list[Groups]) -> Table:
    table = Table(title="Making the groups of scope: node")
    for column in ("ranks", "requests", "most of a rank for one"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(f"{row.ranks:,}", f"{row.requests:,}", f"{row.most_of_a_rank}")
    return table


def starts(ranks: list[int]) -> list[Start]:
    found = list[Start]()
    for name, (hub_id, files) in BASES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = CountedBase(name, hub_id, files, Path(folder))
            found += [
                base.start(size, scope, cached=cached)
                for cached in (False, True)
                for scope in ("world", "node")
                for size in ranks
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--checkpoints", type=int, default=100)
    kinds = ("meetings", "groups", "run", "starts")
    parser.add_argument("--of", nargs="+", choices=kinds, default=kinds)
    arguments = parser.parse_args()
    console, broken = Console(width=160), list[str]()
    if "meetings" in arguments.of:  # first, as it forks
        met = [meeting(size, late) for size in arguments.ranks for late in (0.0, 12.0)]
        console.print(show_meetings(met))
        broken += [text for row in met for text in row.broken()]
    if "groups" in arguments.of:  # these fork, too
        made = [groups(size) for size in arguments.ranks]
        console.print(show_groups(made))
        broken += [text for row in made for text in row.broken()]
    if "run" in arguments.of:
        rows = [simulate(ranks, arguments.checkpoints) for ranks in arguments.ranks]
        console.print(show(rows, arguments.checkpoints))
        broken += [text for row in rows for text in broken_bounds(row)]
    if "starts" in arguments.of:
        begun = starts(arguments.ranks)
        console.print(show_starts(begun))
        broken += [text for row in begun for text in row.broken()]
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
