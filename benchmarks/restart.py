"""Measures how long a run takes from the death of a rank to its next update, with a keeper and without.

    python benchmarks/restart.py [--work DIR] [--turns 2] [--ranks 3]

Both runs train the sample of `capstan smoke` on this machine's CPU. Rank 1 is killed (kill -9) soon after update 9; a
checkpoint is committed every 5. The two runs take turns, so that other work on the machine disturbs both. The script
fails unless both have the same losses.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from killed import settings

from launcher.smoke.sample import make_sample
from launcher.view.status import read_generation
from trainer.store.store import open_store

STEPS, COMMIT_EVERY, KILL_AFTER, KILLED = 20, 5, 9, 1


class Restart(NamedTuple):
    """Seconds from the kill to the next update, and to the next one that is new; bytes of the base that were read."""

    next_update: float
    new_update: float
    updates_again: int
    read_bytes: int
    losses: dict[int, float]


def killed(folder: Path, name: str, ranks: int, *, keeper: bool) -> Restart:
    path = settings(
        folder,
        name,
        train={"steps": STEPS},
        checkpoint={"every_steps": COMMIT_EVERY},
        cluster={"workers": ranks, "keeper": keeper},
        track={"flush_seconds": 0.2},
    )
    run, struck = open_store(str(folder / "runs" / name)), 0.0
    command = [sys.executable, "-m", "launcher.cli", "train", str(path)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.02)
            records = read_generation(run, 1)
            if not struck and records["step"] and records["step"][-1]["step"] >= KILL_AFTER:
                struck = time.time()
                os.kill(records["start"][0]["pids"][KILLED], signal.SIGKILL)
        if process.returncode:
            raise SystemExit(f"the run {name} ended with exit code {process.returncode}")
    before, after = (read_generation(run, generation) for generation in (1, 2))
    last = max(record["step"] for record in before["step"])
    new = next(record for record in after["step"] if record["step"] > last)
    return Restart(
        after["step"][0]["time"] - struck,
        new["time"] - struck,
        sum(record["step"] <= last for record in after["step"]),
        after["start"][0]["read_bytes"],
        {record["step"]: record["loss"] for record in before["step"] + after["step"]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the runs; default: a temporary one")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-restart-") as temporary:
        folder: Path = given.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_sample(folder / "sample")
        found: dict[bool, list[Restart]] = {False: [], True: []}
        for turn in range(given.turns):
            for keeper, restarts in found.items():
                name = f"{'keeper' if keeper else 'without'}-{turn}"
                restarts.append(killed(folder, name, given.ranks, keeper=keeper))
    if len({tuple(sorted(restart.losses.items())) for restarts in found.values() for restart in restarts}) > 1:
        raise SystemExit("the runs have different losses")
    print(
        "| | to the next update, s | to a new update, s | updates made again | bytes of the base |\n|---|---|---|---|---|"
    )
    for keeper, restarts in found.items():
        times = [f"{statistics.median(getattr(one, what) for one in restarts):.1f}" for what in Restart._fields[:2]]
        again, read = max(one.updates_again for one in restarts), max(one.read_bytes for one in restarts)
        print(f"| {'with' if keeper else 'without'} a keeper | {' | '.join(times)} | {again} | {read:,} |")
    ratio = statistics.median(
        with_one.new_update / without.new_update for without, with_one in zip(found[False], found[True], strict=True)
    )
    print(f"\nto a new update: {ratio:.2f} of the time without a keeper (median of {given.turns} pairs)")


if __name__ == "__main__":
    main()
