"""Steps per second under Ray Train beside the same run under torchrun, and how long either takes to its first step.

    python benchmarks/ray_overhead.py [--ranks 1] [--turns 40] [--seconds 6] [--rounds 2]

Both sides run `capstan train` on one configuration with CPU ranks of one thread. First each is started and resumed in
turns, from the command to the end of the first update. Then both are alive at once and take turns: while one works,
every process of the other is stopped, Ray's own included. So both see the same machine within seconds, and what drifts
in it, which is more than what is measured here, falls out of the ratio of each pair of turns. A step's time is what
passed while its side was not stopped. The interval is that of the mean of the pairs' ratios (bootstrap, 95 %).

Ray's own processes (raylet, GCS, controller, agents) want a core besides the ranks': with as many ranks as cores, what
they take is taken from the ranks.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests.material makes the base

from launcher.view.status import read_generation
from tests.material import Workshop
from trainer.config import Config, dump_config, override
from trainer.store.store import Store

BASE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8}
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SIDES = ("torchrun", "Ray Train")
FIRST_STEPS = 10  # of each side are not counted


class Side:
    """One side's `capstan` command with all the processes it starts; leaving the context ends them."""

    def __init__(self, name: str, ranks: int, *arguments: str) -> None:
        command = [sys.executable, "-m", "launcher.cli", *arguments]
        if name == "torchrun":
            torchrun = str(Path(sys.executable).with_name("torchrun"))
            command = [torchrun, "--standalone", "--nproc-per-node", str(ranks), "--no-python", *command]
        self.began = time.time()
        self.turns: list[tuple[float, float]] = []
        self._process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            for process in reversed(self._tree()):
                process.kill()
            self._process.wait()

    def finish(self) -> None:
        if self._process.wait(timeout=600):
            raise SystemExit(f"{self._process.args} ended with exit code {self._process.returncode}")

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def work(self, seconds: float) -> None:
        """A turn: everything runs for so long."""
        self._signal(signal.SIGCONT)
        began = time.time()
        time.sleep(seconds)
        self.turns.append((began, time.time()))
        self.stop()

    def step_seconds(self, run: Store) -> dict[int, list[float]]:
        """Seconds of each step that began and ended in turns, by the turn it ended in."""
        starts, ends = np.array(self.turns).T
        worked = np.concatenate([[0.0], np.cumsum(ends - starts)])

        def active(moment: float) -> tuple[int, float]:
            turn = int(np.searchsorted(starts, moment, side="right")) - 1
            return turn, worked[turn] + min(moment, ends[turn]) - starts[turn]

        moments = [active(record["time"]) for record in read_generation(run, 1)["step"] if record["time"] >= starts[0]]
        found: dict[int, list[float]] = {}
        for (_, before), (turn, after) in zip(moments[FIRST_STEPS:-1], moments[FIRST_STEPS + 1 :], strict=True):
            found.setdefault(turn, []).append(after - before)
        return found

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]


class Bench:
    """A folder with a base, data, and configurations of runs over them."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._workshop = Workshop(folder, **BASE)
        self._workshop.prepare(self._config("data", 1))

    def _config(self, name: str, steps: int) -> Config:
        settings = (f"train.steps={steps}", f"cluster.workers={self._ranks}", "checkpoint.every_steps=1000000")
        return override(self._workshop.config(name, *settings), "data.sequence_length=256", "train.global_batch=2")

    def start(self, side: str, name: str, steps: int) -> tuple[Side, Store]:
        path = self._folder / f"{name}.yaml"
        path.write_text(dump_config(self._config(name, steps)))
        return Side(side, self._ranks, "train", str(path)), self._workshop.store.sub(name)

    def resume(self, side: str, run: Store, steps: int) -> Side:
        return Side(side, self._ranks, "resume", run.uri, f"train.steps={steps}")


def first_steps(bench: Bench, side: str, name: str) -> tuple[float, float]:
    """Seconds to the first step of a new run, and of that run resumed."""
    started, run = bench.start(side, name, 3)
    with started:
        started.finish()
    with bench.resume(side, run, 5) as resumed:
        resumed.finish()
    return tuple(
        read_generation(run, generation)["step"][0]["time"] - process.began
        for generation, process in ((1, started), (2, resumed))
    )


def in_turns(bench: Bench, turns: int, seconds: float) -> dict[str, dict[int, list[float]]]:
    """Each side's seconds a step, by turn."""
    running: dict[str, tuple[Side, Store]] = {}
    try:
        for side in SIDES:
            started, run = running[side] = bench.start(side, f"turns-{side.split()[0]}", 10**6)
            while not read_generation(run, 1)["step"]:
                time.sleep(0.2)
            started.stop()
        for _ in range(turns):
            for started, _ in running.values():
                started.work(seconds)
        for started, _ in running.values():
            started.work(1.0)  # in which the last records reach the store
        return {side: started.step_seconds(run) for side, (started, run) in running.items()}
    finally:
        for started, _ in running.values():
            started.__exit__()


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """The mean of `ratios`, and the 95 % interval of it."""
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios))).mean(axis=1)
    return float(ratios.mean()), *np.quantile(draws, [0.025, 0.975]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=2, help="starts and resumes of each side")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-benchmark-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), given.ranks)
        starts = {
            side: [first_steps(bench, side, f"{side.split()[0]}-{number}") for number in range(given.rounds)]
            for side in SIDES
        }
        taken = in_turns(bench, given.turns, given.seconds)
    table = Table("started by", "seconds a step", "steps", "first step", "resumed")
    for side in SIDES:
        steps = [seconds for turn in taken[side].values() for seconds in turn]
        best = [f"{min(each):.1f} s" for each in zip(*starts[side], strict=True)] or ["", ""]
        table.add_row(side, f"{np.mean(steps):.4f}", str(len(steps)), *best)
    Console().print(table)
    both = sorted(taken["torchrun"].keys() & taken["Ray Train"].keys())
    ratios = np.array([np.mean(taken["torchrun"][turn]) / np.mean(taken["Ray Train"][turn]) for turn in both])
    mean, low, high = interval(ratios)
    print(f"steps/s under Ray against torchrun: {mean:.4f} ({low:.4f} to {high:.4f} over {len(ratios)} pairs of turns)")


if __name__ == "__main__":
    main()
