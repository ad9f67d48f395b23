"""A rank, a keeper and a server as tasks of srun: their exit codes, and the variables that they pass on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster.slurm import step
from launcher.policy.retry import RankDied
from launcher.start.keeper import Unprepared
from trainer.config import Config, dump_config, parse_config
from trainer.errors import CapstanError, ConfigError, Stopped, StorageError
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.records import newest_records
from trainer.store.store import Store


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = "run: {{name: one, store: {}}}\nmodel: {{base: /m}}\ndata: {{train: [{{path: d}}]}}\ntrain: {{steps: 2}}"
    return parse_config(text.format(tmp_path), ["rollout.serve.gpus=2", "cluster.keeper=true"])


@pytest.fixture
def run(config: Config, monkeypatch: pytest.MonkeyPatch) -> Store:
    folder = run_folder(config)
    folder.put(layout.CONFIG, dump_config(config).encode())
    of_task = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "PMIX_RANK": "1"}
    of_step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "n1"}
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", **of_task, **of_step})
    return folder


@pytest.mark.parametrize(
    ("error", "rank", "code"),
    [
        (Stopped("on request"), "0", 75),
        (Stopped("on request"), "1", 0),  # srun would kill rank 0, which still writes
        (ConfigError("wrong"), "1", 2),
        (StorageError("503"), "0", 6),
    ],
)
def test_a_rank_ends_as_srun_is_to_take_it(
    run: Store, monkeypatch: pytest.MonkeyPatch, error: CapstanError, rank: str, code: int
) -> None:
    seen = list[Any]()

    def be_rank(config: Config, submission: str, number: int) -> None:
        seen.extend([config.run.name, submission, number, os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]])
        raise error

    os.environ["SLURM_PROCID"] = rank
    monkeypatch.setattr(step, "_run", be_rank)
    with pytest.raises(SystemExit) as ended:
        step._rank(run.uri, "abc")
    assert (ended.value.code, seen) == (code, ["one", "abc", int(rank), "4", "2"])


def test_rank_0_alone_prepares_the_data_and_servers_are_a_step_of_their_own(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[Any]()

    @contextmanager
    def beside(config: Config, folder: Store, log: Any, *, servers: bool) -> Iterator[None]:
        done.append(("sidecars", servers))
        yield

    def forked(submission: str, gpus: int | None) -> Any:
        return lambda config, datasets, *, resume: done.append((submission, datasets, resume))

    monkeypatch.setattr(step, "turn", lambda config, submission, **_: nullcontext())
    monkeypatch.setattr(step, "resolve_base", lambda model: None)
    monkeypatch.setattr(step, "prepare", lambda *_: "the data")
    monkeypatch.setattr(step, "sidecars_here", beside)
    monkeypatch.setattr(step, "_forked", forked)
    monkeypatch.setattr(step, "wait_for_first_rank", lambda config, submission: done.append("waits"))
    for rank, expected in (
        (0, [("sidecars", False), ("abc", "the data", False)]),
        (1, ["waits", ("abc", None, False)]),
    ):
        done.clear()
        step._run(config, "abc", rank)
        assert done == expected


def test_a_keeper_gets_nothing_of_its_own_task(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    become = list[Any]()
    monkeypatch.setattr(os, "execve", lambda *given: become.extend(given))
    step._keeper(run.uri, "abc")
    program, command, environment = become
    assert command[0] == program
    assert command[-3:-1] == ["-m", "launcher.start.keeper"] or "launcher.start.keeper" in command
    assert environment["PATH"] == "/bin"
    assert not [name for name in environment if name.startswith(("SLURM_", "PMI"))]
    assert step._keeper_name("abc") == "capstan-keeper-7-abc"


@pytest.mark.parametrize(("given", "devices"), [("4,5,6,7", "4,5"), (None, "0,1")])
def test_a_server_has_the_last_gpus_of_its_node_and_is_no_task(
    run: Store, monkeypatch: pytest.MonkeyPatch, given: str | None, devices: str
) -> None:
    started = list[Any]()
    monkeypatch.setattr(step.sidecars, "main", lambda *named: started.extend([*named[:2], dict(os.environ)]))
    monkeypatch.setattr(step, "own_address", lambda *_: "10.0.0.1")
    monkeypatch.setattr(step, "visible_gpus", lambda: ["0", "1", "2", "3"])
    if given:
        os.environ["CUDA_VISIBLE_DEVICES"] = given
    step._server(run.uri)
    uri, name, environment = started
    assert (uri, name) == (run.uri, "server-2")
    assert environment["CUDA_VISIBLE_DEVICES"] == devices, "the second of its node, of two GPUs each"
    assert not [variable for variable in environment if variable.startswith("SLURM_")]


def test_a_rank_whose_keeper_cannot_fork_it_starts_without_it(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise Unprepared("the keeper has ended")

    ran = list[Any]()
    monkeypatch.setattr(step, "forked_rank", refuses)
    monkeypatch.setattr(step, "imported_rank", lambda gpus: lambda *given, resume: ran.extend([*given, resume]))
    step._forked("abc", None)(config, None, resume=False)
    assert ran == [config, None, False]


def test_the_death_of_a_forked_rank_is_recorded_and_ends_its_task(
    config: Config, run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopeless = list[Any]()

    def dies(keeper: Any, task: Any, **how: Any) -> None:
        hopeless.append(how["hopeless"])
        assert not hopeless[0](True), "no rank has died yet, so all of them commit and stop"
        raise RankDied("killed by signal 9", at=12.5)

    os.environ["RANK"] = "3"
    run.create(layout.metrics(1), b'{"kind": "start", "step": 0, "total_steps": 2, "world_size": 4, "time": 1.0}\n')
    monkeypatch.setattr(step, "forked_rank", dies)
    with pytest.raises(CapstanError, match="^rank 3 died: killed by signal 9$"):
        step._forked("abc", None)(config, None, resume=False)
    (died,) = (record for record in newest_records(run) if record["kind"] == "end")
    assert (died["outcome"], died["died"], died["died_at"]) == ("failed", 3, 12.5)
    assert hopeless[0](True), "others wait in vain for it once they are asked to stop"
    assert not hopeless[0](False)
