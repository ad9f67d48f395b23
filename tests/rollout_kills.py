"""Kills whatever a run of rollouts consists of with SIGKILL: `python -m tests.rollout_kills SEED [KILLS [--vllm]]`
prints a line for each kill.

`capstan train` drives a rank and keeps `capstan rollout` alive beside it; another `capstan rollout` races with that
one, and both ask a server: a small one of the tests', or with --vllm a real one (`make vllm`). Driver, rank, both of
these and the server are killed at random moments, and what nobody of them starts again is given again as a user would,
until all kills are done and the run ends. Each chapter is then there once, the run's losses are bit for bit those of
another one that nobody disturbs and that finds the same chapters, and no process is left. A chapter that is damaged
behind that is trained on by nobody.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

from launcher.smoke.local_s3 import undisturbed_ports
from tests.cli.conftest import ROOT
from tests.dist import rollouts, runs
from tests.dist.launch import Group, launch, running
from tests.dist.test_resume import losses
from tests.kills import CAPSTAN, ENVIRONMENT, MARK, family, left_by
from tests.material import Workshop
from tests.real_vllm import TARGETS, start_vllm
from trainer.config import Config, dump_config
from trainer.data.dataset.manifest import MANIFEST
from trainer.data.dataset.rollouts import chapter_figures, is_committed
from trainer.evaluate.rollout.making import rollouts_of
from trainer.evaluate.rollout.serving import has_finished
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store

STEPS_A_KILL = 2
SECONDS = 1800.0


def config_of(workshop: Workshop, name: str, *overrides: str) -> Config:
    return workshop.config(
        name,
        *("objective.name=grpo", "rollout.reward=tests.dist.rewards:printable", "rollout.answers=8"),
        *("rollout.max_tokens=1", "quant.type=none", "model.dtype=fp32", "optim.lr=5.0e-2", "optim.schedule=constant"),
        *("optim.warmup_steps=0", "train.global_batch=8", "checkpoint={every_steps: 3, keep_last: 1000}"),
        *overrides,
    )


def place_of(workshop: Workshop, config: Config) -> Store:
    """The folder of the run's answers."""
    key = workshop.prepare(config).train
    return rollouts_of(resolve(config), workshop.store.sub(config.run.name), key)


def begin(workshop: Workshop, config: Config) -> tuple[Store, tuple[Any, ...]]:
    """The folder of a new run, and the arguments of its ranks."""
    run = workshop.store.sub(config.run.name)
    run.put(layout.CONFIG, dump_config(config).encode())
    return run, (runs.run, dump_config(config), workshop.prepare(config).train)


def train(workshop: Workshop, config: Config, world_size: int = 1) -> dict[int, float]:
    run, given = begin(workshop, config)
    outcomes = launch(world_size, *given, timeout=SECONDS)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}, outcomes
    return losses(run)


def fed(workshop: Workshop, source: Store, name: str, *overrides: str, world_size: int = 1) -> dict[int, float]:
    """The losses of a run that finds the chapters of another one."""
    config = config_of(workshop, name, *overrides)
    run = workshop.store.sub(name)
    for entry in source.list("rollouts/"):
        run.put(entry.key, source.get(entry.key))
    return train(workshop, config, world_size)


class Alive:
    """The processes of a run whose settings are in the file `config`, each of which is killed by its name."""

    def __init__(self, folder: Path, run: Store, config: Path, server: "Process | Served") -> None:
        self._folder, self._run, self._config, self._server = folder, run, config, server
        self.log, self._mark, self._others = folder / "log", uuid4().hex, uuid4().hex
        self._driver = self._start("train", str(config), mark=self._mark)
        self._other: subprocess.Popen[bytes] | None = None

    def tend(self) -> int | None:
        """Start again what has ended, but for a driver that is content; its exit code, or None while it works."""
        code = self._driver.poll()
        if code:
            again = ("resume", self._run.uri) if committed_steps(self._run) else ("train", str(self._config))
            self._driver, code = self._start(*again, mark=self._mark), None
        if self._run.exists(layout.CONFIG) and (self._other is None or self._other.poll() is not None):
            self._other = self._start("rollout", self._run.uri, mark=self._others)
        return code

    def until(self, holds: Callable[[], Any]) -> Any:
        """What `holds` says as soon as that is something, or the driver has ended."""
        deadline = time.monotonic() + SECONDS
        while not (found := holds()) and self.tend() is None:
            assert time.monotonic() < deadline, self.log.read_text(errors="replace")[-5000:]
            time.sleep(0.1)
        return found

    def kill(self, name: str) -> dict[int, str]:
        """Kill what is called so, as soon as it is there; returns the processes that are left of a driver, which should
        be none.
        """
        if name == "server":
            self._server.kill(again=True)
            return {}
        (pid,) = self.until(lambda: self._pids(name)) or (0,)
        if not pid:  # the run has ended
            return {}
        os.kill(pid, signal.SIGKILL)
        return left_by(self._mark) if name == "driver" and self._driver.wait() else {}

    def _pids(self, name: str) -> list[int]:
        if name in ("driver", "other rollout"):
            process = self._driver if name == "driver" else self._other
            return [process.pid] if process is not None and process.poll() is None else []
        words = {"rank": "launcher.start.local_ranks", "rollout": f"rollout {self._run.uri}"}[name]
        return [pid for pid, command in family(self._mark).items() if words in command][:1]

    def end(self) -> dict[int, str]:
        """End what is left to end; returns what is left for all that."""
        for process in filter(None, (self._driver, self._other)):
            process.kill()
            process.wait()
        self._server.kill(again=False)
        return left_by(self._mark) | left_by(self._others)

    def _start(self, *words: str, mark: str) -> "subprocess.Popen[bytes]":
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), MARK: mark}
        with self.log.open("ab") as log:
            return subprocess.Popen([*CAPSTAN, *words], cwd=self._folder, env=environment, stdout=log, stderr=log)


