"""`capstan evaluate`: its request to the ranks, what it shows meanwhile, and the result on the terminal.

The result has before and after side by side, and sentences about what is certain.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.progress import TextColumn
from rich.text import Text

from launcher.evaluate.ranks import Hear, for_server, run_ranks
from launcher.policy.foreign import check_own, evaluated_settings
from launcher.start.local_ranks import count_ranks
from launcher.view.console import FoldedTable, progress_bars
from trainer.base.find.locate import base_files
from trainer.config import Config, assignment
from trainer.config.paths import absolute_path, local_path
from trainer.data.render.chat_template import has_template
from trainer.errors import ConfigError, counted
from trainer.evaluate.program import Ask
from trainer.evaluate.subjects import subjects
from trainer.run import layout
from trainer.run.evaluations import FEWEST
from trainer.run.folder import run_config
from trainer.state.checkpoint.manifest import check_step, chosen_step, committed_steps
from trainer.store.store import Store

Log = Callable[[str], None]
SIDES = {"base": "base", "adapter": "now"}
"""The sides of an evaluation, and what each is called on a terminal."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation as the run's folder has it. `where` is its place, or None if it is not kept."""

    found: Mapping[str, Any]
    run: str
    where: str | None

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run, **self.found}

    def tables(self) -> Group:
        found, parts = self.found, list[Any]()
        if found["sets"]:
            parts.append(_sets(found["sets"]))
        if found["tasks"]:
            parts.append(_tasks(found["tasks"]))
        if found["bias"]:
            parts.append(_bias(found["bias"]))
        parts += [Text(sentence) for sentence in sentences(found["sets"])]
        if server := found.get("server"):
            parts.append(Text(f"by the server {server}, not by the run's own ranks"))
        if under := found.get("under"):
            parts.append(
                Text(f"step {found['step']}, not kept in the run's folder: {', '.join(under)} is not what the run has")
            )
        elif found["step"] is None:
            parts.append(
                Text("not kept in the run's folder: --step N says which checkpoint the server has, and keeps it")
            )
        elif self.where:
            parts.append(Text(f"step {found['step']}, kept in {self.where}"))
        return Group(*parts)


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
    check_own(folder, config, evaluated_settings, overrides, trust=trust)
    if server:
        config = for_server(config, "--server", "evaluate")
    step, every = chosen_step(folder, step, best=best), subjects(config)
    if chat:
        _check_chat(config)
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


def _check_chat(config: Config) -> None:
    """Raise `ConfigError` if there is no task to ask under a chat template, or no template."""
    if not config.eval.tasks:
        raise ConfigError("--chat: has no effect without a task. Give --tasks or eval.tasks, or leave it out.")
    if not has_template(config.data, base_files(config.model)):
        raise ConfigError(
            "--chat: the run has no chat template (data.template), and the tokenizer of model.base has none. Leave it"
            " out."
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


def sentences(sets: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each set about the change by the training.

    It says so if the interval of the difference leaves a doubt.
    """
    for name, found in sets.items():
        if shared := found.get("trained_on"):
            yield (
                f"{name}: {shared:,} of {found['documents']:,} documents are in the training data, so its change partly"
                " measures what was learnt by heart."
            )
        if "interval" not in found:
            continue
        if found["difference"] is None:
            lost = [SIDES[side] for side in SIDES if found[side]["loss"] is None]
            yield f"{name}: the loss is no finite number ({', '.join(lost)}), so nothing can be said of the change."
            continue
        if found["interval"] is None:
            yield (
                f"{name}: {found['difference']:+.4f} nats a token; {_documents(found['clusters'])} too few to tell that"
                f" from chance, for which {FEWEST} are needed."
            )
            continue
        low, high = found["interval"]
        change = f"{abs(found['difference']):.4f} nats a token (95 % interval {low:+.4f} to {high:+.4f})"
        if low > 0:
            yield f"{name}: the model has become worse by {change}: it has forgotten some of what its base knew."
        elif high < 0:
            yield f"{name}: the model has become better by {change}."
        else:
            yield (
                f"{name}: no certain change, {found['difference']:+.4f} nats a token (95 % interval {low:+.4f} to"
                f" {high:+.4f})."
            )


def _sets(sets: Mapping[str, Any]) -> FoldedTable:
    """Return a table of at most eighty columns: an arrow leads from each value of the base to that of the adapter."""
    after = len(_sides(sets.values())) > 1
    table = FoldedTable("set", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("tokens", "loss", "perplexity", *(("change", "95 % interval") if after else ())):
        table.add_column(column, no_wrap=True, justify="right")
    for name, found in sets.items():
        sides = [found[side] for side in SIDES if side in found]
        losses, perplexities = zip(*map(_loss, sides), strict=True)
        cells = [name, f"{found['tokens']:,}", " → ".join(losses), " → ".join(perplexities)]
        if after:
            change, interval = found["difference"], found["interval"]
            cells.append("-" if change is None else f"{change:+.4f}")
            cells.append("" if interval is None else "{:+.3f} to {:+.3f}".format(*interval))
        table.add_row(*cells)
    return table


def _documents(count: int) -> str:
    """Count the documents. Pieces of one text count once."""
    return f"{count} independent documents are" if count > 1 else "one independent document is"


def _loss(side: Mapping[str, Any]) -> tuple[str, str]:
    loss, perplexity = side["loss"], side["perplexity"]
    return "not finite" if loss is None else f"{loss:.4f}", "∞" if perplexity is None else f"{perplexity:,.4g}"


def _sides(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sides that were measured. A server may have only the model, and a run only the base."""
    seen = set[str]().union(*found)
    return [side for side in SIDES if side in seen]


def _tasks(tasks: Mapping[str, Any]) -> FoldedTable:
    sides = _sides(of for metrics in tasks.values() for of in metrics.values())
    table = FoldedTable("task", "metric", *(SIDES[side] for side in sides), caption="± a standard error")
    for task, metrics in tasks.items():
        for metric, found in metrics.items():
            errors = {"base": found.get("base_stderr"), "adapter": found["stderr"]}
            table.add_row(task, metric, *(_with_error(found[side], errors[side]) for side in sides))
    return table


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _bias(groups: Mapping[str, Any]) -> FoldedTable:
    sides = _sides(groups.values())
    heads = [f"{measure}, {SIDES[side]}" for side in sides for measure in ("mean gap", "spread")]
    table = FoldedTable(
        "pairs of", "pairs", *heads, caption="log p of the first sentence less that of the second, nats"
    )
    for group, found in groups.items():
        values = [
            f"{found[side][measure]:+.4f}" if measure == "mean" else f"{found[side][measure]:.4f}"
            for side in sides
            for measure in ("mean", "std")
        ]
        table.add_row(group, f"{found['pairs']}", *values)
    return table
