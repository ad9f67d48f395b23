"""A whole sweep on a Ray of its own: trials that end early, a driver that is killed, one that is stopped, and what is
left.

The learning rates go from good to useless, in the order of the trials. Each trial but the first is therefore worse than
all before it when ASHA looks at it, and is stopped at its first look; the second may get to another one if the third is
faster.
"""

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.view.status import read_generation, read_status
from launcher.view.sweep import SweepStatus, read_sweep
from tests.cli.conftest import ENVIRONMENT
from tests.forked import run_command
from tests.material import Workshop
from tests.ray.cluster import PATIENCE, Driver, write
from tests.ray.worker_server import forked_workers
from trainer.store.store import Store, open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]  # a minute on an idle machine of two cores

RATES = [3e-2, 3e-3, 3e-4, 3e-5]
STEPS, GRACE = 32, 4


def capstan(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, folder, ENVIRONMENT, timeout=600)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """A `capstan` process whose own Ray has forked workers."""
    with forked_workers() as workers:
        before = (
            f"from ray._private import ray_constants; ray_constants.SETUP_WORKER_FILENAME = {workers.setup_worker!r}"
        )
        yield partial(Driver, tmp_path, before=before)


def sweep_file(folder: Path, workshop: Workshop) -> str:
    tried = {"optim.lr": {"grid": RATES}}
    settings = (
        f"run.store={folder / 'store'}",
        f"train.steps={STEPS}",
        f"eval.every={GRACE}",
        "data.held_out=0.2",
        "cluster.workers=1",
        "optim.schedule=constant",
        "checkpoint.every_steps=3",
        f"sweep={{settings: {json.dumps(tried)}, grace_steps: {GRACE}, reduction_factor: 2, concurrent: 1}}",
    )
    path = Path(write(folder, workshop, "rates", *settings))
    tree = yaml.safe_load(path.read_text())
    del tree["quant"]["cache"]  # as in a file that says nothing of it
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def starts(run: Store) -> list[dict[str, Any]]:
    """The record of each start that got to train."""
    numbers = range(1, read_status(run).generation + 1)
    return [record for number in numbers for record in read_generation(run, number).get("start", [])]


def samples(run: Store) -> dict[int, str]:
    numbers = range(1, read_status(run).generation + 1)
    return {record["step"]: record["samples"] for number in numbers for record in read_generation(run, number)["step"]}


def log_of_rank(run: Store) -> str:
    return "".join(run.get(e.key).decode() for e in run.list("logs/") if "rank-00000" in e.key)


def states(status: SweepStatus) -> list[str]:
    return [trial.state for trial in status.trials]


def test_a_sweep_is_killed_and_stopped_and_goes_on_and_its_trials_share_the_base(
    workshop: Workshop, tmp_path: Path, driver: Callable[..., Driver]
) -> None:
    config, store = sweep_file(tmp_path, workshop), open_store(str(tmp_path / "store"))
    folder, runs = store.sub("rates"), [store.sub(f"rates-{number}") for number in range(1, len(RATES) + 1)]
    first, second = runs[:2]

    with driver("sweep", config) as running:
        running.wait_for(first, 1, GRACE + 2)
        running.signal(signal.SIGKILL)
        running.end()
    assert read_sweep(folder).state == "silent"
    again = capstan(tmp_path, "sweep", config)
    assert (again.returncode, "continues it; a new sweep needs another name" in again.stderr) == (2, True), again.stderr

    with driver("resume", "rates", "--store", "store") as running:
        running.wait_until(first, 2, lambda seen: seen.get("start"), "the second start")
        alive = capstan(tmp_path, "resume", "rates", "--store", "store")
        assert (alive.returncode, "is in use by `capstan sweep`" in alive.stderr) == (2, True), alive.stderr
        running.wait_until(second, 1, lambda seen: seen.get("start"), "the second trial")
        running.signal(signal.SIGINT)
        assert running.end() == 75, running.log.read_text()
    stopped = read_sweep(folder)
    trial = stopped.trials[1]
    # It may have got to its first look before the request came.
    assert (stopped.state, states(stopped)) == ("stopped", ["finished", trial.state, *["waiting"] * (len(RATES) - 2)])
    words = {"stopped": "with its sweep", "stopped early": "early, as other trials"}[trial.state]
    assert f"stopped at step {trial.step} {words}" in trial.reason
    assert trial.last_commit_step == trial.step < STEPS
    over = 1 if trial.state == "stopped" else 2
    assert f"stopped by SIGINT; {over} of {len(RATES)} trials are over" in running.last_line("capstan: ")

    other = capstan(
        tmp_path,
        "resume",
        "rates",
        "--store",
        "store",
        "sweep.seed=1",
        "sweep.grace_steps=8",
        "sweep.settings={optim.lr: {grid: [1.0]}}",
    )
    assert (other.returncode, "its search does not change" in other.stderr) == (2, True), other.stderr

    with driver("resume", "rates", "--store", "store", "sweep.concurrent=2", "--json") as running:
        assert running.end(2 * PATIENCE) == 0, running.log.read_text()  # three trials
    done = read_sweep(folder)
    assert states(done) == ["finished", *["stopped early"] * (len(RATES) - 1)]
    assert (done.state, done.best) == ("finished", 1)
    # The second trial had been at its first look, so it may have been asked to stop before it was there again.
    late = second if "while the run was starting" in done.trials[1].reason else None
    for trial, run in zip(done.trials[1:], runs[1:], strict=True):
        assert GRACE <= trial.step < STEPS
        assert trial.last_commit_step == trial.step
        assert "early, as other trials of the sweep were better at step" in trial.reason
        assert "early, as other trials of the sweep were better at step" in read_status(run).reason
    assert "Traceback" not in running.log.read_text()
    (printed,) = (json.loads(line) for line in running.log.read_text().splitlines() if line.startswith('{"sweep"'))
    assert printed == asdict(done)
    assert json.loads(folder.get("sweep.json"))["result"] == asdict(done)
    page = folder.get("report.html").decode()
    assert all(f"rates-{number}" in page for number in range(1, len(RATES) + 1))
    assert "optim.lr" in page
    # A trial that is stopped where an evaluation is due goes on without it, and only steps are compared that all trials
    # have.
    if stopped.trials[1].step % GRACE:
        (rate,) = done.sensitivity
        assert (rate.trials, len(rate.means)) == (len(RATES), len(RATES))
        assert rate.step >= GRACE

    # The base was quantized by one trial and read from its cache by the others; what was killed or stopped read it
    # again.
    assert [len(starts(run)) for run in runs] == [2, 1 if late else 3 - over, *[1] * (len(RATES) - 2)]
    assert [log_of_rank(run).count("the quantized base is cached in") for run in runs] == [1, *[0] * (len(RATES) - 1)]
    read = [starts(run)[0]["read_bytes"] for run in runs]
    assert read[0] > read[1]
    assert set(read[1:]) == {read[1]}
    assert len(store.children("bases/")[0]) == 1
    assert len(store.children("data/")[0]) == 2  # the training data and what is held out of it, compiled once

    # The rows of a step are the same in all trials, also where a trial was killed or stopped and went on.
    order = samples(first)
    assert sorted(order) == list(range(1, STEPS + 1))
    for run in runs[1:]:
        assert samples(run).items() <= order.items()

    exported = capstan(tmp_path, *done.next.split()[1:], "--verify")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
