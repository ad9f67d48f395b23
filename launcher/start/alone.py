"""A run of one rank on this machine: a process beside the driver, without Ray, which would take longer to start than many a small run."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.policy import retry
from launcher.start.attempts import Attempts, Watch, keep_trying
from trainer import errors
from trainer.config import Config, dump_config
from trainer.data.compile.prepare import Datasets
from trainer.errors import NOT_JSON, CapstanError, NonFiniteLoss
from trainer.files.scratch import scratch_folder
from trainer.processes import children
from trainer.processes.devices import local_gpus
from trainer.run.owner import Ownership

_LOOK_SECONDS = 0.5
_WORDS = 300


def is_alone(config: Config) -> bool:
    """Whether a run that joins no cluster is one rank on this machine, which needs nothing that Ray gives."""
    cluster = config.cluster
    if cluster.ray.resources or (cluster.gpus_per_worker or 0) > 1:
        return False
    gpus = 0 if cluster.gpus_per_worker == 0 else local_gpus()
    fewest, most = (cluster.fewest_workers or max(1, gpus)), (cluster.most_workers or max(1, gpus))
    return fewest == most == 1


def run_alone(
    config: Config, datasets: Datasets, owner: Ownership, *, resume: bool, log: Callable[[str], None]
) -> None:
    """Train as one rank beside this process until done or beyond the budgets.

    Raises:
        CapstanError: the run's own, or a crash's with its reason.
    """
    attempts = Attempts(config, datasets, owner, resume)

    def attempt() -> retry.Failure | None:
        log("launch: starts the process of the rank")
        return _attempt(attempts)

    keep_trying(attempts, attempt, log)


def _attempt(attempts: Attempts) -> retry.Failure | None:
    task = {
        "config": dump_config(attempts.config),
        "datasets": asdict(attempts.datasets),
        "resume": attempts.resume,
        "began": attempts.began,
    }
    with scratch_folder("start") as folder:
        given, outcome, said = (Path(folder, name) for name in ("task.json", "outcome.json", "said"))
        given.write_text(json.dumps(task), encoding="utf-8")
        with said.open("wb") as output:
            # Its output is in the rank's log. It has a session of its own, because the driver tells the ranks of a Ctrl-C.
            process = children.start(
                [sys.executable, "-m", "launcher.start.only_rank", str(given), str(outcome)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=output,
                start_new_session=True,
            )
        try:
            _wait(process, Watch(attempts))
        finally:
            process.kill()
            process.wait()
        return _end(process.returncode, outcome, said)


def _wait(process: "subprocess.Popen[bytes]", watch: Watch) -> None:
    """Return when the rank has ended. Raises `Stopped` when it need not go on."""
    while True:
        try:
            process.wait(_LOOK_SECONDS)
            return
        except subprocess.TimeoutExpired:
            watch.look()


def _end(code: int, outcome: Path, said: Path) -> retry.Failure | None:
    """Why the rank has ended, by what it wrote down; None when the run is done."""
    try:
        found = json.loads(outcome.read_text(encoding="utf-8"))
    except (OSError, *NOT_JSON):
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
        last = f" ({lines[-1][:_WORDS]})" if lines and code > 0 else ""
        return retry.classify({0: retry.RankDied(f"{how}{last}")})
    return retry.classify({0: _error(found)}) if found else None


def _error(found: dict[str, Any]) -> Exception:
    """The error that `launcher.start.only_rank` has told of."""
    if not found["ours"]:
        return type(found["kind"], (Exception,), {})(found["text"])
    kind: type[CapstanError] = getattr(errors, found["kind"])
    return kind(found["text"], found["window"]) if issubclass(kind, NonFiniteLoss) else kind(found["text"])
