"""The two questions of the batch file, over a run's folder as drivers and ranks leave it."""

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster.slurm.job import again, begin, end, free_ports, main, silent_nodes
from launcher.cluster.slurm.queue import attempts
from launcher.policy.retry import decide, lost_machine
from launcher.view.status import read_generation, read_status
from trainer.config import Config, Retry, dump_config, override, parse_config
from trainer.data.dataset.chapters import give_up
from trainer.errors import CapstanError, ConfigError, DataError
from trainer.run import layout
from trainer.run.owner import newest_number, read_owner, take
from trainer.run.records import newest_records, record_end
from trainer.run.requests import request_stop
from trainer.store.store import Store, open_store


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(
        f"""
run: {{name: big, store: {tmp_path}}}
model: {{base: /m}}
data: {{train: [{{path: d}}]}}
train: {{steps: 20}}
cluster: {{workers: 2, slurm: {{nodes: 2, exclude: "n9"}}}}
retry: {{failures: 1}}
"""
    )


@pytest.fixture
def run(config: Config) -> Store:
    run = open_store(config.run.store).sub("big")
    run.put(layout.CONFIG, dump_config(config).encode())
    return run


@pytest.fixture
def nodes() -> Iterator[list[dict[str, Any]]]:
    """Two nodes whose slurmd answers, by their names in Slurm and as machines."""
    with socket.create_server(("127.0.0.1", 0)) as slurmd:
        port = slurmd.getsockname()[1]
        yield [
            {"name": f"n{number}", "hostname": f"host{number}", "address": "127.0.0.1", "port": port}
            for number in (1, 2)
        ]


def start(config: Config, restart: int = 0, submission: str = "s") -> str:
    return begin(config, submission, 12, restart, ["n1", "n2"])


def generation(run: Store, number: int, *records: dict[str, Any]) -> None:
    facts = {"kind": "start", "step": 0, "total_steps": 20, "world_size": 2, "time": time.time()}
    lines = [{**facts, "hosts": ["host1.cluster", "host2.cluster"]}, *records]
    run.put(layout.metrics(number), "".join(json.dumps(line) + "\n" for line in lines).encode())


def died(rank: int) -> dict[str, Any]:
    reason = f"rank {rank} died: killed"
    return {"kind": "end", "outcome": "failed", "step": None, "reason": reason, "died": rank, "time": 0}


def test_a_first_start_is_recorded(config: Config, run: Store) -> None:
    assert start(config) == "run"
    (attempt,) = attempts(run)
    assert (attempt.job, attempt.restart, attempt.nodes, attempt.kind) == (12, 0, ["n1", "n2"], None)


def test_a_start_forgets_what_one_that_was_killed_has_left(config: Config, run: Store) -> None:
    run.put(layout.server("server-1"), b"http://n1:8000")
    give_up(run, DataError("a row is damaged"))
    before = {entry.key for entry in run.list()}
    assert start(config) == "run"
    left = {entry.key for entry in run.list()} & before
    assert left == {layout.CONFIG}, "no server, and no reason not to compile"


def test_the_end_of_a_job_frees_the_run(config: Config, run: Store, nodes: list[dict[str, Any]]) -> None:
    start(config)
    assert read_owner(run) is not None
    assert end(config, 1, "", nodes) == "end 1"
    assert read_owner(run) is None, "its driver may not have begun"


