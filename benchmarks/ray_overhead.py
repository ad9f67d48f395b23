"""Steps per second under Ray Train beside the same run under torchrun, and how long either takes to its first step.

    python benchmarks/ray_overhead.py [--ranks 1] [--rounds 3] [--steps 40]

Both sides run `capstan train` on one configuration with CPU ranks of one thread, in turns. Ray's own processes (raylet, GCS,
controller, agents) want a core besides the ranks': with as many ranks as cores, what they take is taken from the ranks.
A step's time is the median of a run's steps after the fifth, from the run's own metrics; a side's is the best of its rounds. "First step" is from the command to
the end of the first update; "resumed" the same for `capstan resume` of the finished run with more steps to take.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.status import read_generation
from tests.material import Workshop
from trainer.config import dump_config, override
from trainer.store import Store

BASE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(side: str, ranks: int, *arguments: str) -> float:
    """Run the command to its end; seconds since 1970 at its start."""
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    if side == "torchrun":
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        command = [torchrun, "--standalone", "--nproc-per-node", str(ranks), "--no-python", *command]
    started = time.time()
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
    return started


def seconds_to_first_step(store: Store, generation: int, started: float) -> float:
    return read_generation(store, generation)["step"][0]["time"] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    step_seconds: dict[str, list[float]] = {"torchrun": [], "Ray Train": []}
    first: dict[str, list[float]] = {side: [] for side in step_seconds}
    resumed: dict[str, list[float]] = {side: [] for side in step_seconds}
    with tempfile.TemporaryDirectory(prefix="capstan-benchmark-") as folder:
        workshop = Workshop(Path(folder), **BASE)
        for number in range(given.rounds):
            for side in step_seconds:
                name = f"{side.split()[0]}-{number}"
                settings = (
                    f"train.steps={given.steps}",
                    f"cluster.workers={given.ranks}",
                    "checkpoint.every_steps=1000",
                )
                config = override(workshop.config(name, *settings), "data.sequence_length=256")
                workshop.prepare(config)
                path = Path(folder) / f"{name}.yaml"
                path.write_text(dump_config(config))
                store = workshop.store.sub(name)
                began = run(side, given.ranks, "train", str(path))
                first[side].append(seconds_to_first_step(store, 1, began))
                step_seconds[side].append(
                    statistics.median(record["seconds"] for record in read_generation(store, 1)["step"][5:])
                )
                began = run(side, given.ranks, "resume", store.uri, f"train.steps={given.steps + 2}")
                resumed[side].append(seconds_to_first_step(store, 2, began))
    table = Table("started by", "seconds a step", "steps/s against torchrun", "first step", "resumed")
    best = min(step_seconds["torchrun"])
    for side, seconds in step_seconds.items():
        table.add_row(
            side,
            f"{min(seconds):.4f}",
            f"{best / min(seconds):.3f}",
            f"{min(first[side]):.1f} s",
            f"{min(resumed[side]):.1f} s",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
