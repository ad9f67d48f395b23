"""`capstan data build`, `check` and `show`: compile ahead of time, report on data, show rows as the model sees them.

The report and the rows are on the terminal or JSON.
"""

import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import Progress as Bars
from rich.text import Text

from launcher.cluster.ray.cluster import address_of, is_dashboard
from launcher.cluster.ray.data import join_and_map
from launcher.view.compiling import compile_progress, describe_left_out
from launcher.view.console import FoldedTable, Terminal
from trainer.base.find.check import check_base
from trainer.base.find.locate import base_files, resolve_base
from trainer.base.find.media import modalities
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config, load_config, unsaid
from trainer.config.secrets import refuse_secrets
from trainer.data.compile.encode import untagged_note
from trainer.data.compile.inputs import find
from trainer.data.compile.prepare import load_tokenizer, locate, prepare
from trainer.data.dataset.manifest import DatasetManifest, read_manifest
from trainer.data.look.check import DataReport, Findings, PictureFindings, check_data
from trainer.data.look.show import SeenDocument, SeenRow, ShownPicture, TextPiece, Viewer
from trainer.errors import ConfigError, NotFound
from trainer.store.store import open_run_store

_BAR = 30
_MOST_NAMED = 5
_FIRST_ROWS = 3
# These marks surround what is trained if there is no colour to show it.
_MARKS = "⟦", "⟧"


@dataclass(frozen=True)
class Built:
    """The compiled data by split; None if a dry run found that it still has to be compiled."""

    splits: dict[str, tuple[str, DatasetManifest | None]]

    def to_json(self) -> dict[str, Any]:
        found = dict[str, Any]()
        for what, (key, manifest) in self.splits.items():
            found[what] = {"fingerprint": key, "compiled": manifest is not None}
            if manifest:
                left_out = {name: rows.model_dump() for name, rows in (manifest.left_out or {}).items()}
                found[what] |= {**_figures(manifest), "left_out": left_out}
        return found

    def table(self) -> FoldedTable:
        table = FoldedTable("", *self.splits)
        table.add_row("fingerprint", *(key for key, _ in self.splits.values()))
        compiled = [_figures(manifest) if manifest else {} for _, manifest in self.splits.values()]
        table.add_row("state", *("compiled" if figures else "to be compiled" for figures in compiled))
        for name in next((figures for figures in compiled if figures), {}):
            table.add_row(name.replace("_", " "), *(f"{figures[name]:,}" if figures else "" for figures in compiled))
        return table


def _figures(manifest: DatasetManifest) -> dict[str, int]:
    counters = manifest.counters
    return {
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "targets": manifest.targets,
        "truncated": counters.truncated,
        "split": counters.split,
        "dropped": counters.dropped,
        "without_targets": counters.without_targets,
        "bad_rows": counters.bad_rows,
    }


def build(config: Config, *, dry_run: bool, log: Callable[[str], None]) -> Built:
    """Compile what is missing, on the Ray cluster of cluster.ray.address or RAY_ADDRESS, else on this machine."""
    refuse_secrets(config)
    base, store = resolve_base(config.model), open_run_store(config)
    check_base(base, config)
    if not dry_run:
        cluster = address_of(config)
        if cluster and is_dashboard(cluster):
            log(
                f"compiling on this machine: {cluster} takes jobs, and no driver. Give the cluster's own address, such"
                " as head:6379."
            )
            cluster = None
        mapper = partial(join_and_map, cluster, log) if cluster else None
        with compile_progress(log, bar=sys.stderr.isatty()) as show:
            prepare(config, base, store, show, mapper)
    splits: dict[str, tuple[str, DatasetManifest | None]] = {}
    for what, key in locate(config, base).items():
        try:
            splits[what] = (key, read_manifest(store, key))
        except NotFound:
            splits[what] = (key, None)
    return Built(splits)


def report_data(path: Path, overrides: Sequence[str], say: Callable[[str], None]) -> DataReport:
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
        **(_counts_of_pictures("pictures", found.pictures) if found.pictures else {}),
        **{key: value for noun, own in found.files.items() for key, value in _counts_of_pictures(noun, own).items()},
        **(
            {"bad rows by their pictures, videos or sounds": of_rows(found.bad_pictures)}
            if found.pictures or found.files or found.bad_pictures
            else {}
        ),
    }


