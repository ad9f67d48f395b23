"""Measures how long a run takes from the death of a rank to its next update, with a keeper and without, and what the
keeper costs.

    python benchmarks/restart.py [--on here,slurm,ray] [--work DIR] [--turns 2] [--ranks 3]

here: ranks of this machine under `capstan train`. slurm: a node a rank of a real Slurm in namespaces of this machine,
started by srun (root, and Slurm: see .ci/run). ray: a machine a rank of a Ray cluster on this machine.

Each run trains the sample of `capstan smoke` on CPUs. Rank 1 is killed (kill -9) soon after update 9; a checkpoint is
committed every 5. The runs with and without a keeper take turns, so that other work on the machine disturbs both, and
what is printed last are ratios. The share of a step that keeping takes is that of the steps before the kill: on several
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
from trainer.store.store import open_store

STEPS, COMMIT_EVERY, KILL_AFTER, KILLED = 20, 5, 9, 1
_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 600.0


class Restart(NamedTuple):
    """Seconds from the kill to the next update, and to the next one that is new; bytes of the base that were read."""

    next_update: float
    new_update: float
    updates_again: int
    read_bytes: int
    losses: dict[int, float]
    keep_share: float | None


class Run(NamedTuple):
    """A run that was started. `has_ended` raises `SystemExit` if it has failed."""

    kill: Callable[[int], None]
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

    return Run(lambda pid: os.kill(pid, signal.SIGKILL), has_ended)


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

        def kill(pid: int) -> None:
            """The number is the one that the rank has on its own node."""
            (found,) = [there for there in cluster.processes(cluster.nodes[KILLED]) if _number_inside(there) == pid]
            os.kill(found, signal.SIGKILL)

        def submitted(path: Path) -> Run:
            told = cluster.run(*_capstan("submit", "slurm", str(path), "--json"), timeout=300, cwd=folder)
            job = json.loads(told)["jobs"][0]

            def has_ended() -> bool:
                (state,) = cluster.job(job)["job_state"][:1]
                if state in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                    raise SystemExit(f"the job of {path} is {state}")
                return state == "COMPLETED"

            return Run(kill, has_ended)

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
    run, struck = open_store(str(folder / "runs" / name)), 0.0
    started, deadline = place.start(path), time.monotonic() + _PATIENCE_SECONDS
    while not started.has_ended():
        if time.monotonic() > deadline:
            raise SystemExit(f"the run {name} did not end within {_PATIENCE_SECONDS:g} s")
        for _ in range(50):
            time.sleep(_LOOK_SECONDS)
            steps = read_generation(run, 1).get("step")
            if not struck and steps and steps[-1]["step"] >= KILL_AFTER:
                struck = time.time()
                started.kill(read_generation(run, 1)["start"][0]["pids"][KILLED])
            if struck:
                break
    before, after = (read_generation(run, generation) for generation in (1, 2))
    last = max(record["step"] for record in before["step"])
    new = next(record for record in after["step"] if record["step"] > last)
    shares = [record["keep_seconds"] / record["seconds"] for record in before["step"][2:] if "keep_seconds" in record]
    return Restart(
        after["step"][0]["time"] - struck,
        new["time"] - struck,
        sum(record["step"] <= last for record in after["step"]),
        after["start"][0]["read_bytes"],
        {record["step"]: record["loss"] for record in before["step"] + after["step"]},
        statistics.median(shares) if shares else None,
    )


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
        times = [f"{statistics.median(getattr(one, what) for one in restarts):.1f}" for what in Restart._fields[:2]]
        again, read = max(one.updates_again for one in restarts), max(one.read_bytes for one in restarts)
        yield f"| {where}, {'with' if keeper else 'without'} a keeper | {' | '.join(times)} | {again} | {read:,} |"
    ratio = statistics.median(
        with_one.new_update / without.new_update for without, with_one in zip(found[False], found[True], strict=True)
    )
    shares = [one.keep_share for one in found[True] if one.keep_share is not None]
    yield f"{where}: to a new update {ratio:.2f} of the time without a keeper (median of {turns} pairs)"
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
            print("\n".join(lines[-4:]), file=sys.stderr, flush=True)
    print(
        "| | to the next update, s | to a new update, s | updates made again | bytes of the base |\n|---|---|---|---|---|"
    )
    print("\n".join(line for line in lines if line.startswith("|")), end="\n\n")
    print("\n".join(line for line in lines if not line.startswith("|")))


if __name__ == "__main__":
    main()
