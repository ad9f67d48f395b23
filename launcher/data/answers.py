"""`capstan teach` and `capstan rollout`: what a run learns from beside its data, made ahead of it or beside it.

`teach` stores a teacher's log-probabilities beside a run's data, or of the answers that a run samples. It runs as ranks
on this machine, or as one rank of a group. `rollout` has servers sample answers for a run, and needs no GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from launcher.data.data import build
from launcher.evaluate.evaluating import run_with_bars
from launcher.evaluate.ranks import for_server
from launcher.start.check import anchored
from launcher.start.group import is_rank
from launcher.start.local_ranks import count_ranks
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, load_config
from trainer.config.objective import OWN, SERVE
from trainer.data.dataset.taught import read_whole, teacher_folder, written_blocks
from trainer.errors import ConfigError
from trainer.evaluate.program import Ask
from trainer.evaluate.rollout.rewards import check_reward
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.run.folder import run_config
from trainer.store.store import Store, open_run_store
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.rollouts import LearnsFromRollouts
from trainer.tuning.objective.teacher import Teacher, teacher_of


@dataclass(frozen=True)
class TaughtData:
    """A teacher's output on a data set as it is stored, or with `dry_run` as it would be."""

    found: dict[str, Any]
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return {**self.found, "dry_run": self.dry_run}

    def sentence(self) -> str:
        found = self.found
        size = "" if found["bytes"] is None else f", {decimal(found['bytes'])}"
        targets = (
            "the targets of data that is not compiled yet"
            if found["targets"] is None
            else f"{found['targets']:,} targets{size}"
        )
        what = f"the {found['top_k']} likeliest tokens of {targets}, in {found['folder']}"
        if not self.dry_run:
            return f"{found['teacher']} has written {what}"
        some = f" ({found['written']} blocks are there)"
        there = {None: "", True: " (all of it is there)", False: some}[found["whole"]]
        return (
            f"would have {found['teacher']} write {what}, {found['bytes_a_target']} bytes a target, by {found['ranks']}"
            f" ranks{there}"
        )


@dataclass(frozen=True)
class JudgedAnswers:
    """The steps of a run whose answers the teacher has judged, and how many of them this process has judged.

    With `dry_run` they are the steps of the run.
    """

    run: str
    teacher: str
    steps: int
    made: int
    dry_run: bool

    def sentence(self) -> str:
        if self.dry_run:
            return (
                f"would have {self.teacher} judge the answers of {self.steps} steps of {self.run}, as they are sampled"
            )
        return (
            f"{self.teacher} has judged the answers of {self.steps} steps of {self.run}, {self.made} of them by this"
            " process"
        )


def teach(
    path: Path, overrides: Sequence[str], *, dry_run: bool, log: Callable[[str], None]
) -> TaughtData | JudgedAnswers:
    """Compile the data of the run and have its teacher write what the store lacks, or judge its answers beside it.

    Raises:
        ConfigError: the run has no teacher, or settings do not fit together.
        CapstanError: the data cannot be compiled, or the ranks fail.
    """
    config = anchored(load_config(path, overrides, log))
    resolved = resolve(config, resolve_base(config.model))
    config = config.computing_in(resolved.config.model.dtype)
    if isinstance(resolved.objective, LearnsFromRollouts) and resolved.objective.judge is not None:
        return _judge(config, resolved.objective.judge, dry_run=dry_run, log=log)
    teacher = teacher_of(resolved.objective)
    if teacher is None:
        raise ConfigError(f"objective.name: {config.objective.name} learns from no teacher. Set it to distil or opd.")
    if teacher.is_server:
        config = for_server(config, teacher.setting, "teach")
    if dry_run:
        key, manifest = build(config, dry_run=True, log=log).splits["train"]
        folder = teacher_folder(open_run_store(config).sub(layout.dataset(key)), teacher.to_json())
        vocabulary, targets = resolved.base.architecture.vocabulary, manifest and manifest.targets
        size = teacher.bytes_a_target(vocabulary)
        found = {
            "teacher": teacher.name,
            "folder": folder.uri,
            "data": key,
            "targets": targets,
            "top_k": min(teacher.top_k, vocabulary),
            "bytes": None if targets is None else targets * size,
            "bytes_a_target": size,
            "whole": None if manifest is None else read_whole(folder) is not None,
            "written": len(written_blocks(folder)),
            "ranks": count_ranks(config),
        }
        return TaughtData(found, dry_run=True)
    if not is_rank():  # otherwise rank 0 does so, while the others wait
        build(config, dry_run=False, log=log)
    found = run_with_bars(Ask("teach", config.run.store, config=dump_config(config)), config, log)
    return TaughtData(found, dry_run=False)


def _judge(config: Config, teacher: Teacher, *, dry_run: bool, log: Callable[[str], None]) -> JudgedAnswers:
    if teacher.is_server:
        raise ConfigError(
            f"{teacher.setting}: `capstan rollout` asks a server itself, so `capstan teach` has nothing to do. Leave"
            " out the command, or give a base or a run as the teacher."
        )
    run = open_run_store(config).sub(config.run.name).uri
    if dry_run:
        return JudgedAnswers(run, teacher.name, config.train.steps or 0, 0, dry_run=True)
    if not is_rank():
        build(config, dry_run=False, log=log)
    found = run_with_bars(Ask("judge", run, config=dump_config(config)), config, log)
    return JudgedAnswers(run, teacher.name, found["steps"], found["made"], dry_run=False)


@dataclass(frozen=True)
class RolledOut:
    """The steps of a run whose answers are there, and how many this process has `made`.

    With `dry_run` they are those that it would make.
    """

    run: str
    servers: list[str]
    steps: int
    made: int
    dry_run: bool

    def sentence(self) -> str:
        if self.dry_run:
            return f"would have {', '.join(self.servers)} sample the answers of {self.steps} steps of {self.run}"
        return f"{self.run} has the answers of {self.steps} steps, {self.made} of them by this process"


def rollout(run: Store, overrides: Sequence[str], *, dry_run: bool, log: Callable[[str], None]) -> RolledOut:
    """Sample for the run until it has all its answers or has ended. With `dry_run` only say who would sample.

    Raises:
        ConfigError: the run learns from no rollouts, or samples by itself; with `dry_run` also if its reward is not
            found. Otherwise that ends the run, when there are answers to reward.
        CapstanError: a server or the reward fails.
    """
    config = run_config(run, overrides)
    if not isinstance(find_objective(config), LearnsFromRollouts):
        raise ConfigError(f"objective.name: {config.objective.name} learns from no rollouts. Set it to grpo or opd.")
    if config.rollout.engine == OWN:
        raise ConfigError(
            "rollout.engine: own samples in the ranks of the run. Give URLs of servers, for example"
            " [http://gpu-1:8000], or serve."
        )
    given = config.rollout.engine
    servers = ["the servers that start with the run"] if given == SERVE else list(given)
    alone = for_server(config, "rollout.engine", "rollout")
    if dry_run:
        check_reward(config.rollout)
        return RolledOut(run.uri, servers, config.train.steps or 0, 0, dry_run=True)
    found = run_with_bars(Ask("rollout", run.uri, overrides=tuple(overrides)), alone, log)
    return RolledOut(run.uri, servers, found["steps"], found["made"], dry_run=False)
