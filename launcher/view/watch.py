"""A run for people who look on, from its folder alone: its status as a table or live, its progress as lines, its logs.

The plain lines are for places without a terminal. The logs are those of its ranks and drivers.
"""

import codecs
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from launcher.view.console import Terminal, facts, outdated
from launcher.view.runs import is_there, poll_seconds
from launcher.view.status import ENDED, SILENT_SECONDS, Follower, Restart, RunStatus, said_here, sparkline
from trainer.errors import ConfigError, NotFound, StorageError, counted
from trainer.processes.helper_thread import now_doing
from trainer.run import layout
from trainer.run.lines import PlainLines, duration, figures_line, of_total, slow_sentence
from trainer.run.owner import read_owner
from trainer.run.records import RunReader, generations
from trainer.run.segments import Appended, Segment, read_stream, stored_bytes, streams
from trainer.store.store import Store

_PIECE, _SEARCHED, _SEARCHED_LINE = 2**20, 2**26, 2**20
_MOST_FOUND, _LONGEST_LINE = 200, 2000
_MOST_WRONG = 5


def render_status(status: RunStatus) -> RenderableType:
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
    yield "accuracy", _accuracy_line(status)
    yield "reward", "" if status.reward is None else f"{status.reward:.4f}"
    for name, figures in status.measured.items():
        yield name, figures_line(figures)
    yield "held out", ", ".join(f"{name} {loss:.4f}" for name, loss in status.eval_losses.items())
    yield "lr", "" if status.lr is None else f"{status.lr:.3g}"
    if status.tokens_per_second is not None:
        eta = f", {duration(status.eta_seconds)} left" if status.eta_seconds is not None else ""
        yield "speed", f"{status.tokens_per_second:,.0f} tokens/s{eta}"
    yield "ranks", "" if status.world_size is None else _ranks_line(status)
    for slow in status.slow_ranks:
        yield "slow", slow_sentence({"kind": "slow_rank", **asdict(slow)})
    for said in status.wrong_bytes[-_MOST_WRONG:]:
        yield "wrong", said
    yield "dashboard", status.dashboard or ""
    yield "started", _start_line(status)
    for part, late in status.start_slowest.items():
        yield "late", late_sentence(part, late)
    if status.last_commit_step is not None:
        age = duration(status.last_commit_age_seconds or 0.0)
        yield "checkpoint", f"step {status.last_commit_step:,}, {age} ago"
    else:
        yield "checkpoint", "none committed"
    lost = ((status.failed_saves, "failed"), (status.skipped_saves, "skipped"))
    yield "saves", ", ".join(f"{count:,} {what}" for count, what in lost if count)
    for restart in status.restarts:
        where = "" if restart.step is None else f" at step {restart.step:,}"
        where += _PLACES.get(restart.restored or "", "")
        yield f"start {restart.generation}", f"went on{where} after: {restart.reason}{_cost(restart)}"
    if len(status.restarts) > 1:
        again = f", {counted(status.again, 'update')} made again" if status.again else ""
        yield "lost", f"{duration(status.lost_seconds)} by restarts{again}"
    if status.gpu_hours is not None:
        cost = "" if status.cost is None else f", {status.cost:,.2f} in money"
        yield "GPU hours", f"{status.gpu_hours:,.2f}{cost}"
    yield "next", status.next


_PLACES = {"memory": ", which was in memory,", "neighbour": ", which was in another machine's memory,"}


def _cost(restart: Restart) -> str:
    """Return a sentence on what a restart has cost, once it has made a new update."""
    if restart.lost_seconds is None:
        return ""
    read = "" if restart.read_bytes is None else f", {restart.read_bytes:,} bytes of the base read"
    again = f"{counted(restart.again, 'update')} made again"
    return f"; a new update {duration(restart.lost_seconds)} later, {again}{read}"


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


def late_sentence(part: str, late: Mapping[str, Any]) -> str:
    """Name the rank that the others waited for in a part of the start."""
    took = f"took {late['seconds']:.1f} s, the median {late['median']:.1f} s"
    return f"rank {late['rank']} on {late['machine']} was last: its {part} {took}"


def _epoch_line(status: RunStatus) -> str:
    if status.epochs is not None and status.passes is not None:
        return f"{math.floor(100 * status.passes) / 100:.2f} of {status.epochs:g}"  # never a whole one that is not over
    return "" if status.passes is None else f"{status.passes:.2f}"


def _loss_line(status: RunStatus) -> str:
    if status.loss is None or status.loss_first is None:
        return ""
    evaluated = f", held out {status.eval_loss:.4f}" if status.eval_loss is not None else ""
    return f"{status.loss:.4f} nats (first {status.loss_first:.4f}){evaluated}"


def _accuracy_line(status: RunStatus) -> str:
    if status.accuracy is None:
        return ""
    return f"{status.accuracy:.1%}" + ("" if status.eval_accuracy is None else f", held out {status.eval_accuracy:.1%}")


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
    follower, ended, shown = Follower(folder), 0, facts()
    with Live(console=Terminal(stderr=True), auto_refresh=False) as live:
        while True:
            try:
                status = follower.read()
                live.update(shown := render_status(status), refresh=True)
                ended = ended + 1 if status.state in ENDED else 0
                # There is a moment between an end and a restart, and a prepared run may be refused.
                if (over() if over else ended == 2) or not is_there(folder):
                    return status
            except StorageError as error:  # the run itself is patient with the store; its view must not end first
                live.update(outdated(shown, error), refresh=True)
            time.sleep(poll_seconds(folder))