def test_an_end_without_a_record_of_its_start_keeps_its_exit_code(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    assert end(config, 9, "", nodes) == "end 9"
    assert again(config, 9, "", nodes, ["n1", "n2"], ["n3"]) == "end"


def test_the_batch_file_reads_a_line_whatever_is_wrong(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*arguments: str, given: str = "") -> str:
        monkeypatch.setattr("sys.argv", ["job", *arguments])
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        main()
        return capsys.readouterr().out.strip()

    assert answer("begin", f"file://{tmp_path}/nowhere", "--submission", "s", "n1") == "end 2"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert answer("begin", run.uri, "--submission", "s", "n1", "n2") == "run"
    (attempt,) = attempts(run)
    assert (attempt.job, attempt.restart, attempt.nodes) == (12, 3, ["n1", "n2"])
    assert answer("end", run.uri, "--exit-code", "75", "--signal", "USR1", given="slurmctld is away") == "requeue"
    assert len(set(answer("ports").split())) == 2


def test_a_job_that_has_done_its_work_loses_no_node(config: Config, run: Store, nodes: list[dict[str, Any]]) -> None:
    start(config)
    generation(run, 1, {"kind": "end", "outcome": "finished", "step": 20, "reason": ""})
    (nodes[1]["port"],) = free_ports(1)  # it may be powered down by now
    assert end(config, 0, "", nodes) == "end 0"
    (attempt,) = attempts(run)
    assert (attempt.kind, attempt.failed_nodes) == ("finished", [])


def test_a_finished_run_needs_no_start(config: Config, run: Store) -> None:
    generation(run, 1, {"kind": "end", "outcome": "finished", "step": 20, "reason": ""})
    assert start(config) == "end 0"
    assert attempts(run) == []


def test_a_run_that_was_asked_to_stop_does_not_start(config: Config, run: Store) -> None:
    take(run, "capstan submit slurm", newest_number(run), group="s", waits=True)
    request_stop(run, by="capstan stop")
    assert start(config) == "end 7", "nothing is committed"
    run.create(layout.manifest(4), b"a checkpoint")
    assert start(config) == "end 75"
    assert read_owner(run) is None, "its turn has come"


def test_an_attempt_that_never_ended_was_lost_with_its_node(config: Config, run: Store) -> None:
    start(config)
    generation(run, 1)
    run.create(layout.manifest(4), b"a checkpoint")
    assert start(config, restart=1) == "run"
    lost, now = attempts(run)
    assert lost.step == now.step == 4
    assert (lost.kind, lost.reason) == ("node lost", "a node failed or the job was preempted: Slurm started it again")
    assert now.kind is None
    assert read_generation(run, 1)["end"][-1]["reason"] == lost.reason
    assert read_status(run).state == "starting"


def test_a_later_job_of_a_chain_ends_as_the_one_that_ended_the_run(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    start(config)
    assert end(config, 3, "", nodes) == "end 3"
    assert start(config) == "end 3"
    take(run, "capstan submit slurm", newest_number(run), group="another", waits=True)
    assert start(config, submission="another") == "run"
    assert [attempt.submission for attempt in attempts(run)] == ["s", "another"]
    with pytest.raises(ConfigError, match="was taken by `capstan submit slurm` on .* since this job was submitted"):
        start(config)


def test_a_signalled_run_is_requeued_and_a_stopped_one_is_not(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    start(config)
    request_stop(run, by="SIGUSR1")  # so the driver notes the signal
    assert end(config, 75, "USR1", nodes) == "requeue"
    request_stop(run, by="capstan stop")
    assert end(config, 75, "USR1", nodes) == "end 75"


@pytest.mark.parametrize(("when", "answer", "kind"), [("now", "end 75", "stopped"), ("earlier", "requeue", "failure")])
def test_ranks_that_stopped_have_stopped_whatever_became_of_the_step(
    config: Config, run: Store, nodes: list[dict[str, Any]], when: str, answer: str, kind: str
) -> None:
    start(config)
    said = {"now": time.time() + 1, "earlier": 0}[when]
    generation(run, 1, {"kind": "end", "outcome": "stopped", "step": None, "reason": "on request", "time": said})
    request_stop(run, by="capstan stop")
    assert end(config, 143, "", nodes) == answer  # srun ends what is left when one rank has ended
    assert attempts(run)[-1].kind == kind


def test_where_jobs_form_a_chain_none_requeues_itself(config: Config, run: Store, nodes: list[dict[str, Any]]) -> None:
    start(config)
    chained = config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"slurm": config.cluster.slurm.model_copy(update={"chain": 2})})
        }
    )
    assert end(chained, 75, "USR1", nodes) == "end 75"
    assert start(config) == "run"


