"""Kills commands with SIGKILL and looks for what they leave: `python -m tests.kills [KILLS]` prints a line for each.

Every process that a command starts, or has started, inherits a variable of its environment, by which it is found.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import yaml

from tests.hub import serve_hub
from tests.material import Workshop, commit, make_data
from trainer.config import dump_config
from trainer.processes import guard

SECONDS = 5.0
"""So long after its command a process may still be there."""
_MARK = "CAPSTAN_TEST_KILLED"
CAPSTAN = [sys.executable, "-m", "launcher.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
ENVIRONMENT = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}
LATEST = {
    "build": 4.0,
    "train on 1 rank": 15.0,
    "export": 8.0,
    "push": 8.0,
    "evaluate": 15.0,
    "evaluate on 2 ranks": 20.0,
    "evaluate on 3 ranks": 20.0,
    "teach on 2 ranks": 20.0,
}
"""Seconds after which a kill of such a command still meets it at work; of others half a minute."""


class Killed:
    """Runs over small material in `folder`, each command with names of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workshop = folder, Workshop(folder)
        self.run = self.workshop.store.sub("done")
        other = make_data(folder / "eval.jsonl", seed=9)
        config = self.workshop.config("done", f"data.eval=[{{path: {other}}}]")
        commit(self.run, config, dataset=self.workshop.prepare(config).train)

    def command(self, name: str) -> list[str]:
        own, out = f"run{uuid4().hex[:6]}", str(self.folder / uuid4().hex[:6])
        match name.split():
            case ["build"]:
                return [*CAPSTAN, "data", "build", self._config(own, run={"store": out})]
            case ["train", _, number, *_]:
                return [*CAPSTAN, "train", self._config(own, cluster={"workers": int(number)}, train={"steps": 2000})]
            case ["torchrun"]:
                return [*TORCHRUN, *CAPSTAN, "train", self._config(own, train={"steps": 2000})]
            case ["evaluate", *rest]:
                return [*CAPSTAN, "evaluate", self.run.uri, f"cluster.workers={rest[1] if rest else 1}"]
            case ["teach", _, number, *_]:
                objective = {"name": "distil", "teacher": str(self.workshop.base), "top_k": 8}
                return [*CAPSTAN, "teach", self._config(own, objective=objective, cluster={"workers": int(number)})]
            case ["generate"]:
                return [*CAPSTAN, "generate", self.run.uri, "--base"]
            case ["export"]:
                return [*CAPSTAN, "export", self.run.uri, out, "--merge", "--verify"]
            case ["push"]:
                return [*CAPSTAN, "push", self.run.uri, f"hf://me/{own}", "--merged"]
            case ["sweep"]:
                tried = {"settings": {"optim.lr": {"grid": [1e-3, 1e-4]}}}
                return [
                    *CAPSTAN,
                    "sweep",
                    self._config(own, sweep=tried, train={"steps": 2000}, cluster={"workers": 1}),
                ]
            case ["smoke"]:
                return [*CAPSTAN, "smoke"]
        raise AssertionError(name)

    def _config(self, name: str, **sections: Mapping[str, object]) -> str:
        tree = yaml.safe_load(dump_config(self.workshop.config(name, "cluster.gpus_per_worker=0")))
        for section, changes in sections.items():
            tree[section] = {**tree.get(section, {}), **changes}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    def left_by(
        self, name: str, after: float, environment: Mapping[str, str], reached: Callable[[], bool] = lambda: False
    ) -> tuple[dict[int, str], bool]:
        """The processes, with their commands, that are there `SECONDS` after the command was killed, which it was `after` seconds
        or as soon as what is `reached`; and whether it was still at work."""
        mark = uuid4().hex
        given = {**ENVIRONMENT, **environment, _MARK: mark}
        silent = subprocess.DEVNULL
        command = self.command(name)
        with subprocess.Popen(
            command, env=given, cwd=self.folder, stdin=subprocess.PIPE, stdout=silent, stderr=silent
        ) as process:
            ends = time.monotonic() + after
            while time.monotonic() < ends and process.poll() is None and not reached():
                time.sleep(0.02)
            was_at_work = process.poll() is None
            process.kill()
        # Where other work has the processors, what ends takes longer to end.
        deadline = time.monotonic() + SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        while (left := _alive(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in left:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return left, was_at_work


def _alive(mark: str) -> dict[int, str]:
    found = dict[int, str]()
    for number in guard.family(f"{_MARK}={mark}".encode()):
        with suppress(OSError):
            found[number] = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    return {number: command for number, command in found.items() if command}  # a zombie has none


NAMES = (
    "build",
    "train on 1 rank",
    "train on 2 ranks",
    "train on 3 ranks",
    "torchrun",
    "evaluate",
    "evaluate on 2 ranks",
    "generate",
    "export",
    "push",
    "sweep",
    "smoke",
)
MORE = ("evaluate on 3 ranks", "teach on 2 ranks")
"""Commands whose ranks start as those of others do: they are killed at random alone."""


def main(kills: int) -> int:
    wrong = 0
    draw, names = random.Random(), (*NAMES, *MORE)
    with tempfile.TemporaryDirectory() as folder, serve_hub() as hub:
        killed = Killed(Path(folder))
        for number in range(kills):
            name = names[number % len(names)]
            after = draw.uniform(0.3, LATEST.get(name, 30.0))
            left, was_at_work = killed.left_by(name, after, hub.environment if name == "push" else {})
            wrong += bool(left)
            what = "killed" if was_at_work else "had ended, looked at"
            print(f"{name}, {what} after {after:.1f} s: {left or 'nothing left'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40))
