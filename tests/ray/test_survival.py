"""A run over several machines loses ranks, machines and its driver, and ends with the losses of an undisturbed one."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

from launcher.view.status import read_generation, read_status
from launcher.view.watch import read_driver_log, read_log
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop
from tests.ray.cluster import Driver, Forking, alive, ray_cluster, steps, write
from trainer.config import dump_config
from trainer.store.store import Store, open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

STEPS, COMMIT_EVERY = 300, 4  # The last event comes near step 60; on a fast machine it takes a second to be noticed.
SETTINGS = (
    "cluster.workers=[1,2]",
    "cluster.ray.resize_interval=1",
    f"train.steps={STEPS}",
    f"checkpoint.every_steps={COMMIT_EVERY}",
    "timeouts.step=15",
)


def undisturbed(workshop: Workshop, *settings: str) -> Store:
    """The same run by two ranks of a process group, without Ray."""
    name = "undisturbed-otherwise" if settings else "undisturbed"
    if workshop.store.exists(f"{name}/config.yaml"):
        return workshop.store.sub(name)
    config = workshop.config(name, f"train.steps={STEPS}", *settings)
    outcomes = launch(2, runs.run, dump_config(config), workshop.prepare(config).train, timeout=300)
    assert {outcome["outcome"] for outcome in outcomes} == {"finished"}
    return workshop.store.sub(name)


def test_a_run_survives_its_ranks_machines_and_driver(workshop: Workshop, tmp_path: Path):
    run = open_store(str(workshop.folder / "store")).sub("survivor")
    with ray_cluster(2, cpus=1) as cluster:
        address = str(cluster.address)
        config = write(tmp_path, workshop, "survivor", *SETTINGS, f"cluster.ray.address={address}")
        with Driver(tmp_path, "train", config) as driver:
            # A rank is killed.
            first = driver.wait_for(run, 1, step=6)["start"][0]
            assert first["world_size"] == 2
            assert len(set(first["machines"])) == 2
            os.kill(first["pids"][1], signal.SIGKILL)

            # A rank is frozen.
            second = driver.wait_for(run, 2, step=16)["start"][0]
            os.kill(second["pids"][1], signal.SIGSTOP)

            # A machine is lost for good: its raylet is killed, which ends its ranks.
            third = driver.wait_for(run, 3, step=26)["start"][0]
            for_seconds(60, lambda: not alive(second["pids"][1]))
            lost = cluster.list_all_nodes()[-1]
            cluster.remove_node(lost, allow_graceful=False)

            # The run goes on with what is left, and grows when a machine comes.
            fourth = driver.wait_for(run, 4, step=36)["start"][0]
            assert fourth["world_size"] == 1
            added = cluster.add_node(num_cpus=1)
            fifth = driver.wait_for(run, 5, step=46)["start"][0]
            assert fifth["world_size"] == 2

            # Ray announces that it will take that machine away.
            drain(address, added.node_id, seconds=60)
            sixth = driver.wait_for(run, 6, step=56)["start"][0]
            assert sixth["world_size"] == 1

            # The driver is killed; its ranks end with it.
            driver.process.kill()
            driver.process.wait()
        for_seconds(60, lambda: not any(map(alive, sixth["pids"])))

        with Driver(tmp_path, "resume", "survivor", "--store", str(workshop.folder / "store"), "--json") as driver:
            assert driver.end() == 0, driver.log.read_text()

    status = read_status(run)
    assert (status.state, status.step, status.generation) == ("finished", STEPS, 7)
    reasons = [restart.reason for restart in status.restarts]
    assert reasons[0].startswith("rank 1 died")
    assert reasons[1].startswith("rank 1 hangs in ")
    assert "no sign of life for 15 s (timeouts.step)" in reasons[1]
    assert reasons[2].startswith("lost ")
    assert "2 ranks instead of 1 find room" in reasons[3]
    assert "because a machine of the run is being taken away" in reasons[4]
    assert "killed or lost" in reasons[5]
    assert "rank 1 hangs in " in (log := read_log(run, 0, generation=2))  # the frozen one cannot speak
    assert "Current thread" in log
    assert third["step"] >= 12
    driver_words = read_driver_log(run)
    assert len(driver_words.splitlines()) < 30
    assert "(2 of 3 restarts)" in driver_words

    # The steps, their samples and their losses are those of an undisturbed run.
    expected, taken = steps(undisturbed(workshop), 1), steps(run, *range(1, 8))
    assert taken.keys() == expected.keys() == set(range(1, STEPS + 1))
    assert {step: record["samples"] for step, record in taken.items()} == {
        step: record["samples"] for step, record in expected.items()
    }
    assert max(abs(taken[step]["loss"] - expected[step]["loss"]) for step in expected) < 1e-3

    # Nothing but the work since the last commit was done twice.
    for generation in range(2, 8):
        reached = read_generation(run, generation - 1)["step"][-1]["step"]
        resumed = read_generation(run, generation)["start"][0]["step"]
        assert reached - resumed <= 2 * COMMIT_EVERY  # the commit before the last, where the last was still uploading


def drain(address: str, node_id: str, seconds: float) -> None:
    """Tell Ray that a node will be preempted, in the form that a cloud's notice takes there."""
    preemption = 2  # DRAIN_NODE_REASON_PREEMPTION in Ray's autoscaler.proto
    accepted, why = GcsClient(address).drain_node(node_id, preemption, "preempted", int((time.time() + seconds) * 1000))
    assert accepted, why


