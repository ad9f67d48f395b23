"""The cost of a long run's metrics, curves, logs and looks for requests, against a real S3 server and simulated time.

    python benchmarks/metrics.py [--steps 100000] [--seconds-a-step 1] [--ranks 1024]

Rank 0 takes the steps without training, with everything that it writes beside checkpoints; the clock is simulated, the
requests are not. Every rank is taken to print a line a second, which is the worst case. Ends with exit code 1 when one
of the bounds below is broken.
"""

import argparse
import gc
import math
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.smoke.local_s3 import S3Server
from launcher.view.status import read_generation, read_status
from launcher.view.watch import read_log
from trainer.run import layout
from trainer.run.log import log_allowance
from trainer.run.metrics import CURVES_SECONDS, Curves, JsonLines, Metrics
from trainer.run.records import claim_generation, record_line
from trainer.run.requests import StopSignal
from trainer.run.segments import Appender
from trainer.store.store import Entry, Store, open_store

FLUSH_SECONDS = 5.0  # the default of track.flush_seconds
COMMIT_SECONDS = 1800.0
WARM_STEPS = 2000

MOST_WRITTEN = 6.0
"""Bytes written, in bytes of the records, curves and logs themselves."""
MOST_REQUESTS = 2000.0
"""Requests an hour of all ranks together, checkpoints and data left out."""
MOST_MEMORY = 24 * 2**20
"""Bytes that rank 0 grows by after its first steps, whatever the number of steps."""


class CountingStore(Store):
    """A store that counts its requests by verb, and the bytes that it writes by the folder they go to."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.uri, store._backend, store._prefix)
        self.requests: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def put(self, key: str, data: bytes) -> None:
        self.requests["put"] += 1
        self.written[key.partition("/")[0]] += len(data)
        super().put(key, data)

    def delete(self, key: str) -> None:
        self.requests["delete"] += 1
        super().delete(key)

    def head(self, key: str) -> Entry:
        self.requests["head"] += 1
        return super().head(key)


@dataclass
class Rhythms:
    """Simulated time, and what is due in it every so many seconds."""

    now: float = 0.0
    _next: dict[str, float] = field(default_factory=dict)

    def due(self, what: str, seconds: float) -> bool:
        if self.now < self._next.setdefault(what, seconds):
            return False
        self._next[what] += seconds * math.ceil((self.now - self._next[what] + 1e-9) / seconds)
        return True


@dataclass(frozen=True)
class Cost:
    """The cost on rank 0: bytes made and written, requests an hour by verb, and growth of memory in bytes."""

    made: int
    written: int
    requests: dict[str, float]
    memory: int


def step_record(step: int) -> dict[str, Any]:
    """A record of a step like the loop's, with numbers of as many digits."""
    return {
        "step": step,
        "loss": 2.0 + math.sin(step) / 3,
        "lr": 1e-4 * (1 + math.cos(step)),
        "grad_norm": 1.0 + math.cos(step) / 7,
        "tokens": 1_048_576,
        "targets": 901_120 + step % 1000,
        "samples": f"{step * 2654435761 % 2**32:08x}",
        "seconds": round(1 + math.sin(step) / 9, 4),
        "tokens_per_second": round(1_048_576 * (1 + math.sin(step) / 9), 1),
        "data_seconds": round(abs(math.sin(step)) / 1000, 4),
        "data_repeats": 0,
        "host_peak_bytes": 61_234_567_890,
        "device_peak_bytes": 71_234_567_890,
    }


