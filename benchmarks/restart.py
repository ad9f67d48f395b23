"""Measures how long a run takes from the death of a rank to its next update, how much of a processor, with a keeper and
without, and what the keeper costs.

    python benchmarks/restart.py [--on here,slurm,ray] [--work DIR] [--turns 2] [--ranks 3]

here: ranks of this machine under `capstan train`. slurm: a node a rank of a real Slurm in namespaces of this machine,
started by srun (root, and Slurm: see .ci/run). ray: a machine a rank of a Ray cluster on this machine.

Each run trains the sample of `capstan smoke` on CPUs. Rank 1 is killed (kill -9) soon after update 9; a checkpoint is
committed every 5. The runs with and without a keeper take turns, so that other work on the machine disturbs both, and
what is printed last are ratios. The processor's seconds are those of the ranks that are started again and, since the
kill, of the keepers, up to the next new update, for each rank. The share of a step that keeping takes is that of the steps before the kill: on several
machines it includes the wait for the copy at another one. The script fails unless all runs of a place have the same
losses.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the cluster that the tests share

from killed import settings

from launcher.cluster.ray.cluster import AGENT_MILLISECONDS
from launcher.smoke.sample import make_sample
from launcher.view.status import read_generation
from tests.slurm.cluster import Cluster, missing
from trainer.store.store import Store, open_store

STEPS, COMMIT_EVERY, KILL_AFTER, KILLED = 40, 5, 9, 1
_LOOK_SECONDS = 0.1
_RATE_SECONDS = 0.3
_PATIENCE_SECONDS = 600.0


class Restart(NamedTuple):
    """Seconds from the kill to the next update, and to the next one that is new; a processor's seconds that a rank took
    until then; bytes of the base that were read.
    """

    next_update: float
    new_update: float
    processor: float
    updates_again: int
    read_bytes: int
    losses: dict[int, float]
    keep_share: float | None


class Run(NamedTuple):
    """A run that was started. `process` is the process of a rank, by the rank and by the number that this says it has.
    `has_ended` raises `SystemExit` if it has failed.
    """

    process: Callable[[int, int], int]
    has_ended: Callable[[], bool]


class Place(NamedTuple):
    """Where runs are started: the settings that they need, and what starts one by its configuration."""

    cluster: dict[str, Any]
    start: Callable[[Path], Run]


def _capstan(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launcher.cli", *arguments]


def _driven(path: Path) -> Run:
    process = subprocess.Popen(_capstan("train", str(path)), start_new_session=True, stdout=subprocess.DEVNULL)

    def has_ended() -> bool:
        if process.poll():
            raise SystemExit(f"the run of {path} ended with exit code {process.returncode}")
        return process.returncode == 0

    return Run(lambda rank, number: number, has_ended)


@contextmanager
def here(_folder: Path, _ranks: int) -> Iterator[Place]:
    yield Place({}, _driven)


@contextmanager
def ray(_folder: Path, ranks: int) -> Iterator[Place]:
    from ray.cluster_utils import Cluster as RayCluster

    os.environ.setdefault("RAY_agent_register_timeout_ms", AGENT_MILLISECONDS)
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # a busy machine imports for long
    little = {"object_store_memory": 80 * 2**20, "include_log_monitor": False}
    cluster = RayCluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **little}, connect=False
    )
    try:
        for number in range(ranks):  # holders of copies tell machines apart by their addresses
            cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number + 2}", **little)
        yield Place({"ray": {"address": str(cluster.address)}}, _driven)
    finally:
        cluster.shutdown()


@contextmanager
def slurm(folder: Path, ranks: int) -> Iterator[Place]:
    with Cluster(folder / "cluster", nodes=ranks) as cluster:

        def process(rank: int, number: int) -> int:
            """The number is the one that the rank has on its own node."""
            (found,) = [there for there in cluster.processes(cluster.nodes[rank]) if _number_inside(there) == number]
            return found

        def submitted(path: Path) -> Run:
            told = cluster.run(*_capstan("submit", "slurm", str(path), "--json"), timeout=300, cwd=folder)
            job = json.loads(told)["jobs"][0]

            def has_ended() -> bool:
                (state,) = cluster.job(job)["job_state"][:1]
                if state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                    raise SystemExit(f"the job of {path} is {state}")
                return state == "COMPLETED"

            return Run(process, has_ended)

        asked = {"nodes": ranks, "launch": "direct", "local_dir": "/mnt", "memory_per_node": "4G"}
        yield Place({"slurm": asked}, submitted)


def _number_inside(pid: int) -> int | None:
    """The number of a process in the innermost namespace that it is in."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return next(int(line.split()[-1]) for line in lines if line.startswith("NSpid:"))


PLACES = {"here": here, "slurm": slurm, "ray": ray}


