"""The progress of a compilation for people: a bar on a terminal, or a line of a log now and then."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.progress import TaskID

from launcher.view.console import progress_bars
from trainer.data.compile.compile import Progress
from trainer.data.dataset.manifest import LeftOut
from trainer.data.format.unrendered import left_out_in_words

_LOG_SECONDS = 10.0


@contextmanager
def compile_progress(log: Callable[[str], None], *, bar: bool) -> Iterator[Callable[[str, Progress], None]]:
    """Show what `prepare` reports: as a bar on the terminal, or as a line of the log now and then."""
    first: tuple[float, int] | None = None
    next_line, tasks = 0.0, dict[str, TaskID]()

    def describe(what: str, now: Progress) -> str:
        nonlocal first
        if not now.rows:
            return f"compiling {what} data"
        first = first or (time.monotonic(), now.tokens)
        speed = (now.tokens - first[1]) / max(time.monotonic() - first[0], 1e-3)
        return f"compiling {what} data: {now.documents:,} documents, {now.tokens:,} tokens, {speed:,.0f} tokens/s"

    with progress_bars(shown=bar) as bars:

        def show(what: str, now: Progress) -> None:
            nonlocal next_line
            for sentence in (*now.forms, *now.notes):  # how the rows of each source are read, if that was detected
                log(f"{what} data: {sentence}")
            if bar and what not in tasks:
                tasks[what] = bars.add_task(what)
            if bar:
                bars.update(tasks[what], description=describe(what, now), completed=now.bytes_done, total=now.bytes)
            elif time.monotonic() >= next_line:
                log(f"{describe(what, now)} ({100 * now.bytes_done / max(now.bytes, 1):.0f} %)")
                next_line = time.monotonic() + _LOG_SECONDS
            log_left_out(log, what, now)

        yield show


def log_left_out(log: Callable[[str], None], what: str, now: Progress) -> None:
    """Say, once all rows are compiled, which parts of them the model will never see."""
    if now.left_out:
        log(f"{what} data: the chat template leaves out what rows carry: {'; '.join(describe_left_out(now.left_out))}")


def describe_left_out(left_out: Mapping[str, LeftOut]) -> list[str]:
    return [
        f"{left_out_in_words(name)} in {found.rows:,} rows, such as {found.examples[0]}"
        for name, found in left_out.items()
    ]