class Process:
    """The small server of the tests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._begin()

    def _begin(self) -> None:
        self._running: AbstractContextManager[Group] = running(1, rollouts.serve, self._port, timeout=SECONDS)
        self._running.__enter__()

    def kill(self, *, again: bool) -> None:
        self._running.__exit__(None, None, None)  # SIGKILL
        if again:
            self._begin()


class Served:
    """A real vLLM."""

    def __init__(self, base: Path, port: int) -> None:
        self._base, self._port = base, port
        self._begin()

    def _begin(self) -> None:
        self._process = start_vllm(self._base, self._base.parent / "vllm.log", self._port)

    def kill(self, *, again: bool) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if again:
            self._begin()


KINDS = ("driver", "rank", "rollout", "other rollout", "server")


def kill(folder: Path, seed: int, kills: int, *, real: bool = False) -> list[str]:
    """A sentence for all that is not as it should be."""
    workshop, draw = Workshop(folder, hidden_size=128 if real else 64), random.Random(seed)  # vLLM wants heads of 32
    (port,) = undisturbed_ports(1)
    steps = STEPS_A_KILL * (kills + 1)
    given = (f"rollout.engine=[http://127.0.0.1:{port}]", "rollout.max_lag=1", f"train.steps={steps}")
    given += ("retry.failures=1000", "cluster={workers: 1, gpus_per_worker: 0, threads_per_worker: 1}")
    given += (f"tuning.targets=[{', '.join(TARGETS)}]",) if real else ()
    config = config_of(workshop, "killed", *given)
    run, file = workshop.store.sub("killed"), folder / "killed.yaml"
    file.write_text(dump_config(config))
    place = place_of(workshop, config)
    alive = Alive(folder, run, file, Served(workshop.base, port) if real else Process(port))
    names, wrong = [KINDS[number % len(KINDS)] for number in range(kills)], list[str]()
    draw.shuffle(names)
    try:
        for number, name in enumerate(names):
            alive.until(lambda until=STEPS_A_KILL * number: is_committed(place, until))
            time.sleep(draw.random())
            if left := alive.kill(name):
                wrong.append(f"a driver that was killed has left {left}")
            print(f"{name} killed behind the chapter of step {STEPS_A_KILL * number + 1}", flush=True)
        alive.until(lambda: alive.tend() is not None)
    finally:
        if left := alive.end():
            wrong.append(f"in the end there are still {left}")
    if not has_finished(run):
        return [*wrong, f"the run has not finished: {alive.log.read_text(errors='replace')[-3000:]}"]
    return [*wrong, *_wrong(workshop, run, place, steps, given), *_damaged(workshop, run, place, steps, given)]


def _wrong(workshop: Workshop, run: Store, place: Store, steps: int, given: tuple[str, ...]) -> list[str]:
    names = sorted(entry.key.split("/")[1] for entry in place.list("data/") if entry.key.endswith(MANIFEST))
    lags = [step - chapter_figures(place, step)["adapter"] for step in range(steps)]
    found = {
        "chapters are lacking, or there twice": names == [layout.chapter_of_rollouts(step) for step in range(steps)],
        "an adapter was older than rollout.max_lag": all(0 <= lag <= 1 for lag in lags),
        "the losses are not those of the run that nobody disturbs": losses(run) == fed(workshop, run, "fed", *given),
    }
    return [sentence for sentence, holds in found.items() if not holds]


def _damaged(workshop: Workshop, run: Store, place: Store, steps: int, given: tuple[str, ...]) -> list[str]:
    """Damage the last chapter but one, of which a new run learns nothing."""
    folder = layout.dataset(layout.chapter_of_rollouts(steps - 2))
    (key,) = (entry.key for entry in place.list(folder) if "/columns" in entry.key)
    content = bytearray(place.get(key))
    content[-1] ^= 1
    place.put(key, bytes(content))
    config = config_of(workshop, "damaged", *given)
    other, trainer = begin(workshop, config)
    for entry in run.list("rollouts/"):
        other.put(entry.key, run.get(entry.key))
    outcome, learnt = launch(1, *trainer, timeout=SECONDS)[0], losses(other)
    said = str(outcome)
    print(said, flush=True)
    wrong = max(learnt, default=0) != steps - 2 or outcome["outcome"] == "finished" or "columns" not in said
    return [f"a damaged chapter ended in {said} after step {max(learnt, default=0)}"] if wrong else []


def main(seed: str, kills: str = "20", server: str = "") -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wrong = kill(Path(folder), int(seed), int(kills), real=server == "--vllm")
    print("; ".join(wrong) or f"{kills} kills: each chapter once, the same losses, {time.monotonic() - began:.0f} s")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
