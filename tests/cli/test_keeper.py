"""A run with `cluster.keeper` whose processes are killed: nothing that was trained is trained again, nothing is read
again, and every bit is that of a run that nobody disturbs.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.kills import CAPSTAN, ENVIRONMENT
from tests.material import Workshop
from trainer.config import dump_config
from trainer.run.records import Record, generations, read_records
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.store import Store

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

STEPS, COMMIT_EVERY, RANKS = 200, 50, 2


@dataclass
class Run:
    folder: Store
    driver: "subprocess.Popen[bytes]"

    @property
    def keeper(self) -> psutil.Process:
        for child in psutil.Process(self.driver.pid).children():
            with suppress(psutil.NoSuchProcess):  # others come and go
                if "launcher.start.keeper" in child.cmdline():
                    return child
        raise AssertionError("the driver has no keeper")

    def records(self, kind: str, generation: int) -> list[Record]:
        return [record for record in read_records(self.folder, generation) if record["kind"] == kind]

    def wait_for_steps(self, count: int) -> list[int]:
        """Wait until the newest start has made so many updates, and return its ranks' processes."""
        while True:
            assert self.driver.poll() is None, "the run has ended before what was to happen to it"
            newest = max(generations(self.folder), default=0)
            if newest and len(self.records("step", newest)) >= count:
                return list(self.records("start", newest)[0]["pids"])
            time.sleep(0.02)

    def killed(self, *ranks: int) -> None:
        """Kill ranks in the middle of training, and wait for those that follow them."""
        before, pids = max(generations(self.folder)), self.wait_for_steps(3)
        for rank in ranks:
            os.kill(pids[rank], signal.SIGKILL)
        self.wait_for_start_after(before)

    def wait_for_start_after(self, generation: int) -> None:
        while max(generations(self.folder)) == generation or not self.records("start", max(generations(self.folder))):
            assert self.driver.poll() is None, "the run has ended"
            time.sleep(0.02)


@contextmanager
def running(workshop: Workshop, name: str, *overrides: str) -> Iterator[Run]:
    config = workshop.config(
        name,
        f"cluster.workers={RANKS}",
        f"train.steps={STEPS}",
        f"checkpoint.every_steps={COMMIT_EVERY}",
        "model.dtype=fp32",
        "retry.failures=9",
        *overrides,
    )
    file = workshop.folder / f"{name}.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    with (workshop.folder / f"{name}.out").open("wb") as out:
        driver = subprocess.Popen(
            [*CAPSTAN, "train", str(file)], env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True
        )
        try:
            yield Run(workshop.store.sub(name), driver)
        finally:
            driver.kill()
            driver.wait()


def finished(run: Run) -> None:
    assert run.driver.wait(timeout=300) == 0


def updates(run: Run) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each update, in the order in which they were made."""
    numbers = sorted(generations(run.folder))
    records = [record for number in numbers for record in run.records("step", number)]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def shards(run: Run) -> list[str]:
    return [shard.sha256 for shard in read_manifest(run.folder, max(committed_steps(run.folder))).shards]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("keeper"))


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop) -> Run:
    with running(workshop, "undisturbed") as run:
        finished(run)
    return run


def test_ranks_that_are_killed_lose_no_update_and_read_nothing(workshop: Workshop, undisturbed: Run) -> None:
    with running(workshop, "killed", "cluster.keeper=true") as run:
        run.wait_for_steps(1)
        keeper = run.keeper
        for ranks in ([1], [0], [0, 1]):
            run.killed(*ranks)
        finished(run)
    assert updates(run) == updates(undisturbed)
    assert shards(run) == shards(undisturbed)
    starts = [run.records("start", number)[0] for number in sorted(generations(run.folder))]
    assert [start.get("restored") for start in starts] == [None, "memory", "memory", "memory"]
    assert starts[0]["read_bytes"] > 0
    assert [start["read_bytes"] for start in starts[1:]] == [0, 0, 0]
    assert not keeper.is_running()


def test_a_driver_that_is_killed_takes_the_keeper_and_its_ranks_along(workshop: Workshop) -> None:
    with running(workshop, "driverless", "cluster.keeper=true") as run:
        run.wait_for_steps(1)
        keeper = run.keeper
        family = [keeper, *keeper.children()]
        assert len(family) == 1 + RANKS
        run.driver.kill()
        _, left = psutil.wait_procs(family, timeout=10)
    assert not left


def test_without_a_keeper_updates_are_made_again(workshop: Workshop, undisturbed: Run) -> None:
    """The control: what the other tests look at would be seen."""
    with running(workshop, "again") as run:
        run.wait_for_steps(3)
        run.killed(1)
        finished(run)
    assert len(updates(run)) > STEPS
    assert dict(zip(*columns(run), strict=True)) == dict(zip(*columns(undisturbed), strict=True))
    assert run.records("start", 2)[0]["read_bytes"] > 0


def columns(run: Run) -> tuple[list[int], list[tuple[float, float]]]:
    every = updates(run)
    return [step for step, *_ in every], [(loss, norm) for _, loss, norm in every]


def flip(keeper: int, name: str, place: int) -> None:
    """Flip a bit of the memory that the keeper calls `name`."""
    for file in Path(f"/proc/{keeper}/fd").iterdir():
        if os.readlink(file).startswith(f"/memfd:{name} "):
            with file.open("r+b", buffering=0) as memory:
                (byte,) = os.pread(memory.fileno(), 1, place)
                os.pwrite(memory.fileno(), bytes([byte ^ 4]), place)
            return
    raise AssertionError(f"{keeper} keeps no {name}")


@pytest.mark.parametrize("what", ["shares", "updates"])
def test_a_wrong_byte_is_found_and_read_again(workshop: Workshop, undisturbed: Run, what: str) -> None:
    with running(workshop, f"flipped-{what}", "cluster.keeper=true") as run:
        pids, keeper = run.wait_for_steps(3), run.keeper
        keeper.suspend()  # no rank starts before the byte is flipped
        os.kill(pids[1], signal.SIGKILL)
        time.sleep(1)
        for place in (
            [100] if what == "shares" else [5000, os.stat(_memory(keeper.pid, "rank 1: updates")).st_size - 5000]
        ):
            flip(keeper.pid, f"rank 1: {what}", place)
        keeper.resume()
        run.wait_for_start_after(1)
        finished(run)
    (again,) = run.records("start", 2)
    assert (again["read_bytes"] > 0) == (what == "shares")
    assert (len(updates(run)) > STEPS) == (what == "updates"), "from the last commit"
    assert dict(zip(*columns(run), strict=True)) == dict(zip(*columns(undisturbed), strict=True))
    assert shards(run) == shards(undisturbed)


def _memory(keeper: int, name: str) -> Path:
    (found,) = (
        file for file in Path(f"/proc/{keeper}/fd").iterdir() if os.readlink(file).startswith(f"/memfd:{name} ")
    )
    return found


def test_a_keeper_that_is_killed_is_done_without(workshop: Workshop, undisturbed: Run) -> None:
    with running(workshop, "orphaned", "cluster.keeper=true") as run:
        run.wait_for_steps(3)
        run.keeper.kill()
        run.wait_for_start_after(1)
        finished(run)
    assert dict(zip(*columns(run), strict=True)) == dict(zip(*columns(undisturbed), strict=True))
    assert shards(run) == shards(undisturbed)
    said = (workshop.folder / "orphaned.out").read_text()
    assert "cluster.keeper: the keeper has ended. The ranks start without it." in said
