"""Answers to the batch file on the nodes, beside the driver: each is one line on stdout, for bash's `read`.

    python -m launcher.cluster.slurm.job begin RUN_URI NODE ...         "run", or "end CODE" when nothing is left to do
    python -m launcher.cluster.slurm.job again RUN_URI --exit-code N .. "again RANKS SPARES", the nodes of ranks that
                                                                        follow in this job and those that wait, or "end"
    python -m launcher.cluster.slurm.job end RUN_URI --exit-code N ...  "requeue EXCLUDED_NODES", or "end CODE"
    python -m launcher.cluster.slurm.job ports                          two free TCP ports

Each start has a record in the run's folder, slurm/attempts/000001.json, which its `begin` and its end write.
"""

import argparse
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import NamedTuple

from launcher.cluster.slurm.queue import attempts
from launcher.policy.jobs import Attempt, Ending, JobDecision, StandIn, judge, stand_in
from launcher.start.check import check_turn
from launcher.start.sidecars import forget_servers
from launcher.view.status import read_generation, read_status
from trainer.config import Config
from trainer.data.dataset.chapters import forget_given_up
from trainer.errors import CapstanError, NothingCommitted, Stopped
from trainer.run import layout
from trainer.run.background import say
from trainer.run.folder import run_folder, submitted_config
from trainer.run.owner import end_group, ended_waiting, newest_number, take
from trainer.run.records import record_end, record_restart
from trainer.run.requests import stop_requester
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, open_store

_ANSWER_SECONDS = 5.0


def begin(config: Config, submission: str, job: int, restart: int, nodes: list[str]) -> str:
    """Record the start. Returns the batch file's next line."""
    run = run_folder(config)
    check_turn(run, submission)
    ended_waiting(run)  # its turn has come, whatever becomes of it
    every = attempts(run)
    if read_status(run).state == "finished":
        return "end 0"
    before = [attempt for attempt in every if attempt.submission == submission]
    if before and not before[-1].goes_on:  # this is a later job of a chain
        return f"end {before[-1].exit_code}"
    if _stopped_by(run):
        return f"end {(Stopped if committed_steps(run) else NothingCommitted).exit_code}"
    if before and before[-1].ended is None:
        lost = replace(before[-1], kind="node lost", step=_step(run), reason=_LOST)
        _record(run, lost)
        record_end(run, _LOST, crash=True)
    forget_given_up(run)
    forget_servers(run)  # before its steps, one of which may have servers
    # From here on the batch script has the run. Its driver, which takes a while to start, claims it again.
    take(run, "capstan submit slurm", newest_number(run), group=submission, place=f"job {job}")
    number = 1 + max((attempt.number for attempt in every), default=0)
    _record(run, Attempt(number, submission, job, restart, nodes, time.time(), step=_step(run)))
    return "run"


_LOST = "a node failed or the job was preempted: Slurm started it again"


def end(config: Config, exit_code: int, signal: str, nodes: list[dict]) -> str:
    """Judge and record the end of the newest attempt. Returns the batch file's next line.

    `nodes` is scontrol's JSON.
    """
    run = run_folder(config)
    every = attempts(run)
    if not every:  # its record is damaged or gone, and nobody can say what it was
        return f"end {exit_code}"
    end_group(run, every[-1].submission)  # for a driver that could not, or that never began
    judged = _judge(config, run, every, exit_code, signal, nodes)
    _keep(run, judged, "is committed; starting again from the last commit")
    decision, slurm = judged.decision, config.cluster.slurm
    if not decision.goes_on or slurm.chain:
        return f"end {decision.exit_code}"
    excluded = decision.exclude and ([slurm.exclude] if slurm.exclude else []) + decision.exclude
    return f"requeue {','.join(excluded)}".strip()


