"""A user of the cluster: submits runs with the real command, and watches what becomes of them."""

import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launcher.cluster.slurm.queue import attempts
from launcher.policy.jobs import Attempt
from launcher.view.status import read_generation
from tests.cli.conftest import ENVIRONMENT
from tests.forked import run_command
from tests.material import Workshop
from tests.slurm.cluster import LOGIN, Cluster
from trainer.run.records import generations
from trainer.store.store import Store

PATIENCE = 600.0  # seconds; a start of Ray takes 20 of them on an idle machine
LAYOUT = (
    "cluster.workers=2",
    "cluster.slurm.nodes=2",
    "cluster.slurm.memory_per_node=4G",  # two jobs fit on a node
    "cluster.slurm.local_dir=/mnt",
)


# A machine's network and host name become those of the process.
_ENTER = """
import ctypes, os
for space in ("net", "uts"):
    file = os.open(f"/proc/{init}/ns/{{space}}", os.O_RDONLY)
    assert ctypes.CDLL(None, use_errno=True).setns(file, 0) == 0, os.strerror(ctypes.get_errno())
    os.close(file)
"""
# A second and more is left on a fast machine for what happens to a run in its first twenty steps.
STEPS = 150


class Site:
    """Runs over two nodes with one CPU rank each, of `STEPS` steps with a commit after every fifth."""

    def __init__(self, cluster: Cluster, folder: Path, **sizes: Any) -> None:
        self.cluster = cluster
        self.folder = folder
        self.workshop = Workshop(folder, **sizes)

    def config(self, name: str, *overrides: str) -> Path:
        settings = [*LAYOUT, f"train.steps={STEPS}", *overrides]
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.workshop.config(name, *settings).model_dump(mode="json")))
        return path

    def capstan(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """The command on the login machine: in its network, under its name, and with Slurm's programs."""
        environment = {**ENVIRONMENT, **self.cluster.environment}
        enter = _ENTER.format(init=self.cluster.init(LOGIN))
        return run_command([*map(str, arguments)], self.folder, environment, PATIENCE, enter)

    def submit(self, config: Path, *arguments: str) -> int:
        """The job's number."""
        done = self.capstan("submit", "slurm", config, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["jobs"][0]

    def status(self, name: str) -> dict[str, Any]:
        return json.loads(self.capstan("status", self.folder / "store" / name, "--json").stdout)

    def run(self, name: str) -> Store:
        return self.workshop.store.sub(name)

    def attempts(self, name: str) -> list[Attempt]:
        return attempts(self.run(name))

    def losses(self, name: str) -> dict[int, float]:
        """Step -> loss; where a generation took a step again, its value counts."""
        run = self.run(name)
        records = [one for number in sorted(generations(run)) for one in read_generation(run, number).get("step", ())]
        return {record["step"]: record["loss"] for record in records}

    def output(self, name: str) -> str:
        """The output of the run's jobs."""
        return "\n".join(path.read_text() for path in sorted((self.folder / "store" / name).glob("slurm-*.out")))

    def wait_for(self, name: str, condition: Callable[[], Any], what: str) -> None:
        """Until `condition` holds; a time-out shows what the run's jobs printed."""
        try:
            self.cluster.wait_until(condition, PATIENCE, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output(name)}") from None

    def wait_for_step(self, name: str, generation: int, step: int = 6) -> dict[str, Any]:
        """The start record of a generation that has committed something and reached `step`."""

        def reached() -> bool:
            records = read_generation(self.run(name), generation)
            return bool(records.get("commit")) and records["step"][-1]["step"] >= step

        self.wait_for(name, reached, f"generation {generation} of {name} reaches step {step}")
        return read_generation(self.run(name), generation)["start"][0]

    def boot_all(self) -> None:
        """Boot the nodes that are powered off."""
        for node in self.cluster.off():
            self.cluster.boot(node)

    def let_time_run_out(self, job: int, signal_seconds: int) -> None:
        """Give a running job the smallest time limit that still leaves it its `signal_seconds`.

        Slurm counts in minutes, looks every 30 seconds, and sends the signal up to 30 seconds early.
        """
        ran = time.time() - self.cluster.job(job)["start_time"]["number"]
        minutes = math.ceil((ran + signal_seconds) / 60)
        self.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def assert_ends(self, name: str, job: int, state: str, exit_code: int | None = None) -> None:
        """Wait for the job's end, and check how Slurm calls it."""
        active = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD"}
        self.wait_for(name, lambda: not active & set(self.cluster.job(job)["job_state"]), f"job {job} ends")
        found = self.cluster.job(job)
        assert found["job_state"] == [state], self.output(name)
        if exit_code is not None:
            assert found["exit_code"]["return_code"]["number"] == exit_code, self.output(name)

    def assert_nothing_is_left(self) -> None:
        """No process of ours on any node, and no file on any node's own disk; what is just ending gets a few
        seconds.
        """
        for node in self.cluster.nodes:
            try:
                self.cluster.wait_until(lambda node=node: not self.cluster.processes(node), 10, f"{node} is empty")
            except AssertionError as error:
                raise AssertionError(f"left on {node}: {self.cluster.processes(node)}") from error
            assert self.cluster.run("ls", "-A", "/mnt", on=node) == "", node
