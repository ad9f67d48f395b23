"""A store may fail at any operation: the newest commit still loads and verifies, and half a thing is never chosen."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.smoke.local_s3 import S3Server
from tests.dist import export_faults, faults
from tests.dist.launch import launch, running
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.store import open_store

STORES = ["memory", "local", "s3"]
KILLED = -9


@pytest.fixture
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of the kind that the test is parametrised with."""
    if request.param == "memory":
        return "memory://faults"  # lives in the rank
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3').uri('faults')}/{tmp_path.name}"


def each(*kinds: str) -> pytest.MarkDecorator:
    """A store of files is quick."""
    stores = [kind if kind == "local" else pytest.param(kind, marks=pytest.mark.long) for kind in kinds]
    return pytest.mark.parametrize("uri", stores, indirect=True)


@each(*STORES)
def test_a_save_and_the_removal_after_it_survive_a_fault_at_each_operation(uri: str) -> None:
    (result,) = launch(1, faults.saves, uri)
    assert result["wrong"] == []
    verbs = {operation.split()[0] for operation in result["operations"]}
    assert verbs == {"put", "list", "create", "get", "head", "get_range", "delete"}
    # Failed ones include those whose proof could not be read; the others failed when the commit was done already.
    assert result["outcomes"].keys() == {"finished", "StorageError"}
    assert sum(result["outcomes"].values()) == 1 + 3 * len(result["operations"])


def kill_at_each_operation(function: Callable[..., None], *arguments: str | int) -> int:
    """Run `function` once for each of its operations, and kill it there; how many that were."""
    at, code = 0, KILLED
    while code == KILLED:
        at += 1
        with running(1, function, *arguments, at) as rank:
            (code,) = rank.wait_for_ends()
    assert code == 0, f"operation {at} ended with {code}"
    return at - 1


@each("local", "s3")
def test_a_process_killed_at_any_operation_of_a_save_leaves_the_commit_before_or_the_new_one(uri: str) -> None:
    killed = kill_at_each_operation(faults.killed_save, uri)
    assert killed >= 10
    assert launch(1, faults.after_kills, uri, killed) == [[]]


@pytest.mark.long
@pytest.mark.parametrize(
    ("uri", "kind"), [("s3", "adapter"), ("local", "merged"), ("local", "stored")], indirect=["uri"]
)
def test_a_process_killed_at_any_operation_of_an_export_leaves_nothing_that_loads(
    uri: str, tmp_path: Path, kind: str
) -> None:
    launch(1, export_faults.prepare_export, uri, str(tmp_path), kind)
    killed = kill_at_each_operation(export_faults.killed_export, uri, kind)
    assert killed >= 12
    assert launch(1, export_faults.after_killed_exports, uri, kind, killed) == [[]]


@pytest.mark.parametrize(
    ("uri", "kind", "last"),
    [
        ("local", "adapter", "adapter_config.json"),
        pytest.param("memory", "merged", "config.json", marks=pytest.mark.long),
        pytest.param("local", "stored", "config.json", marks=pytest.mark.long),
        pytest.param("s3", "merged", "config.json", marks=pytest.mark.long),
    ],
    indirect=["uri"],
)
def test_an_export_survives_a_fault_at_each_operation(uri: str, tmp_path: Path, kind: str, last: str) -> None:
    (result,) = launch(1, export_faults.exports, uri, str(tmp_path), kind)
    assert result["wrong"] == []
    assert len([operation for operation in result["operations"] if operation.startswith("put")]) >= 4
    assert result["operations"][-1] == f"create {last}"


@pytest.mark.parametrize("uri", ["local"], indirect=True)
def test_a_rank_that_fails_alone_in_a_restore_fails_on_all_with_one_message(uri: str) -> None:
    results = launch(3, faults.restores_with_one_faulty_rank, uri)
    assert results[0]["messages"] == results[1]["messages"] == results[2]["messages"]
    undisturbed, *failed = results[0]["messages"]
    assert undisturbed == ""
    assert len(failed) >= 4  # of its shard: size, bytes, header, what it needs
    assert all("the store did not answer to" in message for message in failed)


@each("local", "s3")
def test_of_two_writers_of_one_step_one_commits_and_the_other_is_told(uri: str) -> None:
    results = launch(2, faults.race, uri)
    assert sorted(result["outcome"] for result in results) == ["StorageError", "finished"]
    assert sorted(result["kinds"] for result in results) == [["commit"], ["save_failed"]]
    assert [result["wrong"] for result in results] == [[], []]
    run = open_store(uri)
    assert committed_steps(run) == [1]
    winner = next(rank for rank, result in enumerate(results) if result["outcome"] == "finished")
    assert read_manifest(run, 1).generation == winner + 1


def test_a_save_outlives_the_servers_death_while_training_goes_on(own_server: S3Server, tmp_path: Path) -> None:
    with running(1, faults.save_through_an_outage, f"{own_server.uri('run')}/x", str(tmp_path), 96) as rank:
        rank.wait_until((tmp_path / "under-way").exists)
        own_server.kill()
        (tmp_path / "killed").touch()
        rank.wait_until((tmp_path / "trained-on").exists)
        own_server.start()
        (result,) = rank.wait()
    assert result["events"] == ["commit"]
    assert result["newest"] == 2
    assert result["bytes"] > 96 * 10**6
    assert result["steps"] > 10