def again(config: Config, exit_code: int, signal: str, nodes: list[dict], ranks: list[str], spares: list[str]) -> str:
    """Return "again" and nodes if ranks may follow in this job, whose keepers have what the ranks had, and record that.

    `ranks` are the nodes of the ranks, in their order, and `spares` those that wait. Else `end` judges what has
    happened. A job can leave out one of its nodes only if a spare takes its place.
    """
    run = run_folder(config)
    every = attempts(run)
    if not every:
        return "end"
    waiting = [node for node in nodes if node["name"] in spares]
    judged = _judge(config, run, every, exit_code, signal, [node for node in nodes if node not in waiting])
    decision = judged.decision
    if not decision.goes_on or decision.kind not in ("failure", "node lost") or set(judged.lost) - set(ranks):
        return "end"
    silent = silent_nodes(waiting)
    out = {*judged.lost, *decision.exclude, *silent}
    found = stand_in(ranks, [spare for spare in spares if spare not in out], out)
    if found is None:
        return "end"
    judged = judged.with_reason(found)
    _keep(run, judged, "was recorded; starting again from the last update that is kept")
    record_restart(run, f"{judged.decision.reason}. Starting again from the last update that is kept.")
    last, left = every[-1], [node for node in every[-1].nodes if node not in out]
    where = (last.submission, last.job, last.restart, left)
    _record(run, Attempt(last.number + 1, *where, time.time(), step=judged.attempt.step))
    return f"again {','.join(found.ranks)} {','.join(found.spares)}".strip()


class _Judged(NamedTuple):
    """An attempt that is over, and what follows."""

    attempt: Attempt
    decision: JobDecision
    recorded: bool  # the ranks have said why they ended
    lost: list[str]  # the nodes that do not answer

    def with_reason(self, found: StandIn) -> "_Judged":
        """The same, whose reason also says which spares take whose place."""
        reason = "; ".join([self.decision.reason, *found.sentences])
        return self._replace(
            attempt=replace(self.attempt, reason=reason), decision=replace(self.decision, reason=reason)
        )


def _judge(config: Config, run: Store, every: list[Attempt], exit_code: int, signal: str, nodes: list[dict]) -> _Judged:
    """Judge the newest attempt of `every`, which is over."""
    *earlier, current = every
    before = [attempt for attempt in earlier if attempt.submission == current.submission]
    status = read_status(run)
    if exit_code and _ranks_stopped(run, status.generation, current.started):
        # srun's own code may be that of a rank which it killed because another had ended a moment before.
        exit_code = Stopped.exit_code
    lost = silent_nodes(nodes) if exit_code else []
    ending = Ending(
        exit_code,
        signal=signal,
        stopped_by=_stopped_by(run),
        lost_nodes=lost,
        failed_nodes=[] if lost else _nodes_of_dead_ranks(run, status.generation, current.started, nodes),
        slow_nodes=_slow_nodes(run, status.generation, nodes),
        step=(status.step if config.cluster.keeper else status.last_commit_step) or 0,
        reason=status.reason,
        lost_machine=_lost_machine(run, status.generation),
    )
    decision = judge(ending, before, budget=config.retry.failures, supervised=config.cluster.slurm.launch == "ray")
    done = replace(
        current,
        ended=time.time(),
        exit_code=exit_code,
        kind=decision.kind,
        reason=decision.reason,
        failed_nodes=[*ending.failed_nodes, *ending.lost_nodes],
        slow_nodes=list(ending.slow_nodes),
        step=ending.step,
        goes_on=decision.goes_on,
    )
    recorded = exit_code in (0, Stopped.exit_code) or status.state in ("failed", "stopped")
    return _Judged(done, decision, recorded, lost)


def _keep(run: Store, judged: _Judged, then: str) -> None:
    """Record how an attempt ended, and say what follows: `then`, or its exit code."""
    _record(run, judged.attempt)
    if not judged.recorded:
        record_end(run, judged.decision.reason, crash=True)  # no rank was left that could say it
    _say(judged.attempt, judged.decision, then)


def _say(attempt: Attempt, decision: JobDecision, then: str) -> None:
    then = then if decision.goes_on else f"is the last; exit code {decision.exit_code}"
    because = f" ({attempt.reason})" if attempt.reason else ""
    say(f"capstan: {attempt.kind}{because}; step {attempt.step} {then}")


def silent_nodes(nodes: list[dict]) -> list[str]:
    """Return the nodes whose slurmd takes no connection: Slurm itself takes minutes to call them down."""

    def answers(node: dict) -> bool:
        try:
            with socket.create_connection((node["address"], node["port"]), _ANSWER_SECONDS):
                return True
        except OSError:
            return False

    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        return [node["name"] for node, up in zip(nodes, pool.map(answers, nodes), strict=True) if not up]