def test_a_node_on_which_ranks_die_twice_is_excluded_with_those_that_were(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    start(config)
    generation(run, 1, died(rank=1))
    generation(run, 2, died(rank=1))
    assert end(config, 1, "", nodes) == "requeue n9,n2"
    (attempt,) = attempts(run)
    assert (attempt.kind, attempt.failed_nodes) == ("failure", ["n2", "n2"])
    assert "ranks died on the same node again: rank 1 died: killed; excluded from now on: n2" in attempt.reason


def test_deaths_of_an_earlier_submission_are_not_this_ones(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    generation(run, 1, died(rank=1))
    generation(run, 2, died(rank=1))
    start(config)
    assert end(config, 1, "", nodes) == "end 1"


def test_a_node_that_does_not_answer_is_lost_before_slurm_knows(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    start(config)
    generation(run, 1, died(rank=0))  # whichever rank it was, the node that is gone explains it
    (closed,) = free_ports(1)
    nodes[1]["port"] = closed
    assert silent_nodes(nodes) == ["n2"]
    assert end(config, 2, "", nodes) == "requeue"
    (attempt,) = attempts(run)
    assert (attempt.reason, attempt.failed_nodes) == ("no answer from n2", ["n2"])


def test_a_spare_takes_the_place_of_a_lost_node_in_the_same_job(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    nodes.append({**nodes[0], "name": "n3", "hostname": "host3"})
    config = override(config, "cluster.slurm.launch=direct", "cluster.keeper=true", "cluster.spares=1")
    begin(config, "s", 12, 0, ["n1", "n2", "n3"])
    generation(run, 1, {"kind": "step", "step": 3, "time": time.time()})
    answering = nodes[1]["port"]
    (nodes[1]["port"],) = free_ports(1)
    nodes[2]["port"] = nodes[1]["port"]
    assert again(config, 1, "", nodes, ["n1", "n2"], ["n3"]) == "end"  # the spare does not answer either
    nodes[2]["port"] = answering
    assert again(config, 1, "", nodes, ["n1", "n2"], ["n3"]) == "again n1,n3"
    before, now = attempts(run)
    assert (before.kind, before.failed_nodes, before.step) == ("node lost", ["n2"], 3), "what the ranks' memory has"
    assert before.reason == "no answer from n2; n3 takes the place of n2"
    assert now.nodes == ["n1", "n3"]
    assert "n3 takes the place of n2. Starting again from the last update" in str(newest_records(run))
    assert again(config, 75, "USR1", nodes, ["n1", "n3"], []) == "end", "the job itself is about to end"
    # It is not there a second time.
    (nodes[2]["port"],) = free_ports(1)
    assert again(config, 1, "", nodes[::2], ["n1", "n3"], []) == "end"


def test_a_spare_that_is_lost_while_it_waits_is_nobodys_reason(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    config = override(config, "cluster.workers=1", "cluster.slurm={nodes: 1, launch: direct}", "cluster.keeper=true")
    start(config)
    generation(run, 1, died(rank=0))
    (nodes[1]["port"],) = free_ports(1)
    assert again(config, 1, "", nodes, ["n1"], []) == "end", "a lost node that is no rank's cannot be left out"
    assert again(config, 1, "", nodes, ["n1"], ["n2"]) == "again n1"
    assert attempts(run)[0].kind == "failure"


@pytest.mark.parametrize("committed", [True, False])
def test_a_node_that_only_ray_has_lost_is_lost(
    config: Config, run: Store, nodes: list[dict[str, Any]], committed: bool
) -> None:
    start(config)
    generation(run, 1)
    if committed:
        run.create(layout.manifest(4), b"a checkpoint")
    lost = lost_machine("host2/0a1b2c3d")
    record_end(run, lost.reason, crash=True, **lost.facts)  # as the driver does before it ends
    final = decide([lost], Retry(preemptions=0), committed=committed, command=str)
    assert isinstance(final, CapstanError)
    assert end(config, final.exit_code, "", nodes) == "requeue"
    (attempt,) = attempts(run)
    assert (attempt.kind, attempt.reason) == ("node lost", lost.reason)
    assert start(config, restart=1) == "run"


def test_a_driver_that_was_killed_leaves_its_reason_in_the_status(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    start(config)
    generation(run, 1)
    assert end(config, 137, "", nodes) == "requeue"
    assert read_status(run).reason == "the driver was killed by signal 9"
    start(config, restart=1)
    generation(run, 2)
    assert end(config, 137, "", nodes) == "end 137"
    take(run, "capstan submit slurm", newest_number(run), group="another", waits=True)
    start(config, submission="another")
    generation(run, 3)
    assert end(config, 137, "", nodes) == "requeue", "failures of the submission before are not this one's"


def test_the_node_of_a_slow_rank_is_left_out_from_then_on(
    config: Config, run: Store, nodes: list[dict[str, Any]]
) -> None:
    start(config)
    run.create(layout.manifest(4), b"a checkpoint")
    slow = {"lost_machine": True, "slow_ranks": [1], "step": None, "time": time.time()}
    generation(run, 1, {"kind": "end", "outcome": "stopped", "reason": "host2 is slower", **slow})
    assert end(config, 75, "", nodes) == "requeue n9,n2"
    assert attempts(run)[-1].slow_nodes == ["n2"]
    start(config, restart=1)
    run.create(layout.manifest(8), b"a checkpoint")
    generation(run, 2, {"kind": "end", "outcome": "stopped", "reason": "", "step": None, "time": time.time()})
    assert end(config, 75, "USR1", nodes) == "requeue n9,n2", "a later end is no reason to come back to it"
