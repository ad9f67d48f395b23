"""Whoever may write to a store does not reach the terminal of those who look at it: no verb sends a control character
of its texts.
"""

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.progress import BarColumn, Progress

from launcher.cli.__main__ import app
from launcher.evaluate.answering import Screen
from launcher.evaluate.evaluating import Evaluated
from launcher.view.console import FoldedTable, Terminal, description, progress_bars, time_left
from launcher.view.terminal import in_lines, put, visible
from tests.unit.run.made_records import CONFIG, NOW, end, start, step, write
from trainer.errors import CapstanError
from trainer.run import layout
from trainer.store.store import Store, open_store

TITLE, CSI, TURNED = "\x1b]0;title\x07", "\x9b31m", "\u202egpj"
EVIL = f"a{TITLE}b{CSI}c{TURNED}[link=https://evil][red]d"
SHOWN = r"a\x1b]0;title\x07b\x9b31mc\u202egpj[link=https://evil][red]d"


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run whose records, logs and manifests are somebody else's."""
    run = open_store(str(tmp_path)).sub("demo")
    run.put(layout.CONFIG, CONFIG.encode())
    begun = {**start(1), "machines": [EVIL], "device": EVIL, "dashboard": EVIL}
    named = {"kind": "eval", "step": 2, "set": EVIL, "loss": 1.0, "time": NOW}
    write(run, 1, begun, step(1, 2.0), named, {**end("failed", EVIL), "outcome": EVIL})
    run.put(layout.rank_log(1, 0), EVIL.encode())
    run.put(layout.DRIVER_LOG, f"{EVIL}\n".encode())
    run.put(layout.manifest(4), EVIL.encode())
    return run


@pytest.mark.parametrize(
    "command",
    [
        "status demo",
        "ls {store}",
        "logs demo",
        "logs demo --driver",
        "report demo -o -",
        "checkpoints ls demo",
    ],
)
def test_a_verb_shows_control_characters_and_sends_none(
    run: Store, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CAPSTAN_STORE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = ""
    try:
        app(command.format(store=tmp_path).split(), standalone_mode=False)
    except CapstanError as error:
        said = visible(str(error))
    out = "".join(capsys.readouterr()) + said
    assert not any(part in out for part in ("\x1b]", "\x07", "\x9b", "\u202e"))
    if command.startswith(("status", "logs")):
        assert SHOWN in out


def test_what_is_measured_and_what_a_model_says_is_shown_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    sides = {"base": {"loss": 1.0, "perplexity": 2.0}, "adapter": {"loss": 1.0, "perplexity": 2.0}}
    found = {"sets": {EVIL: {**sides, "tokens": 3, "difference": 0.1, "interval": [-1.0, 1.0]}}, "step": 4}
    found |= {"tasks": {EVIL: {EVIL: {"base": 1.0, "adapter": 1.0, "stderr": None}}}, "bias": {}}
    Terminal(force_terminal=True, width=400).print(Evaluated(found, "demo", EVIL).tables())
    Screen(sys.stdout, both=False, streams=True).piece("adapter", EVIL)
    out = capsys.readouterr().out
    assert not any(part in out for part in ("\x1b]", "\x07", "\x9b", "\u202e"))
    assert out.count(SHOWN) >= 4


def test_what_is_shown_and_not_sent_is_what_unicode_calls_control_and_what_turns_a_line_round() -> None:
    turning = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    every = map(chr, range(2**16))
    shown = {one for one in every if visible(one) != one}
    assert shown == {
        one
        for one in map(chr, range(2**16))
        if (unicodedata.category(one) in ("Cc", "Cs") or unicodedata.bidirectional(one) in turning)
        and one not in "\t\n"
    }
    assert visible("\x1b\u202e") == r"\x1b\u202e"


def test_a_text_is_printed_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    put("a\x07")
    put("b", end="", file=sys.stderr)
    assert capsys.readouterr() == ("a\\x07\n", "b")


@pytest.mark.parametrize(("shown", "expected"), [(True, True), (False, False), (None, False)])
def test_bars_are_shown_where_that_is_asked_for_and_else_in_a_terminal(
    shown: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with progress_bars(shown=shown) as bars:  # stderr is none in a test
        assert bars.disable is not expected


def test_a_narrow_table_wraps_its_cells_and_reads_none_as_markup() -> None:
    out, long = io.StringIO(), "a-name-that-is-longer-than-its-column-" * 3
    table = FoldedTable("run", "state")
    table.add_row(long, "[red]failed[/red]")
    Terminal(file=out, width=50).print(table)
    cells = [[part.strip() for part in line.split("│")] for line in out.getvalue().splitlines() if "│" in line]
    assert "".join(row[1] for row in cells) == long
    assert "".join(row[2] for row in cells) == "[red]failed[/red]"


def test_a_line_that_is_written_anew_is_several_lines_of_a_log() -> None:
    assert in_lines("10 %\r20 %\r\nend\n") == "10 %\n20 %\nend\n"
    assert json.dumps(EVIL).isascii()  # what --json prints


def test_a_terminal_of_no_columns_shows_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    out = io.StringIO()
    table = FoldedTable("run", "state")
    table.add_row("demo", "finished")
    Terminal(file=out).print(table)
    Terminal(file=out).print("[bold]as it is[/bold]")
    assert "demo" in out.getvalue()
    assert "[bold]as it is[/bold]" in out.getvalue()


def test_a_terminal_without_blocks_shows_a_status(run: Store) -> None:
    write(run, 1, start(4), step(1, 2.0), step(2, 1.0))
    command = [sys.executable, "-m", "launcher.cli", "status", run.uri]
    shown = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60)
    assert rb"\u2588\u2581" in shown.stdout, shown.stderr


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_terminal_cuts_off_the_time_that_a_bar_still_takes(width: int) -> None:
    words = "train data: 1,234,567 rows, 12,345,678 documents, 123,456,789 tokens, 1,234 bad rows"
    now, out = 0.0, io.StringIO()
    console = Terminal(file=out, width=width, force_terminal=True, color_system=None)
    bars = Progress(description(), BarColumn(), time_left(), console=console, get_time=lambda: now)
    task = bars.add_task(words, total=140_000)
    for seconds in range(1, 6):
        now = 10.0 * seconds
        bars.update(task, completed=10 * seconds)
    console.print(bars.get_renderable())
    assert "38:52:30" in out.getvalue()
    assert "…" not in out.getvalue()