def _nodes_of_dead_ranks(folder: Store, newest: int, since: float, nodes: list[dict]) -> list[str]:
    """Return the node of the rank with which each generation ended, by Slurm's names of nodes.

    The generations are those up to `newest` that began after `since`.
    """
    found = []
    for generation in range(newest, 0, -1):
        records = read_generation(folder, generation)
        started = records["start"][-1] if records.get("start") else None
        if started and started["time"] < since:
            break
        # A rank that failed may only have lost its connection to the one that died.
        died = records["end"][-1].get("died") if records.get("end") else None
        if started and died is not None and died < len(started["hosts"]):
            found.append(_node_of(started["hosts"][died], nodes))
    return found


def _slow_nodes(folder: Store, generation: int, nodes: list[dict]) -> list[str]:
    """Return the nodes that `generation` ended to leave, because their ranks are slower than the others."""
    records = read_generation(folder, generation)
    if not (records.get("start") and records.get("end")):
        return []
    hosts, ranks = records["start"][-1]["hosts"], records["end"][-1].get("slow_ranks") or []
    return sorted({_node_of(hosts[rank], nodes) for rank in ranks if rank < len(hosts)})


def _node_of(hostname: str, nodes: list[dict]) -> str:
    """Return Slurm's name of the node with this hostname."""
    names = {_short(node["hostname"]): node["name"] for node in nodes}
    return names.get(_short(hostname), _short(hostname))


def _short(hostname: str) -> str:
    return hostname.partition(".")[0]


def _ranks_stopped(folder: Store, generation: int, since: float) -> bool:
    """Return whether the ranks of `generation` have said, after `since`, that they committed and stopped."""
    ends = read_generation(folder, generation).get("end")
    return bool(ends) and ends[-1]["outcome"] == "stopped" and ends[-1]["time"] >= since


def _lost_machine(folder: Store, generation: int) -> bool:
    ends = read_generation(folder, generation).get("end")
    return bool(ends) and ends[-1].get("lost_machine", False)


def _stopped_by(folder: Store) -> str | None:
    """Return the person who asked for a stop. The driver notes Slurm's signals in the same place, by their names."""
    who = stop_requester(folder)
    return None if who is None or who.startswith("SIG") else who


def _step(folder: Store) -> int:
    return read_status(folder).last_commit_step or 0


def _record(folder: Store, attempt: Attempt) -> None:
    folder.put(layout.slurm_attempt(attempt.number), json.dumps(asdict(attempt)).encode())


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _read_nodes(text: str) -> list[dict]:
    try:
        return json.loads(text)["nodes"]
    except (ValueError, KeyError):
        return []  # the controller does not answer; the end is judged without it


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.cluster.slurm.job", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("begin", "again", "end"):
        verb = verbs.add_parser(name)
        verb.add_argument("run", metavar="RUN_URI")
    verbs.choices["begin"].add_argument("--submission", required=True)
    verbs.choices["begin"].add_argument("nodes", nargs="+")
    for name in ("again", "end"):
        verbs.choices[name].add_argument("--exit-code", type=int, required=True)
        verbs.choices[name].add_argument("--signal", default="", help="the last one that Slurm sent")
    for name in ("--ranks", "--spares"):
        verbs.choices["again"].add_argument(name, default="", help="nodes, with commas")
    verbs.add_parser("ports")
    given = parser.parse_args()
    try:
        if given.verb == "ports":
            print(*free_ports(2))
            return
        config = submitted_config(open_store(given.run))
        if given.verb == "begin":
            job, restart = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
            print(begin(config, given.submission, job, restart, given.nodes))
            return
        ended = given.exit_code, given.signal, _read_nodes(sys.stdin.read())
        if given.verb == "again":
            print(again(config, *ended, *(list(filter(None, of.split(","))) for of in (given.ranks, given.spares))))
        else:
            print(end(config, *ended))
    except CapstanError as error:
        say(f"capstan: {error}")
        print(f"end {error.exit_code}")


if __name__ == "__main__":
    main()
