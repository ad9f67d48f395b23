"""`capstan rollout`: a process of its own that has servers sample answers beside a run. It needs no GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.evaluate.evaluating import run_with_bars
from launcher.evaluate.ranks import for_server
from trainer.config.objective import OWN, SERVE
from trainer.errors import ConfigError
from trainer.evaluate.program import Ask
from trainer.run.folder import run_config
from trainer.store.store import Store
from trainer.tuning.objective.objective import find_objective
from trainer.tuning.objective.rollouts import LearnsFromRollouts


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
        ConfigError: the run learns from no rollouts, or samples by itself.
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
        return RolledOut(run.uri, servers, config.train.steps or 0, 0, dry_run=True)
    found = run_with_bars(Ask("rollout", run.uri, overrides=tuple(overrides)), alone, log)
    return RolledOut(run.uri, servers, found["steps"], found["made"], dry_run=False)