def _facts(status: RunStatus) -> str:
    # The time that is left comes first, because narrow terminals cut off what comes last.
    parts = [] if status.eta_seconds is None else [f"{duration(status.eta_seconds)} left"]
    if status.epochs is not None and status.passes is not None:
        parts.append(f"epoch {_epoch_line(status)}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.accuracy is not None:
        parts.append(f"accuracy {status.accuracy:.1%}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.last_commit_step is not None:
        parts.append(f"committed {status.last_commit_step:,}")
    if status.restarts:
        parts.append(f"start {status.generation}")
    return " · ".join(parts)


def read_log(folder: Store, rank: int, generation: int | None = None) -> str:
    """Return the output of `rank` in `generation`; by default in the newest one that it has a log of.

    Raises `ConfigError` when there is no such log, naming the ranks that have one.
    """
    chosen, _ = _chosen_log(folder, rank, generation)
    return read_stream(folder, layout.LOGS, layout.rank_log(chosen, rank)).decode(errors="replace")


def find_in_log(folder: Store, rank: int, generation: int | None, words: str) -> list[str]:
    """Return the last lines of the log of `rank` that hold all `words`. Raises `ConfigError` as `read_log`."""
    return find_lines(folder, _chosen_log(folder, rank, generation)[1], words)[0]


def find_lines(folder: Store, segments: Sequence[Segment], words: str) -> tuple[list[str], bool]:
    """Return the last lines of a log that hold all `words`, and whether the whole log was searched.

    Long lines are cut, and of a long log its end is searched.
    """
    wanted, found, size = words.lower().encode().split(), list[str](), stored_bytes(segments)
    begin, rest = max(0, size - _SEARCHED), b""
    for segment in segments:
        first = max(begin - segment.begin, 0)
        for start in range(first, segment.entry.size, _PIECE):
            data = bytes(folder.get_range(segment.entry.key, start, min(start + _PIECE, segment.entry.size)))
            last = segment is segments[-1] and start + _PIECE >= segment.entry.size
            *lines, rest = (rest[-_SEARCHED_LINE:] + data + b"\n" * last).split(b"\n")
            fitting = (line for line in lines if line and all(word in line.lower() for word in wanted))
            found += [line[:_LONGEST_LINE].decode(errors="replace") for line in fitting]
            del found[:-_MOST_FOUND]
    return found, begin == 0


def _chosen_log(folder: Store, rank: int, generation: int | None) -> tuple[int, list[Segment]]:
    logs = rank_logs(folder)
    newest = max((number for number, owner in logs if owner == rank), default=None)
    chosen = newest if generation is None else generation
    if chosen is None or (chosen, rank) not in logs:
        of = "" if generation is None else f" in generation {generation}"
        known = sorted({owner for number, owner in logs if generation in (None, number)})
        ranks = ", ".join(map(str, known)) or "none"
        raise ConfigError(f"rank {rank} of {folder.uri} has no log{of}. Ranks with one: {ranks}.")
    return chosen, logs[chosen, rank]


def read_driver_log(folder: Store) -> str:
    """Return the messages of the run's drivers, one line each with its time.

    If a driver ended before it could write any, return its output, which is at hand if it was started on this machine.
    """
    try:
        return folder.get(layout.DRIVER_LOG).decode(errors="replace")
    except NotFound as error:
        owner = read_owner(folder)
        if owner and owner.output:
            if said := said_here(owner):
                return said
            raise ConfigError(
                f"{folder.uri} has no driver's log yet. What its driver says is in {owner.output} on {owner.host}."
            ) from error
        raise ConfigError(
            f"{folder.uri} has no driver's log: its ranks were started by torchrun or srun, or it never ran."
        ) from error


def follow_log(
    folder: Store,
    rank: int,
    generation: int | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Yield the output of `rank` as it comes in, until `stop()` holds. A store that does not answer is asked again.

    Without `generation` it continues into every new one.
    """
    first = generation
    readers: dict[int, tuple[Appended, codecs.IncrementalDecoder]] = {}
    while True:
        last_look, logs = stop(), dict[int, list[Segment]]()
        with suppress(StorageError):  # the run itself is patient with the store
            logs = {number: found for (number, owner), found in sorted(rank_logs(folder).items()) if owner == rank}
        if first is None:
            first = max(logs, default=None)
        for number, segments in logs.items():
            if first is None or number < first or generation not in (None, number):
                continue
            if number not in readers:
                readers[number] = Appended(folder), codecs.getincrementaldecoder("utf-8")("replace")
            appended, decoder = readers[number]
            data = b""
            with suppress(StorageError):
                data = appended.read(segments)
            if text := decoder.decode(data):
                yield text
        if last_look:
            return
        wait(poll_seconds(folder))


def rank_logs(folder: Store) -> dict[tuple[int, int], list[Segment]]:
    """Return the segments of each log by its generation and rank."""
    found = {}
    for stream, segments in streams(folder.list(layout.LOGS)).items():
        numbers = [int(digits) for digits in re.findall(r"\d+", stream)]
        if len(numbers) == 2 and layout.rank_log(*numbers) == stream:
            found[numbers[0], numbers[1]] = segments
    return found


def follow_lines(
    folder: Store,
    stop: Callable[[], bool],
    every: int,
    log: Callable[[str], None],
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Give `log` the lines of the starts that begin from now on, and of some steps, until `stop()` is true."""
    lines, reader, before = PlainLines(every), RunReader(folder), None
    while every:
        last_look = stop()
        with suppress(StorageError):  # the run itself is patient with the store
            if before is None:
                before = max(generations(folder), default=0)
            for number, records in reader.read(streams(folder.list(layout.METRICS))):
                for record in records if number > before else ():
                    if text := lines.of(record):
                        log(text)
                    if doing := lines.doing(record):
                        now_doing(doing)
        if last_look:
            return
        wait(3 * poll_seconds(folder))  # a log is read less often than a live view
