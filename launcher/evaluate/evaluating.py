"""`capstan evaluate`: its request to the ranks, and what it shows meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import TextColumn

from launcher.evaluate.ranks import Hear, for_server, run_ranks
from launcher.evaluate.tables import Evaluated
from launcher.policy.foreign import check_own, evaluated
from launcher.start.local_ranks import count_ranks
from launcher.view.console import progress_bars
from trainer.config import Config, assignment
from trainer.config.paths import absolute_path, local_path
from trainer.errors import ConfigError, counted
from trainer.evaluate.program import Ask
from trainer.evaluate.subjects import subjects
from trainer.run import layout
from trainer.run.folder import run_config
from trainer.state.checkpoint.manifest import check_step, chosen_step, committed_steps
from trainer.store.store import Store

Log = Callable[[str], None]


def settings(overrides: Sequence[str], sets: Sequence[str], tasks: Sequence[str], bias: str | None) -> list[str]:
    """Return `overrides`, and those that the options stand for. Raises `ConfigError` for a set that is no name=path."""
    given = list(overrides)
    for one in sets:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise ConfigError(
                f"--set: expected NAME=PATH, and {one!r} is not. Example: --set general=data/general.jsonl."
            )
        given.append(assignment(f"eval.sets.{name}.path", _absolute(path, "--set")))
    if tasks:
        found = [_absolute(task, "--tasks") if local_path(task, "--tasks").exists() else task for task in tasks]
        given.append(assignment("eval.tasks", found))
    return [*given, *([assignment("eval.bias", _absolute(bias, "--bias"))] if bias else [])]


def _absolute(path: str, setting: str) -> str:
    return path if "://" in path else str(absolute_path(path, setting))


def evaluate_run(
    folder: Store,
    overrides: Sequence[str],
    *,
    step: int | None,
    best: bool,
    base: bool,
    chat: bool,
    server: str | None,
    trust: bool,
    dry_run: bool,
    log: Log,
) -> Evaluated | str:
    """Evaluate a checkpoint beside its base, or `base` alone. With `dry_run` return a sentence about it.

    A `server` that has the run's export may answer instead of ranks.

    Raises:
        CapstanError: there is no such checkpoint, there is nothing to evaluate, or the ranks raise it.
    """
    if base and (best or step is not None):
        raise ConfigError(
            "--base evaluates the base alone, so --step and --best have no effect. Leave out one of them."
        )
    if server and base:
        raise ConfigError(f"--server: --base has no effect. Name the base behind a #: {server.partition('#')[0]}#NAME.")
    config = run_config(folder, overrides, say=log)
    check_own(folder, config, evaluated, overrides, trust=trust)
    if server:
        config = for_server(config, "--server", "evaluate")
    step, every = chosen_step(folder, step, best=best), subjects(config)
    if not (base or server):
        check_step(folder, committed_steps(folder), step)
    if dry_run:
        if server:
            return f"would have {server} measure what it has of {folder.uri} on {', '.join(every)}"
        what = "the base" if base else f"step {committed_steps(folder)[0] if step is None else step} beside its base"
        ranks = counted(count_ranks(config), "rank")
        return f"would evaluate {what} of {folder.uri} on {', '.join(every)}, with {ranks}"
    ask = Ask("evaluate", folder.uri, step, tuple(overrides), base, chat, server=server or "")
    found = run_with_bars(ask, config, log)
    return Evaluated(
        found, folder.uri, None if base or found["step"] is None else f"{folder.uri}/{layout.evaluation(found['step'])}"
    )


def run_with_bars(ask: Ask, config: Config, log: Log) -> dict[str, Any]:
    """Run `run_ranks` for a request without prompts, with its progress on the terminal."""
    with _bars(log) as hear:
        return run_ranks(ask, config, (), hear)


@contextmanager
def _bars(log: Log) -> Iterator[Hear]:
    """Show bars on a terminal, one for each part of the work; elsewhere a line when a part is done."""
    with progress_bars(TextColumn("{task.completed}/{task.total}")) as bars:
        tasks, finished = dict[str, Any](), set[str]()
        console = bars.console

        def hear(told: dict[str, Any]) -> None:
            if "log" in told:
                say = console.print if console.is_terminal else log
                say(told["log"])
                return
            what, done, total = told["progress"], told["done"], told["total"]
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)
            if done >= total and what not in finished:
                finished.add(what)
                if not console.is_terminal:
                    log(f"{what}: {total:,} done")

        yield hear
