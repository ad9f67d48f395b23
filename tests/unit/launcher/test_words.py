"""What commands say and do in small: where they wait, what they leave, which options they take."""

import errno
import shlex
import socket
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from launcher.cli.__main__ import app
from launcher.cli.command import commands
from launcher.doctor.doctor import Check, Diagnosis, diagnosis_table
from launcher.export import lines
from launcher.report import report
from launcher.start.check import checked, warn_of_place
from launcher.view.console import Terminal
from launcher.view.status import read_status
from tests.unit.run.made_records import CONFIG, NOW, end, start, step, write
from trainer.base.find.locate import resolve_base
from trainer.config import parse_config
from trainer.errors import BaseOutOfReach, ConfigError, StorageError
from trainer.processes import helper_thread
from trainer.run import layout
from trainer.store import hub
from trainer.store.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    run = open_store(str(tmp_path)).sub("demo")
    run.put(layout.CONFIG, CONFIG.encode())
    return run


def test_ls_takes_its_store_as_every_other_verb_does(
    run: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, 1, start(1), step(1, 2.0), end("finished"))
    for arguments in (["ls", "--store", str(tmp_path)], ["ls", str(tmp_path)]):
        app(arguments, standalone_mode=False)
        assert "demo" in capsys.readouterr().out


def test_a_report_that_finds_no_room_leaves_what_was_there(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, 1, start(1), step(1, 2.0), end("finished"))
    page = tmp_path / "page.html"

    def full(path: Path, text: str, **_: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        with pytest.raises(StorageError, match="No space left"):
            report.write_report([run], page)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]
    report.write_report([run], page)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_run_that_is_not_going_on_has_no_time_left(run: Store) -> None:
    write(run, 1, start(1), {**step(4, 2.0), "passes": 0.2})
    status = read_status(run, lambda: NOW + 1000)
    assert (status.state, status.eta_seconds, status.passes) == ("silent", None, 0.2)


def test_a_base_of_the_hub_is_refused_soon_where_the_hub_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, given_up, over = list[object](), list[object](), threading.Event()

    def nobody(address: object, *_: object) -> socket.socket:
        asked.append(address)
        over.wait(60)  # as a name server that does not answer
        given_up.append(address)
        raise OSError

    assert hub._PATIENCE_SECONDS < 3, "the wait without a network"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", nobody)
    monkeypatch.setattr(hub, "_PATIENCE_SECONDS", 0.2)
    hub.hub_answers.cache_clear()
    config = parse_config(
        "run: {name: a}\nmodel: {base: nobody/nothing}\ndata: {train: [{path: a}]}\ntrain: {steps: 1}"
    )
    with pytest.raises(ConfigError, match=r"huggingface\.co:443 cannot be reached from here, and the cache lacks it"):
        resolve_base(config.model)
    assert (asked, given_up) == (
        [("huggingface.co", 443)],
        [],
    )  # it was asked once, and nobody has waited for the end of that
    over.set()
    hub.hub_answers.cache_clear()


def test_the_help_of_every_verb_ends_in_an_example_that_the_command_takes() -> None:
    root: Any = get_command(app)
    for line in (command.example for _, command in commands()):
        words = shlex.split(line)
        group = root.commands[words[0]]
        verb, rest = (group.commands[words[1]], words[2:]) if hasattr(group, "commands") else (group, words[1:])
        verb.make_context(words[0], list(rest), resilient_parsing=True)
        assert verb.epilog == f"Example: capstan {line}".replace("[", r"\[")


def test_help_shows_brackets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    app(["export", "--help"], standalone_mode=False)
    out = capsys.readouterr().out
    assert out.count("types=[f16,q8_0]") == 2
    assert "Example: capstan export first" in out


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/tmp/runs", "Attention: run.store: /tmp/runs is among this machine's temporary files"),
        ("/shared/runs", "run.store is the folder /shared/runs: every machine"),
        ("s3://bucket/runs", ""),
    ],
)
def test_a_folder_as_the_store_of_other_machines_is_said_to_be_one(place: str, words: str) -> None:
    text = (
        f"run: {{name: a, store: '{place}'}}\nmodel: {{base: b}}\ndata: {{train: [{{path: a}}]}}\ntrain: {{steps: 1}}"
    )
    said = list[str]()
    warn_of_place(parse_config(text), said.append)
    assert "".join(said).startswith(words)
    assert bool(said) == bool(words)


def test_a_dry_run_needs_neither_the_hub_nor_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise BaseOutOfReach("model.base: it cannot be reached", "it cannot be reached")

    said = list[str]()
    monkeypatch.setattr("launcher.start.check.check", unreachable)
    config = parse_config(
        "run: {name: a, store: s3://b/runs}\nmodel: {base: me/b}\ndata: {train: [{path: a}]}\ntrain: {steps: 1}"
    )
    assert checked(config, resume=False, take_over=False, dry_run=True, log=said.append) == (config, False)
    assert said == ["not checked from here: model.base: it cannot be reached"]
    with pytest.raises(BaseOutOfReach):
        checked(config, resume=False, take_over=False, dry_run=False, log=said.append)


def test_what_doctor_finds_missing_comes_first() -> None:
    checks = (Check("aaa", "ok", "1"), Check("bbb", "optional", "-"), Check("ccc", "missing", "-", "get it"))
    out = StringIO()
    Terminal(width=100, file=out).print(diagnosis_table(Diagnosis(checks)))
    text = out.getvalue()
    assert text.index("Missing: ccc.") < text.index("get it") < text.index("aaa")


def test_what_takes_seconds_is_said_while_it_does_and_what_is_quick_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said, heard = list[str](), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        heard.set()

    assert helper_thread._FIRST_SECONDS == 2.0
    with helper_thread.patiently("reading", say):
        pass
    monkeypatch.setattr(helper_thread, "_FIRST_SECONDS", 0.01)
    with helper_thread.patiently("measuring the data", say):
        assert heard.wait(30)
    assert said == ["measuring the data: 0 s so far"]


def test_an_export_says_at_once_what_is_much_and_then_now_and_then_how_far_it_is() -> None:
    said, now = list[str](), [0.0]
    line = lines("merging", said.append, lambda: now[0])
    for done in (0, 10, 20):
        line(done * 10**9, 140 * 10**9)
        now[0] += 6.0
    line(140 * 10**9, 140 * 10**9)
    assert said == ["merging: 0 bytes of 140.0 GB", "merging: 20.0 GB of 140.0 GB"]
    line(0, 5000)
    assert len(said) == 2