def for_seconds(seconds: float, holds) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_killed_ranks_and_a_lost_machine_lose_no_update(workshop: Workshop, tmp_path: Path):
    """Each machine has a keeper. That of the lost one is lost with it; its rank's updates are at another machine, and
    only the rank that is started on a new machine reads."""
    run = open_store(str(workshop.folder / "store")).sub("kept")
    settings = ("cluster.keeper=true", f"train.steps={STEPS}", "checkpoint.every_steps=100", "model.dtype=fp32")
    with ray_cluster(0) as cluster:
        nodes = [cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}") for number in (2, 3)]
        address = str(cluster.address)
        config = write(tmp_path, workshop, "kept", *settings, "quant.type=none", f"cluster.ray.address={address}")
        with Driver(tmp_path, "train", config) as driver:
            first = driver.wait_until(run, 1, lambda seen: len(seen["step"]) > 5, "step 6")["start"][0]
            os.kill(first["pids"][1], signal.SIGKILL)
            second = driver.wait_until(run, 2, lambda seen: len(seen["step"]) > 5, "the next steps")["start"][0]
            lost = second["machines"][0].rpartition("/")[2]
            cluster.remove_node(next(node for node in nodes if node.node_id.startswith(lost)), allow_graceful=False)
            cluster.add_node(num_cpus=1, node_ip_address="127.0.0.4")
            third = driver.wait_until(run, 3, lambda seen: len(seen["step"]) > 5, "the next steps")["start"][0]
            assert driver.end() == 0, driver.log.read_text()
    assert (second["restored"], second["read_bytes"]) == ("memory", 0)
    assert third["restored"] == "neighbour"
    assert len(set(third["machines"]) - set(second["machines"])) == 1
    assert 0 < third["read_bytes"] < first["read_bytes"]
    taken = [step for number in (1, 2, 3) for step in steps(run, number)]
    assert len(taken) - STEPS in range(3), "one that a rank was killed before it could keep it, at each restart"
    assert steps(run, 1, 2, 3).keys() == set(range(1, STEPS + 1))
    expected = steps(undisturbed(workshop, "model.dtype=fp32", "quant.type=none"), 1)
    for figure in ("loss", "grad_norm", "samples"):
        found = {step: record[figure] for step, record in steps(run, 1, 2, 3).items()}
        assert found == {step: record[figure] for step, record in expected.items()}
    restarts = read_status(run).restarts
    assert [restart.died is not None for restart in restarts] == [True, False]
    assert read_driver_log(run).count(AGAIN) == 1, "Ray's own workers are started for a lost machine alone"


def named(cluster: Forking, name: str) -> list[psutil.Process]:
    """The workers of this Ray with this name. A method may follow the name."""
    found = list[psutil.Process]()
    for process in psutil.Process(cluster.workers.pid).children(recursive=True):
        with suppress(psutil.Error, IndexError):  # it ended while we looked
            if process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
    assert found, f"there is no process of {name}"
    return found


