"""`capstan data show`: rows as the model sees them, on the terminal or as JSON."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launcher.view.console import Terminal
from trainer.base.find.locate import base_files
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import load_config, unsaid
from trainer.data.compile.inputs import find
from trainer.data.look.show import SeenDocument, SeenRow, TextPiece, Viewer
from trainer.errors import ConfigError

_FIRST_ROWS = 3
# These marks surround what is trained if there is no colour to show it.
_MARKS = "⟦", "⟧"


@dataclass(frozen=True)
class Shown:
    """Rows of one split."""

    split: str
    rows: list[SeenRow]


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
        return Shown(split, [viewer.packed(row or 1)])
    return Shown(split, viewer.rows(row or 1, 1 if row else _FIRST_ROWS))


def render(shown: Shown, console: Console | None = None) -> str:
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
