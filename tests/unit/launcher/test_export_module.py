"""The lines of a process that exports reach the bar, and its last line is the result."""

import sys
from typing import Any

import pytest
from rich.filesize import decimal

from launcher import export
from trainer.errors import CapstanError
from trainer.export.destination import ExportProgress
from trainer.processes import children

PROGRAM = """
import sys
print("progress 1 4", flush=True)
print("say Converting.", flush=True)
print("progress 4 4", flush=True)
if sys.argv[1:] == ["fails"]:
    print("capstan: the destination is taken.", file=sys.stderr)
    sys.exit(2)
if sys.argv[1:] == ["crashes"]:
    raise RuntimeError("no such kernel")
print('{"step": 7}')
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    start = children.start
    monkeypatch.setattr(
        export.children, "start", lambda command, **given: start([sys.executable, "-c", PROGRAM, *command[3:]], **given)
    )


@pytest.mark.usefixtures("started")
def test_progress_and_sentences_are_told_and_the_last_line_is_the_result() -> None:
    done, said = list[Any](), list[str]()
    progress = ExportProgress(lambda *bytes_done: done.append(bytes_done), said.append)
    assert export.run_module("any.module", progress=progress) == {"step": 7}
    assert (done, said) == ([(1, 4), (4, 4)], ["Converting."])


@pytest.mark.parametrize(("size", "said"), [(4 * 10**9, [0, 12, 30]), (4 * 10**6, [12, 30])])
def test_much_work_is_told_of_at_once_and_then_every_ten_seconds_until_it_is_done(size: int, said: list[int]) -> None:
    now, lines = 0, list[str]()
    line = export.lines("merging", lines.append, lambda: float(now))
    for now in (0, 3, 12, 21, 30, 40):
        line(size * now // 40, size)
    assert lines == [f"merging: {decimal(size * at // 40)} of {decimal(size)}" for at in said]


@pytest.mark.usefixtures("started")
def test_its_error_and_exit_code_become_ours() -> None:
    with pytest.raises(CapstanError, match=r"^the destination is taken\.$") as caught:
        export.run_module("any.module", "fails", progress=ExportProgress(lambda *_: None, lambda _: None))
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("started")
def test_a_crash_is_shown_whole_and_its_exit_code_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CapstanError, match=r"^any\.module ended with exit code 1; its output is above\.$") as caught:
        export.run_module("any.module", "crashes", progress=ExportProgress(lambda *_: None, lambda _: None))
    assert caught.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.rstrip().endswith("RuntimeError: no such kernel")