def keepers(cluster: Forking) -> list[psutil.Process]:
    """The keepers of this Ray's machines, and the ranks that these have forked."""
    found = list[psutil.Process]()
    for process in psutil.Process(cluster.workers.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "launcher.start.keeper" in process.cmdline():
                found.append(process)
    return found


def kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


AGAIN = "ranks forked again"

STRIKES: dict[str, Callable[[Forking, list[int]], None]] = {
    "a rank": lambda _, ranks: kill_all(ranks[1:]),
    "all ranks": lambda _, ranks: kill_all(ranks),
    "a keeper": lambda _, ranks: psutil.Process(ranks[0]).parent().kill(),  # type: ignore[union-attr]
    "a worker": lambda cluster, _: named(cluster, "RayTrainWorker")[0].kill(),
    "a rank once more": lambda _, ranks: kill_all(ranks[:1]),
    "the actor of a keeper": lambda cluster, _: named(cluster, "_Machine")[0].kill(),
    "the actor between driver and workers": lambda cluster, _: kill_all(
        one.pid for one in named(cluster, "StartsOfWorkers")
    ),
    "the actor of all keepers": lambda cluster, _: named(cluster, "_Keepers")[0].kill(),
}


def test_whatever_is_killed_the_ranks_start_again(workshop: Workshop, tmp_path: Path) -> None:
    """A rank that is left by its worker, its keeper or an actor ends, and all updates are those of an undisturbed
    run."""
    run = open_store(str(workshop.folder / "store")).sub("struck")
    settings = ("cluster.keeper=true", f"train.steps={STEPS}", "checkpoint.every_steps=20", "retry.failures=20")
    with ray_cluster(0) as cluster:
        for number in (2, 3):
            cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}")
        address = f"cluster.ray.address={cluster.address}"
        config = write(tmp_path, workshop, "struck", *settings, "model.dtype=fp32", "quant.type=none", address)
        starts = list[dict[str, Any]]()
        with Driver(tmp_path, "train", config) as driver:
            for generation, (name, strike) in enumerate(STRIKES.items(), 1):
                seen = driver.wait_until(run, generation, lambda seen: len(seen.get("step", ())) > 3, f"before {name}")
                starts += seen["start"]
                strike(cluster, starts[-1]["pids"])
                for pid in starts[-1]["pids"]:
                    for_seconds(60, lambda pid=pid: not alive(pid))
            # The driver is killed while its workers start the ranks again.
            last = len(STRIKES) + 1
            seen = driver.wait_until(run, last, lambda seen: len(seen.get("step", ())) > 3, "the last start")
            before = read_driver_log(run).count(AGAIN)
            assert keepers(cluster)
            kill_all(seen["start"][0]["pids"][1:])
            for_seconds(60, lambda: read_driver_log(run).count(AGAIN) > before)
            driver.process.kill()
            driver.process.wait()
        for_seconds(120, lambda: not keepers(cluster))
        with Driver(tmp_path, "resume", "struck", "--store", str(workshop.folder / "store"), "--json") as driver:
            assert driver.end() == 0, driver.log.read_text()
    assert "restored" not in starts[0]
    restored = dict(zip(STRIKES, [start.get("restored") for start in starts[1:]], strict=False))
    assert [restored[name] for name in ("a rank", "all ranks", "a worker", "a rank once more")] == ["memory"] * 4
    assert {restored[name] for name in ("a keeper", "the actor of a keeper")} == {"neighbour"}
    assert read_driver_log(run).count(AGAIN) >= 5, "Ray starts no other workers after ranks or a keeper"
    expected = steps(undisturbed(workshop, "model.dtype=fp32", "quant.type=none"), 1)
    assert {step: record["loss"] for step, record in steps(run, *range(1, last + 3)).items()} == {
        step: record["loss"] for step, record in expected.items()
    }


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """No rank goes on meanwhile, because the others wait for this one."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_spare_machine_takes_the_place_of_a_lost_one(workshop: Workshop, tmp_path: Path) -> None:
    """A spare that is lost while it waits is replaced. When the ranks lose a machine, they go on at once on the spare,
    as many as before. When they lose another one, they wait for a machine that comes."""
    run = open_store(str(workshop.folder / "store")).sub("spared")
    settings = ("cluster.keeper=true", "cluster.spares=1", f"train.steps={STEPS}", "checkpoint.every_steps=100")
    with ray_cluster(0) as cluster:
        nodes = [cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}") for number in (2, 3, 4)]
        address = f"cluster.ray.address={cluster.address}"
        config = write(tmp_path, workshop, "spared", *settings, "model.dtype=fp32", "quant.type=none", address)

        def lose(found: str) -> None:
            gone = next(node for node in nodes if node.node_id.startswith(found.rpartition("/")[2]))
            nodes.remove(gone)
            cluster.remove_node(gone, allow_graceful=False)

        def add(number: int) -> Any:
            nodes.append(cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}"))
            return nodes[-1]

        def trains(generation: int) -> dict[str, Any]:
            what = f"steps of start {generation}"
            return driver.wait_until(run, generation, lambda seen: len(seen.get("step", ())) > 5, what)["start"][0]

        with Driver(tmp_path, "train", config) as driver:
            first = trains(1)
            with frozen(first["pids"][0]):
                driver.wait_for_words("waits with a keeper")
                (spare,) = [node for node in nodes if not any(node.node_id[:8] in name for name in first["machines"])]
                lose(spare.node_id[:8])
                spare = add(5)
                driver.wait_for_words(f"{spare.node_id[:8]} waits with a keeper")
            lose(first["machines"][0])
            second = trains(2)
            lose(second["machines"][0])
            added = add(6)
            third = trains(3)
            assert driver.end() == 0, driver.log.read_text()
    assert spare.node_id[:8] in "".join(second["machines"])
    assert added.node_id[:8] in "".join(third["machines"])
    for start in (second, third):
        assert (start["world_size"], start["restored"]) == (2, "neighbour")
        assert 0 < start["read_bytes"] < first["read_bytes"], "only the rank on the other machine reads"
    expected = steps(undisturbed(workshop, "model.dtype=fp32", "quant.type=none"), 1)
    assert {step: record["loss"] for step, record in steps(run, 1, 2, 3).items()} == {
        step: record["loss"] for step, record in expected.items()
    }
