"""A run's status for people: as a table, and on a terminal live, as the run goes on."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from launcher.view.console import Terminal, facts
from launcher.view.runs import is_there, poll_seconds
from launcher.view.status import ENDED, SILENT_SECONDS, Follower, RunStatus, sparkline
from trainer.errors import StorageError
from trainer.run.lines import duration, figures_line, of_total
from trainer.store.store import Store


def render(status: RunStatus) -> RenderableType:
    """Return a small table of what is known."""
    table = facts()
    for name, text in _lines(status):
        if text:
            table.add_row(name, text)
    return table


_COLORS = {"finished": "green", "running": "green", "failed": "red", "silent": "yellow"}


def colored(state: str, more: str = "") -> Text:
    """Return a state in its color, and `more` about it."""
    return Text(state, _COLORS.get(state, "")).append(more, "default")


def _lines(status: RunStatus) -> Iterator[tuple[str, str | Text]]:
    """Yield name and text of each line of a status.

    A line without text is left out, so only what is known is shown.
    """
    yield "run", status.run
    more = ""
    if status.state not in ENDED and status.quiet_seconds is not None and status.quiet_seconds >= SILENT_SECONDS:
        more += f", nothing written for {duration(status.quiet_seconds)}"
    more += ", asked to stop" if status.stop_requested and status.state not in ENDED else ""
    yield "state", colored(status.state, more)
    yield "reason", status.reason
    yield "step", of_total(status.step, status.total_steps)
    yield "epoch", _epoch_line(status)
    yield "loss", _loss_line(status)
    yield "", sparkline(status.loss_curve)
    yield "reward", "" if status.reward is None else f"{status.reward:.4f}"
    for name, figures in status.measured.items():
        yield name, figures_line(figures)
    yield "held out", ", ".join(f"{name} {loss:.4f}" for name, loss in status.eval_losses.items())
    yield "lr", "" if status.lr is None else f"{status.lr:.3g}"
    if status.tokens_per_second is not None:
        eta = f", {duration(status.eta_seconds)} left" if status.eta_seconds is not None else ""
        yield "speed", f"{status.tokens_per_second:,.0f} tokens/s{eta}"
    yield "ranks", "" if status.world_size is None else _ranks_line(status)
    yield "dashboard", status.dashboard or ""
    yield "started", _start_line(status)
    if status.last_commit_step is not None:
        age = duration(status.last_commit_age_seconds or 0.0)
        yield "checkpoint", f"step {status.last_commit_step:,}, {age} ago"
    else:
        yield "checkpoint", "none committed"
    lost = ((status.failed_saves, "failed"), (status.skipped_saves, "skipped"))
    yield "saves", ", ".join(f"{count:,} {what}" for count, what in lost if count)
    for restart in status.restarts:
        where = "" if restart.step is None else f" at step {restart.step:,}"
        yield f"start {restart.generation}", f"went on{where} after: {restart.reason}"
    if status.gpu_hours is not None:
        cost = "" if status.cost is None else f", {status.cost:,.2f} in money"
        yield "GPU hours", f"{status.gpu_hours:,.2f}{cost}"
    yield "next", status.next


def _ranks_line(status: RunStatus) -> str:
    by_machine = ", ".join(f"{name}: {ranks}" for name, ranks in status.machines.items())
    shared = status.sequence_parallel
    return (
        f"{status.world_size}"
        + (f" = {(status.world_size or 0) // shared} x {shared} that share rows" if shared > 1 else "")
        + (f" ({by_machine})" if by_machine else "")
        + (f" on {status.device}" if status.device else "")
    )


def _start_line(status: RunStatus) -> str:
    parts = dict(status.start_seconds)
    if "first_step" not in parts:
        return ""
    total = parts.pop("first_step")
    return f"{total:.1f} s to the first step ({', '.join(f'{part} {took:.1f} s' for part, took in parts.items())})"


def _epoch_line(status: RunStatus) -> str:
    if status.epochs is not None and status.passes is not None:
        return f"{math.floor(100 * status.passes) / 100:.2f} of {status.epochs:g}"  # never a whole one that is not over
    return "" if status.passes is None else f"{status.passes:.2f}"


def _loss_line(status: RunStatus) -> str:
    if status.loss is None or status.loss_first is None:
        return ""
    evaluated = f", held out {status.eval_loss:.4f}" if status.eval_loss is not None else ""
    return f"{status.loss:.4f} nats (first {status.loss_first:.4f}){evaluated}"


def watch(
    folder: Store,
    stop: Callable[[], bool],
    *,
    console: Console | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> RunStatus:
    """Show the run's progress on stderr until `stop()` is true. Returns the status it saw last."""
    follower = Follower(folder)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    with Progress(*columns, console=console or Terminal(stderr=True)) as progress:
        task = progress.add_task("starting", total=None, steps="0/?", facts="")
        status = RunStatus(folder.uri, "starting")
        while True:
            last_look = stop()
            try:
                status = follower.read()
                facts = _facts(status)
            except StorageError:
                # The run itself is patient with the store. Its view must not end first.
                facts = "the store does not answer"
            progress.update(
                task,
                description=status.state,
                completed=status.step,
                total=status.total_steps,
                steps=f"{status.step:,}/{status.total_steps or '?'}",
                facts=facts,
            )
            if last_look:
                return status
            wait(poll_seconds(folder))


def watch_table(folder: Store, over: Callable[[], bool] | None) -> RunStatus | None:
    """Show all that is known, again and again, until the run has ended, or `over()`. Returns the status it saw last."""
    follower, ended = Follower(folder), 0
    with Live(console=Terminal(stderr=True), auto_refresh=False) as live:
        while True:
            with suppress(StorageError):  # the run itself is patient with the store; its view must not end first
                status = follower.read()
                live.update(render(status), refresh=True)
                ended = ended + 1 if status.state in ENDED else 0
                # There is a moment between an end and a restart, and a prepared run may be refused.
                if (over() if over else ended == 2) or not is_there(folder):
                    return status
            time.sleep(poll_seconds(folder))


def _facts(status: RunStatus) -> str:
    # The time that is left comes first, because narrow terminals cut off what comes last.
    parts = [] if status.eta_seconds is None else [f"{duration(status.eta_seconds)} left"]
    if status.epochs is not None and status.passes is not None:
        parts.append(f"epoch {_epoch_line(status)}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.last_commit_step is not None:
        parts.append(f"committed {status.last_commit_step:,}")
    if status.restarts:
        parts.append(f"start {status.generation}")
    return " · ".join(parts)