def killed(place: Place, folder: Path, name: str, ranks: int, *, keeper: bool) -> Restart:
    path = settings(
        folder,
        name,
        train={"steps": STEPS},
        checkpoint={"every_steps": COMMIT_EVERY},
        cluster={"workers": ranks, "keeper": keeper, **place.cluster},
        track={"flush_seconds": 0.2},
    )
    run, started = open_store(str(folder / "runs" / name)), place.start(path)
    _reached(run, started, 1, KILL_AFTER)
    ranks_before = _processes(run, started, 1)
    keepers = {_parent(process) for process in ranks_before} if keeper else set[int]()
    kept = sum(map(_processor, keepers))
    struck = time.time()
    os.kill(ranks_before[KILLED], signal.SIGKILL)
    _reached(run, started, 2, 1)
    last = max(record["step"] for record in read_generation(run, 1)["step"])
    new = next(record for record in _reached(run, started, 2, last + 1)["step"] if record["step"] > last)
    those = [*_processes(run, started, 2), *keepers]
    taken = [(time.time(), sum(map(_processor, those)))]
    time.sleep(_RATE_SECONDS)
    taken.append((time.time(), sum(map(_processor, those))))
    # The update was made a moment before it was seen, and the ranks have gone on.
    (seen, used), (later, more) = taken
    used -= max(0.0, more - used) * (seen - new["time"]) / (later - seen)
    while not started.has_ended():
        time.sleep(10 * _LOOK_SECONDS)
    before, after = (read_generation(run, generation) for generation in (1, 2))
    shares = [record["keep_seconds"] / record["seconds"] for record in before["step"][2:] if "keep_seconds" in record]
    return Restart(
        after["step"][0]["time"] - struck,
        new["time"] - struck,
        (used - kept) / ranks,
        sum(record["step"] <= last for record in after["step"]),
        after["start"][0]["read_bytes"],
        {record["step"]: record["loss"] for record in before["step"] + after["step"]},
        statistics.median(shares) if shares else None,
    )


def _reached(run: Store, started: Run, generation: int, step: int) -> dict[str, list[dict[str, Any]]]:
    """The records of a start once it has made the update of this number."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (over := started.has_ended()) and time.monotonic() < deadline:
        for _ in range(10):
            time.sleep(_LOOK_SECONDS)
            records = read_generation(run, generation)
            if records.get("step") and records["step"][-1]["step"] >= step:
                return records
    raise SystemExit(f"start {generation} of {run.uri} {'ended' if over else 'did not come'} before step {step}")


def _processes(run: Store, started: Run, generation: int) -> list[int]:
    """The processes of the ranks of a start."""
    numbers = read_generation(run, generation)["start"][0]["pids"]
    return [started.process(rank, number) for rank, number in enumerate(numbers)]


def _parent(process: int) -> int:
    return int(_stat(process)[1])


def _processor(process: int) -> float:
    """A processor's seconds that a process has taken, 0 if it has ended."""
    try:
        user, system = _stat(process)[11:13]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _stat(process: int) -> list[str]:
    """The fields of a process after its name."""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def compare(where: str, folder: Path, turns: int, ranks: int) -> Iterator[str]:
    """Yield the lines of what was measured in a place."""
    found: dict[bool, list[Restart]] = {False: [], True: []}
    with PLACES[where](folder, ranks) as place:
        for turn in range(turns):
            for keeper, restarts in found.items():
                name = f"{where}-{'keeper' if keeper else 'without'}-{turn}"
                restarts.append(killed(place, folder, name, ranks, keeper=keeper))
    if len({tuple(sorted(restart.losses.items())) for restarts in found.values() for restart in restarts}) > 1:
        raise SystemExit("the runs have different losses")
    for keeper, restarts in found.items():
        times = [f"{statistics.median(getattr(one, what) for one in restarts):.1f}" for what in Restart._fields[:3]]
        again, read = max(one.updates_again for one in restarts), max(one.read_bytes for one in restarts)
        yield f"| {where}, {'with' if keeper else 'without'} a keeper | {' | '.join(times)} | {again} | {read:,} |"
    shares = [one.keep_share for one in found[True] if one.keep_share is not None]
    for what, name in (("new_update", "time"), ("processor", "processor")):
        pairs = zip(found[False], found[True], strict=True)
        ratio = statistics.median(getattr(kept, what) / getattr(without, what) for without, kept in pairs)
        yield f"{where}: to a new update {ratio:.2f} of the {name} without a keeper (median of {turns} pairs)"
    yield f"{where}: keeping takes {statistics.median(shares):.2%} of a step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="here,slurm,ray", help="places, with commas")
    parser.add_argument("--work", type=Path, help="a folder for the runs; default: a temporary one")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=3)
    given = parser.parse_args()
    lines = list[str]()
    with tempfile.TemporaryDirectory(prefix="capstan-restart-") as temporary:
        folder: Path = given.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_sample(folder / "sample")
        for where in given.on.split(","):
            if where == "slurm" and (why := missing()):
                print(f"slurm is left out: {why}", file=sys.stderr)
                continue
            lines += compare(where, folder, given.turns, given.ranks)
            print("\n".join(lines[-5:]), file=sys.stderr, flush=True)
    print(
        "| | to the next update, s | to a new update, s | a rank's processor, s | updates made again |"
        " bytes of the base |\n|---|---|---|---|---|---|"
    )
    print("\n".join(line for line in lines if line.startswith("|")), end="\n\n")
    print("\n".join(line for line in lines if not line.startswith("|")))


if __name__ == "__main__":
    main()