def simulate(folder: CountingStore, steps: int, seconds_a_step: float) -> Cost:
    """Take `steps` as rank 0 of a run."""
    generation = claim_generation(folder)
    records, curves = JsonLines(folder, generation, seconds=1e9), Curves(folder, generation, seconds=1e9)
    metrics = Metrics([records, curves])
    stop = StopSignal(folder, watches=False, seconds=1e9)
    log, time_ = Appender(folder, layout.rank_log(1, 0)), Rhythms()
    allowance = log_allowance(0, 1, clock=lambda: time_.now)
    made = warm = 0
    metrics.write("start", generation=1, world_size=1, step=0, total_steps=steps)
    for step in range(1, steps + 1):
        record = step_record(step)
        metrics.write("step", **record)
        line = f"rank 0 prints a line of some length in step {step}\n".encode()
        log.append(line)
        made += len(record_line("step", record)) + len(line)
        time_.now += seconds_a_step
        if time_.due("flush", FLUSH_SECONDS):
            records.flush()
            if allowance.take():
                log.flush()
        if time_.due("curves", CURVES_SECONDS):
            curves.flush()
        if time_.due("look", min(5.0, FLUSH_SECONDS)):
            stop._look()
        if time_.due("commit", COMMIT_SECONDS):
            metrics.flush()
        if step == min(WARM_STEPS, steps // 2):
            warm = resident()
    requests = {verb: count / (time_.now / 3600) for verb, count in folder.requests.items()}
    memory = resident() - warm
    metrics.close()
    log.close()
    made += sum(entry.size for entry in folder.list(layout.TENSORBOARD))
    return Cost(made, folder.written.total(), requests, memory)


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def others_logs(ranks: int, hours: int = 12) -> float:
    """Requests an hour of the logs of all ranks but the first, each printing all the time, in the last of `hours`."""
    now = [0.0]
    allowances = [log_allowance(rank, ranks, clock=lambda: now[0]) for rank in range(1, ranks)]
    looks = int(3600 / FLUSH_SECONDS)
    sent = 0
    for look in range(hours * looks):
        now[0] = look * FLUSH_SECONDS
        taken = sum(allowance.take() for allowance in allowances)
        sent += taken if look >= (hours - 1) * looks else 0
    return float(sent)


def report(cost: Cost, folder: Store, steps: int, ranks: int) -> Iterator[tuple[str, float, float, str]]:
    """(what, measured, allowed, unit)."""
    yield "bytes written / bytes of the records, curves and logs", cost.written / cost.made, MOST_WRITTEN, ""
    first = sum(cost.requests.values())
    yield "requests an hour of rank 0", first, MOST_REQUESTS, ""
    yield f"requests an hour of {ranks} ranks, all printing", first + others_logs(ranks), MOST_REQUESTS, ""
    yield "growth of rank 0's memory", cost.memory / 2**20, MOST_MEMORY / 2**20, "MiB"
    objects = len(folder.list())
    yield "objects", objects, 4 * cost.made / 2**20 + 10, ""
    began = time.monotonic()
    assert read_status(folder).step == steps
    yield "seconds for a status", time.monotonic() - began, math.inf, "s"
    began = time.monotonic()
    assert [record["step"] for record in read_generation(folder, 1)["step"]] == list(range(1, steps + 1))
    assert read_log(folder, 0).count("\n") == steps
    yield "seconds to read every record and the log", time.monotonic() - began, math.inf, "s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seconds-a-step", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as place, S3Server(Path(place, "s3")) as server:
        os.environ.update(server.environment)
        folder = CountingStore(open_store(f"{server.uri('bench')}/long"))
        began = time.monotonic()
        cost = simulate(folder, given.steps, given.seconds_a_step)
        took = time.monotonic() - began
        hours = given.steps * given.seconds_a_step / 3600
        print(f"{given.steps:,} steps of {given.seconds_a_step:g} s ({hours:,.1f} h), simulated in {took:.0f} s on S3")
        print(
            f"made {cost.made / 1e6:,.1f} MB; written {cost.written / 1e6:,.1f} MB; requests an hour of rank 0: ",
            end="",
        )
        print(", ".join(f"{count:.0f} {verb}" for verb, count in cost.requests.items()))
        broken = 0
        for what, measured, allowed, unit in report(cost, folder, given.steps, given.ranks):
            bound = "" if math.isinf(allowed) else f" (at most {allowed:,.0f})"
            print(f"{what}: {measured:,.2f} {unit}".rstrip() + bound)
            broken += measured > allowed
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
