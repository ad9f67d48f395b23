"""Kills whatever a run of rollouts consists of with SIGKILL: `python -m tests.rollout_kills SEED [KILLS]` prints a line for each kill.

A trainer, two processes that sample for it and race, and the server that they ask are forked, and one of the four is killed at a random moment and
started again, until all kills are done and the run ends. Each chapter is then there once, and the run's losses are bit for bit those of another one that
nobody disturbs and that finds the same chapters. A chapter that is damaged behind that is trained on by nobody.
"""

import random
import socket
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.dist import rollouts, runs
from tests.dist.launch import Group, launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop
from trainer.config import Config, dump_config
from trainer.data.dataset.manifest import MANIFEST
from trainer.data.dataset.rollouts import is_committed, read_figures
from trainer.evaluate.rollout.making import rollouts_of
from trainer.plan.resolve import resolve
from trainer.run import layout
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


class Process:
    """A process that is started again whenever it is killed."""

    def __init__(self, *given: Any) -> None:
        self._given = given
        self._begin()

    def _begin(self) -> None:
        self._running: AbstractContextManager[Group] = running(1, *self._given, timeout=SECONDS)
        self.group = self._running.__enter__()

    def kill(self, *, again: bool) -> None:
        self._running.__exit__(None, None, None)  # SIGKILL
        if again:
            self._begin()


def kill(folder: Path, seed: int, kills: int) -> list[str]:
    """A sentence for all that is not as it should be."""
    workshop, draw = Workshop(folder), random.Random(seed)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    steps = STEPS_A_KILL * (kills + 1)
    given = (f"rollout.engine=[http://127.0.0.1:{port}]", "rollout.max_lag=1", f"train.steps={steps}")
    config = config_of(workshop, "killed", *given)
    run, trainer = begin(workshop, config)
    place, sampler = place_of(workshop, config), (rollouts.sample, run.uri)
    starts = {"trainer": trainer, "sampler": sampler, "other sampler": sampler, "server": (rollouts.serve, port)}
    processes = {name: Process(*start) for name, start in starts.items()}
    for number in range(kills):
        until = STEPS_A_KILL * number
        processes["trainer"].group.wait_until(lambda until=until: is_committed(place, until))
        time.sleep(draw.random())
        name = draw.choice(list(processes))
        processes[name].kill(again=True)
        print(f"{name} killed behind the chapter of step {until + 1}", flush=True)
    ended = processes["trainer"].group.wait()[0]
    for process in processes.values():
        process.kill(again=False)
    if ended["outcome"] != "finished":
        return [f"the run has ended as {ended}"]
    return [*_wrong(workshop, run, place, steps, given), *_damaged(workshop, run, place, steps, given)]


def _wrong(workshop: Workshop, run: Store, place: Store, steps: int, given: tuple[str, ...]) -> list[str]:
    names = sorted(entry.key.split("/")[1] for entry in place.list("data/") if entry.key.endswith(MANIFEST))
    lags = [step - read_figures(place, step)["adapter"] for step in range(steps)]
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


def main(seed: int, kills: int = 20) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wrong = kill(Path(folder), seed, kills)
    print("; ".join(wrong) or f"{kills} kills: each chapter once, the same losses, {time.monotonic() - began:.0f} s")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