def _counts_of_pictures(noun: str, found: PictureFindings) -> dict[str, str]:
    trained, sizes = found.also_trained, "sizes" if noun == "pictures" else f"sizes of {noun}"
    return {
        noun: f"{found.count:,}, {found.different:,} of them different",
        f"tokens of {noun}": f"{found.tokens:,}",
        sizes: ", ".join(f"{size} ({count:,})" for size, count in found.sizes.items()),
        **({"pixels": ", ".join(f"{name} {value:,}" for name, value in found.pixels.items())} if found.pixels else {}),
        f"{noun} also in the training data": "" if trained is None else f"{trained:,}",
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


@dataclass(frozen=True)
class Shown:
    """Rows of one split, the places of rows between them that `data.held_out` keeps apart, and the bytes of their
    pictures by SHA-256."""

    split: str
    rows: list[SeenRow]
    held_out: list[str] = field(default_factory=list[str])
    pictures: dict[str, bytes] = field(default_factory=dict[str, bytes])

    def to_json(self) -> dict[str, Any]:
        """The rows without the bytes of their pictures, which are named by their SHA-256."""
        return asdict(replace(self, pictures={}))


def show(
    path: Path,
    overrides: Sequence[str],
    say: Callable[[str], None] = unsaid,
    *,
    row: int | None,
    packed: bool,
    split: str,
) -> Shown:
    """Return the row of this number, else the first rows; packed rows if `packed`. Reads no more than is shown.

    Raises:
        ConfigError: the configuration has no such split.
        DataError: there is no such row.
    """
    config = load_config(path, overrides, say)
    inputs = find(config)
    if split not in inputs:
        raise ConfigError(f"--split: {split!r} is none of this configuration's: {', '.join(inputs)}.")
    tokenizer = read_tokenizer(base_files(config.model), config.model.base, config.model.tokens)
    viewer = Viewer(config, tokenizer, inputs[split])
    if packed:
        return Shown(split, [viewer.packed(row or 1)], viewer.held_out, viewer.pictures)
    return Shown(split, viewer.rows(row or 1, 1 if row else _FIRST_ROWS), viewer.held_out, viewer.pictures)


def page_of_rows(shown: Shown) -> str:
    """Return one file of HTML with the rows, and each picture in its place."""
    from jinja2 import PackageLoader

    from launcher.report.page import environment

    known = {modality.kind: modality for modality in modalities()}

    def sources(picture: ShownPicture) -> list[str]:
        parts = known[picture.kind].browsed(shown.pictures[picture.sha256])
        return [f"data:{kind};base64,{b64encode(content).decode()}" for kind, content in parts]

    page = environment(PackageLoader("launcher", "data")).get_template("rows.html.j2")
    return page.render(shown=shown, title_of=_title, sources=sources)


def render_shown(shown: Shown, console: Console | None = None) -> str:
    """Render the rows for a terminal: what is trained is green, or in brackets if there are no colours."""
    console = console or Terminal()
    marks = ("", "") if console.color_system and not console.no_color else _MARKS
    with console.capture() as capture:
        for row in shown.rows:
            form = f", read as {row.form}" if row.form else ""
            console.print(Text(f"{row.where}{form}", "bold"), soft_wrap=True)
            for document in row.documents:
                console.print(Text(_title(document), "dim"), soft_wrap=True)
                console.print(_text(document.pieces, marks), soft_wrap=True)
            if row.padding is not None:
                console.print(Text(f"── {row.padding:,} tokens of padding", "dim"), soft_wrap=True)
            for warning in row.warnings:
                console.print(Text(f"! {warning}", "yellow"), soft_wrap=True)
            console.print()
        if shown.held_out:
            named = ", ".join(shown.held_out[:_MOST_NAMED]) + (", ..." if len(shown.held_out) > _MOST_NAMED else "")
            console.print(Text(f"held out (data.held_out), as --split eval shows: {named}", "dim"), soft_wrap=True)
        legend = "trained tokens are green" if not marks[0] else f"trained tokens are in {''.join(marks)}"
        console.print(Text(f"{legend}; special tokens are {'underlined' if not marks[0] else 'as written'}", "dim"))
    return capture.get().rstrip("\n")


def _title(document: SeenDocument) -> str:
    part = f"{document.part}, " if document.part else ""
    trained = sum(document.trained)
    return f"── {document.where}: {part}{len(document.tokens):,} tokens, {trained:,} trained"


def _text(pieces: Sequence[TextPiece], marks: tuple[str, str]) -> Text:
    text, open_ = Text(), False
    for piece in pieces:
        if piece.trained != open_:
            text.append(marks[piece.trained is False])
            open_ = piece.trained
        style = f"{'bold green' if piece.trained else 'default'}{' underline' if piece.special else ''}"
        text.append(_visible(piece.text), style)
    return text.append(marks[1]) if open_ else text


def _visible(text: str) -> str:
    """Return `text` without characters that would move a terminal's cursor: rows may hold every character."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
