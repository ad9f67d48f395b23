"""A Ray cluster of several machines' worth of processes on this one, and `capstan` processes that use it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from ray.cluster_utils import Cluster

from launcher.view.status import read_generation
from tests.cli.conftest import ENVIRONMENT
from tests.forked import start_module
from tests.material import Workshop
from tests.ray.worker_server import Workers, forked_workers
from trainer.store.store import Store

Records = dict[str, list[dict[str, Any]]]


class Forking(Cluster):
    """A cluster whose workers are forked."""

    def __init__(self, workers: Workers, **head: Any) -> None:
        self.workers = workers
        super().__init__(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **head})

    def add_node(self, *args: Any, **given: Any) -> Any:
        little = {"object_store_memory": 80 * 2**20, "include_log_monitor": False}
        return super().add_node(*args, **little, setup_worker_path=self.workers.setup_worker, **given)


@contextmanager
def ray_cluster(nodes: int, cpus: int = 2, **head: Any) -> Iterator[Forking]:
    """A head without room for ranks, where drivers live, and `nodes` machines with room for `cpus` ranks each."""
    with forked_workers() as workers:
        cluster = Forking(workers, **head)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=cpus)
            yield cluster
        finally:
            cluster.shutdown()


PATIENCE = 600.0  # seconds; a restart takes 20 of them on an idle machine
# A look reads all that a run has recorded, on a processor that the run needs.
_LOOK_SECONDS = 0.2


class Driver:
    """A `capstan` process, which runs the code `before` first; leaving the context kills it. Unless it is `real`, it
    and what it starts are forked.
    """

    process: "subprocess.Popen[bytes]"

    def __init__(
        self, folder: Path, *arguments: str, module: str = "launcher.cli", before: str = "", real: bool = False
    ) -> None:
        self.log = folder / "driver.log"
        with self.log.open("ab") as log:
            if real:
                command = [sys.executable, "-m", module, *arguments]
                self.process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)
            else:
                self.process = start_module([module, *arguments], folder, ENVIRONMENT, log, before)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, run: Store, generation: int, step: int) -> Records:
        """The generation's records once it has reached `step` and committed something."""
        return self.wait_until(
            run, generation, lambda seen: seen.get("commit") and seen["step"][-1]["step"] >= step, f"step {step}"
        )

    def wait_until(self, run: Store, generation: int, holds: Callable[[Records], Any], what: str) -> Records:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            records = read_generation(run, generation)
            if holds(records):
                return records
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(_LOOK_SECONDS)
        raise AssertionError(f"{what} did not come in generation {generation}: {self.log.read_text()}")

    def wait_for_words(self, words: str) -> None:
        """Return once the process has printed `words`."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(_LOOK_SECONDS)

    def last_line(self, start: str) -> str:
        """The last line of its output that begins with `start`."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)][-1]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, patience: float = PATIENCE) -> int:
        return self.process.wait(timeout=patience)


def steps(run: Store, *generations: int) -> dict[int, dict[str, Any]]:
    """The run's history: of a step taken twice, the later generation's."""
    return {record["step"]: record for number in generations for record in read_generation(run, number)["step"]}


def losses(run: Store, *generations: int) -> dict[int, float]:
    return {step: record["loss"] for step, record in steps(run, *generations).items()}


def write(folder: Path, workshop: Workshop, name: str, *overrides: str) -> str:
    """Its paths are relative to `folder`, the driver's directory: ranks must find them too."""
    paths = {
        "run.store": workshop.folder / "store",
        "model.base": workshop.base,
        "sharding.deepspeed": workshop.policy,
    }
    relative = [f"{key}={os.path.relpath(path, folder)}" for key, path in paths.items()]
    relative.append(f"data.train=[{{path: {os.path.relpath(workshop.data, folder)}}}]")
    settings = ["cluster.workers=2", "train.steps=60", "checkpoint.every_steps=5", *relative, *overrides]
    config = workshop.config(name, *settings)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")
