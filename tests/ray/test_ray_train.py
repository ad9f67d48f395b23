"""Runs that are stopped, refused or mistaken, on a Ray cluster of one machine."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from launcher.cluster.ray.train import _original
from launcher.policy.retry import RankDied
from launcher.view.status import read_generation, read_status
from launcher.view.watch import read_log
from tests.cli.conftest import ENVIRONMENT
from tests.dist import runs
from tests.dist.launch import launch
from tests.forked import run_command
from tests.material import Workshop
from tests.ray.cluster import PATIENCE, Driver, alive, losses, steps, write
from trainer.config import dump_config
from trainer.run.requests import request_stop
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import open_store

pytestmark = pytest.mark.timeout(1200)

STEPS = 60


@pytest.mark.long
def test_a_run_stops_while_it_loads_and_while_it_trains_and_goes_on_where_it_was(
    workshop: Workshop, tmp_path: Path, address: str
):
    store = workshop.folder / "store"
    run = open_store(str(store)).sub("stopped")
    settings = (f"cluster.ray.address={address}", f"train.steps={STEPS}", "run.seed=4")

    def resumed(*overrides: str) -> Driver:
        return Driver(tmp_path, "resume", "stopped", "--store", str(store), "--json", *overrides)

    # While the ranks load the model: the state before the first step is committed.
    config = write(tmp_path, workshop, "stopped", *settings)
    with Driver(tmp_path, "train", config) as driver:
        driver.wait_until(run, 1, lambda _: run.exists("metrics/000001.jsonl"), "a rank")
        driver.signal(signal.SIGTERM)
        assert driver.end() == 75, driver.log.read_text()
    started = read_generation(run, 1)["start"]
    assert read_status(run).state == "stopped"
    assert committed_steps(run)[0] <= 2

    # While it trains, by `capstan stop`.
    with resumed() as driver:
        pids = driver.wait_for(run, 2, step=7)["start"][0]["pids"]
        request_stop(run, by="capstan stop")
        assert driver.end() == 75, driver.log.read_text()
        assert json.loads(driver.last_line("{"))["state"] == "stopped"
    assert committed_steps(run)[0] == read_status(run).step >= 7

    assert not any(map(alive, [*pids, *(started[0]["pids"] if started else ())]))

    with resumed() as driver:
        assert driver.end() == 0, driver.log.read_text()
    assert read_log(run, 0).count("attention: ") == 1, "a rank's log has each line once"
    for text in (read_log(run, 0), driver.log.read_text()):  # no terminal: the driver prints what happens, too
        for words in (
            "load: reads the base",
            "first step: ",
            f"\nstep {STEPS}/{STEPS}, loss ",
            f"step {STEPS}: committed",
        ):
            assert words in text
    assert "launch: Ray starts the processes of 2 ranks" in driver.log.read_text()
    undisturbed = workshop.config("not-stopped", *settings)
    launch(2, runs.run, dump_config(undisturbed), workshop.prepare(undisturbed).train)
    expected = workshop.store.sub("not-stopped")
    assert losses(run, 1, 2, 3) == losses(expected, 1)
    assert [step["samples"] for step in steps(run, 1, 2, 3).values()] == [
        step["samples"] for step in steps(expected, 1).values()
    ]


def refusal(done: "subprocess.CompletedProcess[str]") -> str:
    """The sentence that a command ended with."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("capstan: ")][-1]


# These come first, as ranks of another run that have not quite ended would take the room that one of them asks for.
@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            ["cluster.workers=16", "cluster.gpus_per_worker=1", "cluster.ray.start_timeout=1"],
            (
                "the cluster has no room after 1 seconds",
                "for 16 ranks",
                "asked for 16 GPUs, the cluster has 0",
                "cluster.ray.start_timeout",
            ),
        ),
        (["cluster.ray.start_timeout=0.01"], ("cluster.ray.start_timeout: 2 ranks", "have not begun")),
        (["cluster.ray.address=127.0.0.1:1"], ("no Ray cluster answers at '127.0.0.1:1'", "ray start --head")),
        (["cluster.ray.address=http://127.0.0.1:8265"], ("submit ray", "head:6379")),
    ],
    ids=["too-many", "slow", "unreachable", "dashboard"],
)
def test_an_impossible_request_is_one_sentence(
    workshop: Workshop, tmp_path: Path, address: str, override: list[str], words: tuple[str, ...]
):
    config = write(tmp_path, workshop, "impossible", f"cluster.ray.address={address}", *override)
    said = refusal(run_command(["train", config], tmp_path, ENVIRONMENT, PATIENCE))
    for word in words:
        assert word in said
    assert not open_store(str(workshop.folder / "store")).exists("impossible/config.yaml")


@pytest.mark.long
def test_a_mistake_found_by_a_rank_ends_the_run_at_once_with_its_sentence(
    workshop: Workshop, tmp_path: Path, address: str
):
    settings = ("model.attention=varlen", "retry.failures=3", f"cluster.ray.address={address}")
    config = write(tmp_path, workshop, "mistaken", *settings)
    done = run_command(["train", config, "--json"], tmp_path, ENVIRONMENT, PATIENCE)
    assert "model.attention: 'varlen' cannot run here" in refusal(done)
    status = read_status(open_store(str(workshop.folder / "store")).sub("mistaken"))
    assert (status.state, status.generation) == ("failed", 1)
    told = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert (told["state"], told["reason"]) == ("failed", status.reason)


def test_a_rank_that_cannot_be_reached_may_have_gone_with_its_machine():
    died, unreachable = _original(ActorDiedError()), _original(ActorUnavailableError("connection reset", None))
    assert isinstance(died, RankDied)
    assert died.confirmed
    assert isinstance(unreachable, RankDied)
    assert not unreachable.confirmed
