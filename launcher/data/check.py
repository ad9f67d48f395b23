"""`capstan data check`: a report on the data, on the terminal or as JSON."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.progress import Progress as Bars
from rich.text import Text

from launcher.view.compiling import describe_left_out
from launcher.view.console import FoldedTable, Terminal
from trainer.base.find.check import check_base
from trainer.base.find.locate import resolve_base
from trainer.config import load_config
from trainer.data.compile.encode import untagged_note
from trainer.data.compile.inputs import find
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.look.check import DataReport, Findings, check_data

_BAR = 30


def check(path: Path, overrides: Sequence[str], say: Callable[[str], None]) -> DataReport:
    """Read every row of the run's sources, and tokenize it."""
    config = load_config(path, overrides, say)
    base = resolve_base(config.model)
    check_base(base, config)
    inputs = find(config)
    with Bars(console=Terminal(stderr=True), disable=not sys.stderr.isatty()) as bars:
        tasks = {what: bars.add_task(f"reading {what} data") for what in inputs}

        def show(what: str, done: int, size: int) -> None:
            bars.update(tasks[what], completed=done, total=size)

        return check_data(config, load_tokenizer(base), inputs, show)


def report_table(report: DataReport) -> RenderableType:
    """Return the report for a terminal: counts side by side, lengths, and examples of what is wrong."""
    counts = FoldedTable("", *(f"{what} data" for what in report.splits))
    columns = [_counts(found) for found in report.splits.values()]
    for name in columns[0]:
        counts.add_row(name, *(column.get(name, "") for column in columns))
    parts: list[RenderableType] = [counts]
    for what, found in report.splits.items():
        parts += [_histogram(what, found), *_lost(what, found)]
        parts += [Text(f"bad row: {text}") for text in found.bad_row_examples]
        parts += map(Text, untagged_note(found.untagged))
        parts += [Text(f"left out by the chat template: {text}") for text in describe_left_out(found.left_out)]
        parts += [Text(f"a field of no use: {text}") for text in describe_left_out(found.unused_fields)]
        parts += [Text(f"alike: {row} and {earlier}") for row, earlier in found.duplicate_examples]
    return Group(*parts)


def _counts(found: Findings) -> dict[str, str]:
    def of_rows(count: int) -> str:
        return f"{count:,} ({100 * count / max(found.rows, 1):.2f} %)" if count else "0"

    shared = found.in_train
    return {
        "rows": f"{found.rows:,}",
        "documents": f"{found.documents:,}",
        "tokens": f"{found.tokens:,}",
        "trained tokens": f"{found.targets:,} ({100 * found.targets / max(found.tokens, 1):.1f} %)",
        "lengths": ", ".join(f"{name} {value:,}" for name, value in found.lengths.items()),
        "longer than sequence_length": of_rows(found.too_long),
        "tokens above it": f"{found.tokens_cut:,}",
        "fill of packed rows": f"{found.fill:.4f} ({found.packed_rows:,} rows)",
        "bad rows": of_rows(found.bad_rows),
        "undecodable bytes": of_rows(found.undecodable),
        "nothing to train on": of_rows(found.without_targets),
        "one-sided": of_rows(found.one_sided),
        "an empty turn": of_rows(found.empty_turns),
        "odd roles": of_rows(found.odd_roles),
        "exact duplicates": of_rows(found.exact_duplicates),
        "near duplicates": of_rows(found.near_duplicates),
        "also in the training data": f"{shared['exact']:,} exactly, {shared['near']:,} nearly" if shared else "",
    }


def _histogram(what: str, found: Findings) -> FoldedTable:
    table = FoldedTable(f"tokens, {what} data", "documents", "", show_edge=False)
    most = max(found.histogram.values(), default=1)
    for bound, count in sorted(found.histogram.items()):
        table.add_row(f"up to {bound:,}", f"{count:,}", "█" * -(-_BAR * count // most))
    return table


def _lost(what: str, found: Findings) -> list[FoldedTable]:
    if not found.lost:
        return []
    titles = ("documents longer", "targets lost, cut", "targets lost, dropped")
    table = FoldedTable(f"data.sequence_length, {what} data", *titles, show_edge=False)
    for length, lost in found.lost.items():
        table.add_row(f"{length:,}", *(f"{100 * share:.2f} %" for share in lost))
    return [table]
