"""The board: who it answers, what its pages may load, that texts of a run stay texts, and the commands of its buttons."""

import itertools
import json
import os
import queue
import re
import shlex
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from starlette.testclient import TestClient

from launcher.board.actions import BUTTONS, Job, command_of
from launcher.board.form import Form
from launcher.board.live import LiveRun, Look, changes, chosen_log, followed, streamed, text_of
from launcher.board.pages import Pages, _age
from launcher.board.server import application, serve
from launcher.board.talk import Talk
from launcher.cli.verbs.runs import board
from launcher.view.listing import Line, Listing, list_runs
from launcher.view.watch import find_in_log, find_lines, rank_logs
from tests.unit.launcher.test_report import make_sweep
from tests.unit.run.made_records import CONFIG, NOW, end, start, step, write
from trainer.config import parse_config
from trainer.errors import ConfigError, StorageError
from trainer.run import layout
from trainer.run.folder import keep_as_own
from trainer.store.store import Store, open_store

TOKEN = "a-token-of-these-tests"
ADDRESS = "http://127.0.0.1:8899"
HOSTILE = '<script>alert(1)</script><a href="javascript:alert(2)">x</a>\x1b[31mred\x1b[0m" onload="alert(3)'
PLACES = (
    "/",
    "/events",
    "/compare",
    "/runs/0/demo",
    "/runs/0/demo/events",
    "/runs/0/demo/logs",
    "/runs/0/demo/logs/events",
    "/runs/0/demo/samples",
    "/runs/0/demo/rows",
    "/runs/0/demo/samples/events",
    "/runs/0/demo/rows/events",
    "/runs/0/demo/talk",
    "/new",
    "/new/files",
    "/started/x/events",
    "/page.css",
    "/board.css",
    "/board.js",
    "/nothing/like/it",
)
POSTS = (
    "/runs/0/demo/do",
    "/runs/0/demo/talk",
    "/started/x/say",
    "/new/draft",
    "/new/plan",
    "/new/check",
    "/new/start",
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "runs"))


def new(store: Store, name: str = "demo") -> Store:
    store.put(f"{name}/config.yaml", CONFIG.replace("demo", name).encode())
    return store.sub(name)


def client_of(store: Store, *, read_only: bool = False, token: str | None = TOKEN) -> TestClient:
    headers = {"Authorization": f"token {token}"} if token else {}
    pages = Pages([store], read_only=read_only)
    return TestClient(application(pages, TOKEN, print), base_url=ADDRESS, headers=headers, follow_redirects=False)


@pytest.mark.parametrize("given", [None, "", "another", TOKEN + "x"])
def test_nothing_is_answered_without_the_token(store: Store, given: str | None) -> None:
    new(store)
    client = client_of(store, token=given)
    assert {client.get(place).status_code for place in PLACES} == {403}
    assert {client.post(place, json={}).status_code for place in POSTS} == {403}
    assert {client.get("/", params={"token": given or ""}).status_code} == {403}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://example.org"},
        {"Origin": "http://127.0.0.1:1234"},
        {"Origin": "https://127.0.0.1:8899"},
        {"Origin": "null"},
        {"Host": "attacker.example:8899"},
        {"Host": "127.0.0.1.attacker.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ],
)
def test_other_sites_are_refused_on_every_path_even_with_the_token(store: Store, headers: dict[str, str]) -> None:
    new(store)
    client = client_of(store)
    assert {client.post(place, json={}, headers=headers).status_code for place in POSTS} == {403}
    assert {client.get(place, headers=headers).status_code for place in PLACES} == {403}
    assert "set-cookie" not in client_of(store, token=None).get("/", params={"token": TOKEN}, headers=headers).headers


def test_a_link_on_another_site_opens_a_page_for_who_has_the_cookie(store: Store) -> None:
    followed_link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client_of(store).get("/", headers=followed_link).status_code == 200
    assert client_of(store, token=None).get("/", headers=followed_link).status_code == 403


def test_programs_give_the_token_in_a_header(store: Store) -> None:
    client = client_of(store, token=None)
    given = {f"{scheme} {TOKEN}": scheme != "Basic" for scheme in ("token", "Bearer", "bearer", "Basic")} | {
        TOKEN: False
    }
    for header, allowed in given.items():
        found = client.get("/board.js", headers={"Authorization": header})
        assert found.status_code == (200 if allowed else 403), header
        assert "set-cookie" not in found.headers


def test_the_address_with_the_token_gives_a_cookie_that_scripts_and_other_sites_do_not_get(store: Store) -> None:
    client = client_of(store, token=None)
    found = client.get("/", params={"token": TOKEN})
    assert found.status_code == 200
    assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in found.headers["set-cookie"].split(";")}
    assert client.get("/").status_code == 200
    assert "set-cookie" not in client.get("/").headers


def test_every_answer_forbids_inline_scripts_and_other_servers(store: Store) -> None:
    new(store)
    for place in ("/", "/runs/0/demo", "/new", "/board.js", "/nothing"):
        headers = client_of(store).get(place).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_pages_have_no_script_style_or_handler_of_their_own(store: Store) -> None:
    run = new(store)
    write(run, 1, start(1), *(step(number, 3.0 - number) for number in range(1, 3)), end("finished"))
    for place in ("/", "/runs/0/demo", "/new", "/runs/0/demo/logs", "/runs/0/demo/rows", "/runs/0/demo/samples"):
        page = client_of(store).get(place).text
        assert page.count("<script") == page.count('<script src="/board.js" defer></script>') == 1, place
        for never in ("style=", " onclick", " onload", "<style", "http://", "https://"):
            assert never not in page.replace("https://json-schema.org", "").replace("http://127.0.0.1:8000", ""), place


def hostile_run(store: Store) -> Store:
    run = new(store)
    long = HOSTILE * 100 + "\ud800"
    facts = {"device": long, "dashboard": "javascript:alert(4)", "machines": [HOSTILE]}
    write(run, 1, {**start(1), **facts}, step(1, 3.0), {**step(2, 2.0), HOSTILE: 1.0}, end("failed", long))
    write(run, 2, {**start(2, step=1), **facts}, {"kind": "change", "setting": HOSTILE, "old": 1, "new": HOSTILE})
    run.put(layout.samples(1), json.dumps({"prompt": HOSTILE, "base": long, "adapter": HOSTILE}).encode())
    sets = {HOSTILE: {"tokens": 1, "base": {"loss": 1.0}, "adapter": {"loss": 1.0}, "server": HOSTILE}}
    run.put(layout.evaluation(1), json.dumps({"step": 1, "sets": sets}).encode())
    run.put(layout.rank_log(1, 0), HOSTILE.encode() * 50 + b"\xff\xfe\x00")
    run.put(layout.manifest(3), b'{"step": "' + HOSTILE.encode() + b'"}')
    store.put("<script>alert(5)<-script>/config.yaml", b"{}")
    store.put("broken/config.yaml", b"\xff" + HOSTILE.encode())
    store.put("broken/metrics/000001.jsonl", HOSTILE.encode())
    return run


PAGES = ("/", "/runs/0/demo", "/runs/0/broken", "/compare?run=0/demo&run=0/broken")
BELOW = ("samples", "logs", "rows", "rows/events", "talk")


def active(page: str) -> list[str]:
    """Return what in the page would run, as a browser reads it, except the board's own script."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            handlers = [name for name in given if name.startswith("on")]
            links = [given.get(name) or "" for name in ("href", "src", "action", "formaction", "data")]
            foreign = [link for link in links if not re.match(r"(/(?!/)|\?|#|data:,|$)", link)]
            inline = (
                [tag] if (tag == "script" and given.get("src") != "/board.js") or tag in ("iframe", "object") else []
            )
            found.extend([*handlers, *foreign, *inline])

    Reader().feed(page)
    return found


def test_whatever_a_run_holds_is_text(store: Store) -> None:
    hostile_run(store)
    client = client_of(store)
    for place in (*PAGES, *(f"/runs/0/demo/{part}" for part in BELOW), "/runs/0/demo/logs?words=red"):
        found = client.get(place)
        assert found.status_code == 200, (place, found.text[-300:])
        assert active(found.text) == [], place
        assert "\x1b" not in found.text, place
        assert len(found.content) < 300_000, place


def test_parts_that_are_sent_later_are_escaped_like_the_page(store: Store) -> None:
    run = hostile_run(store)
    parts = Pages([store], read_only=False)._parts(run)
    assert "&lt;script&gt;" in "".join(parts.values())
    assert active("".join(parts.values())) == []


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%2Fb", "%3Cscript%3E", "no-such", "x" * 10_000])
def test_names_that_are_no_runs_lead_nowhere(store: Store, name: str) -> None:
    outside = Path(store.uri.removeprefix("file://")).parent / "config.yaml"
    outside.parent.mkdir(exist_ok=True)
    outside.write_text("")
    for place in (0, 1, 99, "9" * 5000, "-0", "\u0663"):
        found = client_of(store).get(f"/runs/{place}/{name}")
        assert found.status_code == 404
        assert "<script>" not in found.text


def test_a_log_shows_colours_of_terminals_as_nothing_and_other_control_characters_as_words() -> None:
    assert text_of("\x1b[1;31mred\x1b[0m \x07 a\rb\ufffd") == "red \\x07 a\nb\ufffd"


@pytest.mark.parametrize("piece", [2**20, 100, 7])
def test_a_search_finds_lines_with_all_words_also_where_pieces_meet(
    store: Store, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    run = new(store)
    every = [f"line {number} of the log" for number in range(300)]
    run.put(layout.rank_log(1, 0), "\n".join([*every, "end 5"]).encode())
    ((log, segments),) = rank_logs(run).items()
    assert log == (1, 0)
    monkeypatch.setattr("launcher.view.watch._PIECE", piece)
    assert find_lines(run, segments, "LOG 298") == (["line 298 of the log"], True)
    assert find_lines(run, segments, "line")[0] == every[-200:]
    assert find_in_log(run, 0, None, "end") == ["end 5"]


def test_of_a_long_log_its_end_is_searched_and_that_is_told_and_long_lines_are_cut(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(store)
    run.put(layout.rank_log(1, 0), b"a first line\n" + b"b" * 2500 + b" line\nthe last line\n")
    (segments,) = rank_logs(run).values()
    assert find_lines(run, segments, "line") == (["a first line", "b" * 2000, "the last line"], True)
    monkeypatch.setattr("launcher.view.watch._SEARCHED", 2600)
    assert find_lines(run, segments, "first line") == (["a first line"], True), "it is no longer than that"
    monkeypatch.setattr("launcher.view.watch._SEARCHED", 19)
    assert find_lines(run, segments, "line") == (["line", "the last line"], False)
    assert find_lines(run, segments, "first line") == ([], False)


def test_the_runs_of_all_stores_are_there_the_newest_first_and_words_filter_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [open_store(str(tmp_path / name)) for name in ("one", "two")]
    for number, (store, name) in enumerate([(stores[0], "old"), (stores[1], "middle"), (stores[0], "new")]):
        records = [start(1), step(1, 2.0), end("failed", f"Reason {number}")]
        write(new(store, name), 1, *({**record, "time": NOW - 10**8 + 1000 * number} for record in records))
    stores[0].put("data/abc/manifest.json", b"{}")
    client = TestClient(application(Pages(stores, read_only=True), TOKEN, print), base_url=ADDRESS)
    page = client.get("/", params={"token": TOKEN}).text
    assert page.index("/runs/0/new") < page.index("/runs/1/middle") < page.index("/runs/0/old")
    assert "3 runs" in page
    page = client.get("/", params={"words": "FAILED reason 2"}).text
    assert ("/runs/0/new" in page, "/runs/1/middle" in page) == (True, False)
    monkeypatch.setattr("launcher.board.pages._SHOWN", 1)
    page = client.get("/", params={"first": 1}).text
    assert re.findall('href="(/runs/[^"]*)"', page) == ["/runs/1/middle"], "the second page of one run each"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\x7f", "\udcff"])
def test_a_folder_whose_name_no_run_has_hides_no_other(store: Store, name: str) -> None:
    write(new(store), 1, start(1), step(1, 3.0))
    (Path(store.uri.removeprefix("file://")) / name).mkdir()
    store.put("of-no-run.txt", b"")
    assert [run.run for run in list_runs(store).runs] == ["demo"]
    assert [entry.key for entry in store.children()[1]] == ["of-no-run.txt"]
    page = client_of(store).get("/").text
    assert 'href="/runs/0/demo"' in page
    assert ">1 run<" in page


def test_a_store_that_fails_hides_no_run_of_the_others_and_is_named(store: Store, tmp_path: Path) -> None:
    write(new(store), 1, start(1), step(1, 3.0), end("finished"))
    other = open_store(str(tmp_path / "other"))
    new(other, "second")
    pages = Pages([store, other], read_only=True)
    client = TestClient(application(pages, TOKEN, print), base_url=ADDRESS, headers={"Authorization": f"token {TOKEN}"})
    assert ">2 runs<" in client.get("/").text

    def fail(prefix: str = "") -> Any:
        raise StorageError("cannot <list> it.")

    other.children = fail
    page = client.get("/").text
    assert "2 runs; file:///" in page
    assert "other: cannot &lt;list&gt; it." in page
    assert 'href="/runs/0/demo"' in page

    def gone(name: str) -> Store:
        raise StorageError(f"cannot list {name}.")

    other.sub = gone
    assert client.get("/runs/1/second").status_code == 503, "which is no missing page"
    other.children = lambda prefix="": ([], [])
    assert ">1 run<" in client.get("/").text


def test_a_run_that_is_removed_while_it_is_shown_is_said_to_be_gone(store: Store) -> None:
    run = new(store)
    write(run, 1, start(1), step(1, 3.0), end("finished"))
    pages = Pages([store], read_only=True)
    pages._parts(run)
    store.delete_folder("demo/")
    pages._live_run(run, "").draw_soon()
    ((kind, value),) = streamed_events(changes(lambda: pages._parts(run)), 1)
    assert (kind, value) == ("parts", {"trouble": f"{run.uri} is no run any more."})


def test_a_run_that_has_the_name_of_one_that_was_removed_has_its_own_figures_and_curve(store: Store) -> None:
    """Somebody removes a run's folder and trains again under its name, while nobody looks."""
    run, pages = new(store), Pages([store], read_only=True)

    def shown() -> tuple[float, list[tuple[int, float]]]:
        pages.listing.forget(run)
        pages._live_run(run, "").draw_soon()
        (line,) = pages.listing.with_curves(pages.listing.read(60)[0], 60)
        assert line.line is not None
        (loss,) = re.findall(r'data-of="progress/loss_last">([^<]*)<', pages._parts(run)["summary"])
        return float(loss), line.line.curve

    write(run, 1, start(1), step(1, 3.0), step(2, 9.0), end("finished"))
    assert shown() == (9.0, [(1, 3.0), (2, 9.0)])
    store.delete_folder("demo/")
    write(new(store), 1, {**start(1), "time": NOW + 60}, step(1, 8.0), step(2, 7.0), end("finished"))
    assert shown() == (7.0, [(1, 8.0), (2, 7.0)])


def test_a_thousand_runs_are_listed_within_the_patience_and_then_from_what_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.view.listing._ENDED_SECONDS", 1e9)  # however long the first look takes
    records = [start(1), *(step(number, 2.0) for number in range(1, 30)), end("finished")]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    for number in range(1000):
        metrics = Path(store.uri.removeprefix("file://")) / f"run-{number}" / "metrics"
        metrics.mkdir(parents=True)
        (metrics.parent / "config.yaml").write_text(CONFIG)
        (metrics / "000001.jsonl").write_bytes(lines)
    listing = Listing([store])
    found, _ = listing.read(0.1)
    assert len(found) == 1000, "a run that is not read yet has its name"
    found, unread = listing.read(600)
    assert (len(found), unread) == (1000, 0)
    assert {line.line.state for line in found if line.line} == {"finished"}
    store.delete("run-7/metrics/000001.jsonl")
    again, _ = listing.read(600)
    assert [line.line for line in again] == [line.line for line in found], "a run that has ended is not read again"


def test_the_parts_of_a_page_grow_with_the_records_and_are_not_drawn_more_often_than_due(store: Store) -> None:
    run = new(store)
    write(run, 1, start(1), step(1, 3.0))
    pages = Pages([store], read_only=False)
    live = LiveRun(run, ("summary", "course", "repeat"), pages._block)
    before = live.parts()
    assert 'data-of="progress/step">1<' in before["summary"]
    write(run, 1, start(1), step(1, 3.0), step(2, 2.5), step(3, 2.0))
    assert live.parts() is before
    live.draw_soon()
    after = live.parts()
    assert 'data-of="progress/step">3<' in after["summary"]
    assert before["course"] != after["course"]
    assert before["repeat"] == after["repeat"]


def test_a_page_that_grows_has_the_first_curves_of_a_run_with_very_many(store: Store) -> None:
    run = new(store)
    parts = {f"part_{number:02}": number + 1.0 for number in range(60)}
    write(run, 1, start(1), {**step(1, 3.0), **parts}, {**step(2, 2.0), **parts})
    shown = "".join(LiveRun(run, ("course", "measures"), Pages([store], read_only=False)._block).parts().values())
    names = re.findall(r'aria-label="Part (\d\d)"', shown)
    assert names == [f"{number:02}" for number in range(len(names))]
    assert 20 < len(names) < 40
    assert 'aria-label="Loss' in shown


def test_drawing_takes_a_twentieth_of_a_core_however_long_it_takes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, so_far = new(store), [start(1), {**step(1, 3.0), "time": time.time()}]
    write(run, 1, *so_far)
    clock = itertools.count(0.0, 2.0)  # two seconds from each look at it to the next
    monkeypatch.setattr("launcher.board.live.time.thread_time", lambda: next(clock))
    live = LiveRun(run, ("repeat",), Pages([store], read_only=False)._block)
    live.parts()
    assert live.interval == 40.0
    clock = itertools.count(0.0, 0.0)
    intervals = list[float]()
    for records in ((), (end("finished"),)):
        write(run, 1, *so_far, *records)
        live.draw_soon()
        live.parts()
        intervals.append(live.interval)
    assert intervals[0] < intervals[1] == 10.0, "one that has ended is seldom looked at"


def test_the_runs_that_were_looked_at_last_are_kept(store: Store) -> None:
    pages = Pages([store], read_only=False)
    kept = {number: pages._live_run(store.sub(f"run-{number}"), "") for number in range(12)}
    again = {number: pages._live_run(store.sub(f"run-{number}"), "") for number in reversed(range(12))}
    assert [number for number in kept if again[number] is kept[number]] == list(range(4, 12))


def test_a_run_of_the_form_has_its_page_in_the_store_of_its_place(store: Store, tmp_path: Path) -> None:
    other = open_store(str(tmp_path / "other"))
    config = parse_config(CONFIG, [f"run.store={store.uri}"])
    assert Form(Pages([other, store], read_only=False))._url(config) == "/runs/1/demo"
    assert Form(Pages([other], read_only=False))._url(config) == ""


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ("", []),
        ("?row=3", ["--row", "3"]),
        ("?row=x&packed=1", ["--packed"]),
        ("?split=eval&row=2&packed=1", ["--split", "eval", "--row", "2", "--packed"]),
    ],
)
def test_rows_are_asked_for_as_the_page_says(
    store: Store, monkeypatch: pytest.MonkeyPatch, query: str, options: list[str]
) -> None:
    asked = list[list[str]]()

    def rows(config: str, given: list[str]) -> None:
        asked.append(given)
        raise ConfigError("no base.")

    new(store)
    monkeypatch.setattr("launcher.board.pages._rows_of", rows)
    assert "no base." in client_of(store).get(f"/runs/0/demo/rows/events{query}").text
    assert asked == [options]


def test_a_conversation_shows_each_turn_once_and_what_is_added_to_the_last_one() -> None:
    talk = Talk.__new__(Talk)
    talk.turns, talk.whole, talk.last, talk.over, talk.state = [], 0, {}, False, "Your turn."
    drawn = list[list[tuple[str, str]]]()
    look = talk.look(lambda turns: drawn.append(list(turns)) or f"{len(turns)} turns")
    assert list(look()) == [("parts", {"said": "0 turns"}), ("parts", {"how": "Your turn."})]
    talk.turns.append(("you", "hi"))
    talk.piece("base", "he")
    assert list(look()) == [("parts", {"said": "2 turns"})]
    talk.piece("base", "llo <b>")
    assert list(look()) == [("text", {"newest": "llo <b>"})]
    assert list(look()) == []
    talk.piece("adapter", "yo")
    assert list(look()) == [("parts", {"said": "3 turns"})]
    talk.answers([{"prompt": "hi", "base": "hello", "adapter": ""}])
    talk.over = True
    assert list(look()) == [("parts", {"said": "3 turns"}), ("end", None)]
    assert drawn[-1] == [("you", "hi"), ("the base", "hello"), ("the checkpoint", "")]


def test_a_long_log_is_shown_from_near_its_end(store: Store) -> None:
    run = new(store)
    run.put(layout.rank_log(1, 0), b"".join(b"line %06d\n" % number for number in range(10_000)))
    look = followed(run, {})
    shown = dict(look())["text"]["log"]
    assert shown.endswith("line 009999\n")
    assert len(shown) == 2**16
    run.put(layout.rank_log(1, 0), b"".join(b"line %06d\n" % number for number in range(200_000)))
    shown = dict(look())["text"]["log"]  # it has grown by more than a page takes
    assert shown.startswith("[...]\n")
    assert shown.endswith("line 199999\n")
    assert len(shown) == len("[...]\n") + 2**16


def streamed_events(look: Look, count: int) -> list[tuple[str, Any]]:
    async def first_events() -> list[str]:
        stream: Any = streamed(look, lambda: 0.01).body_iterator
        return [await anext(stream) for _ in range(count)]

    events = (event.partition("\ndata: ") for event in anyio.run(first_events))
    return [(kind.removeprefix("event: "), json.loads(data)) for kind, _, data in events if data]


def test_a_stream_without_news_says_that_it_is_still_there() -> None:
    async def first() -> str | None:
        stream: Any = streamed(list, lambda: 0.01).body_iterator
        with anyio.move_on_after(2):
            return await anext(stream)
        return None

    assert anyio.run(first) == ": still here\n\n", "or what is between it and the browser would close it"


def test_a_stream_sends_only_the_parts_that_change() -> None:
    drawn = iter([{"a": "1", "b": "1"}, {"a": "1", "b": "2"}])
    assert streamed_events(changes(lambda: next(drawn)), 2) == [("parts", {"a": "1", "b": "1"}), ("parts", {"b": "2"})]


def test_a_page_says_that_its_store_does_not_answer_and_goes_on_when_it_does() -> None:
    outcomes = iter([OSError(), StorageError("<b> is gone."), {"a": "1"}])

    def draw() -> dict[str, str]:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    events = streamed_events(changes(draw), 4)
    assert events == [
        ("parts", {"trouble": "OSError: the store does not answer as it should."}),
        ("parts", {"trouble": "&lt;b&gt; is gone."}),
        ("parts", {"a": "1"}),
        ("parts", {"trouble": ""}),
    ]


def test_the_board_and_all_its_pages_leave_torch_alone(store: Store, tmp_path: Path) -> None:
    run = new(store)
    write(run, 1, start(1), step(1, 3.0), end("finished"))
    code = (
        "import sys\n"
        "from starlette.testclient import TestClient\n"
        "from launcher.board.pages import Pages\n"
        "from launcher.board.server import application\n"
        "from trainer.store.store import open_store\n"
        f"pages = Pages([open_store({str(tmp_path / 'runs')!r})], read_only=False)\n"
        f"client = TestClient(application(pages, 'T', print), base_url={ADDRESS!r}, headers={{'Authorization': 'token T'}})\n"
        "for place in ('', 'runs/0/demo', 'runs/0/demo/logs', 'runs/0/demo/talk', 'new', 'compare?run=0/demo&run=0/demo'):\n"
        "    assert client.get('/' + place).status_code == 200, place\n"
        "client.post('/new/plan', json={'config': 'run: {name: x}\\nmodel: {base: /none}\\n'})\n"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'ray', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_read_only_board_has_no_buttons_and_starts_nothing(store: Store) -> None:
    run = new(store)
    write(run, 1, start(1), step(1, 3.0))
    client = client_of(store, read_only=True)
    page = client.get("/runs/0/demo").text
    assert "data-opens" not in page
    assert "<dialog" not in page
    for place in ("/runs/0/demo/do", "/runs/0/demo/talk", "/started/x/say", "/new/start", "/new/check"):
        assert client.post(place, json={"action": "stop"}).status_code in (404, 405)
    assert not run.exists(layout.STOP)


def test_a_button_shows_its_command_and_runs_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten = list[str]()
    monkeypatch.setattr(Listing, "forget", lambda listing, folder: forgotten.append(folder.uri))
    run = new(store)
    write(run, 1, start(1), step(1, 3.0))
    client, place = client_of(store), run.uri.rpartition("/")[0].removeprefix("file://")
    shown = client.post("/runs/0/demo/do", json={"action": "stop", "look": True}).json()
    assert shown == {"parts": {"command-stop": f"capstan stop demo --store {place}"}}
    assert not run.exists(layout.STOP)
    assert forgotten == []
    done = client.post("/runs/0/demo/do", json={"action": "stop"}).json()
    assert forgotten == [run.uri], "the list reads it again"
    said = client.get(done["listen"]).text
    assert run.exists(layout.STOP), said
    assert 'event: parts\ndata: {"how": "done"}\n\nevent: end' in said
    assert client.get("/started/another/events").status_code == 404


@pytest.mark.parametrize("place", ["/new/check", "/new/start"])
def test_a_wrong_configuration_of_the_form_is_refused_before_anything_starts(
    store: Store, tmp_path: Path, place: str
) -> None:
    given = {"config": CONFIG + "no_such_section: {}\n", "path": str(tmp_path / "run.yaml")}
    answer = client_of(store).post(place, json=given)
    assert answer.status_code == 400
    assert "no_such_section" in answer.json()["error"]
    assert not (tmp_path / "run.yaml").exists()


def test_what_a_command_prints_is_text_and_its_exit_code_is_told(store: Store) -> None:
    new(store)
    client = client_of(store)
    done = client.post("/runs/0/demo/do", json={"action": "prune", "keep_last": "<b>x</b>"}).json()
    said = client.get(done["listen"]).text
    assert "&lt;b&gt;x&lt;/b&gt;" in said
    assert "ended with exit code 2" in said
    parts = [json.loads(line[6:]) for line in said.splitlines() if line.startswith('data: {"job"')]
    assert "<b>" not in parts[0]["job"]


@pytest.mark.parametrize(
    ("action", "fields", "words"),
    [
        ("stop", {}, "stop demo --store AT"),
        (
            "resume",
            {"settings": "cluster.workers=1 'run.name=a b'"},
            "resume demo cluster.workers=1 'run.name=a b' --store AT",
        ),
        ("evaluate", {"step": " 12 "}, "evaluate demo --store AT --step 12"),
        ("evaluate", {"step": " "}, "evaluate demo --store AT"),
        (
            "export",
            {"destination": "/tmp/a b", "format": "merged"},
            "export demo '/tmp/a b' --store AT --format merged",
        ),
        ("prune", {"keep_last": "1"}, "checkpoints prune demo --store AT --keep-last 1"),
    ],
)
def test_the_fields_of_a_button_become_words_of_its_command(
    store: Store, action: str, fields: dict[str, str], words: str
) -> None:
    expected = ["capstan", *shlex.split(words.replace("AT", store.uri.removeprefix("file://")))]
    assert command_of(action, new(store), fields) == expected
    assert command_of(action, store.sub("demo"), fields, dry_run=True) == [*expected, "--dry-run"]


@pytest.mark.parametrize(
    ("action", "fields"),
    [
        ("train", {}),
        ("export", {}),
        ("export", {"destination": " "}),
        ("export", {"destination": "--merge"}),
        ("evaluate", {"step": "--server=http://example.org"}),
        ("resume", {"settings": "--trust-run"}),
        ("resume", {"settings": "a=1 --take-over"}),
        ("resume", {"settings": "a=1 --store=elsewhere"}),
        ("resume", {"settings": "unclosed='"}),
        ("export", {"destination": "a\0b"}),
        ("export", {"destination": "x" * 5000}),
    ],
)
def test_a_field_adds_no_option_of_its_own(store: Store, action: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        command_of(action, new(store), fields)


def test_a_folder_whose_name_would_be_an_option_has_no_buttons(store: Store) -> None:
    for name in ("--trust-run", "-h"):
        with pytest.raises(ConfigError, match="begins with a hyphen"):
            command_of("resume", store.sub(name), {})


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nonsense", b"{" * 100_000, b"x" * 2**21, b'{"a": "%s"}' % (b"x" * 2**21)]
)
def test_a_request_that_no_page_sends_is_refused_in_a_sentence(store: Store, body: bytes) -> None:
    new(store)
    for place in POSTS:
        found = client_of(store).post(place, content=body)
        assert found.status_code == 400
        assert found.json()["error"].endswith(".")


def test_half_of_a_character_is_in_no_command(store: Store) -> None:
    new(store)
    client = client_of(store)
    for action, button in BUTTONS.items():
        for half in (r"\ud800", "\ud800"):  # escaped as the page's script has it, or in the bytes themselves
            fields = "".join(f', "{name}": "{half}"' for name in [*button.fields, "other"])
            body = f'{{"action": "{action}", "look": true{fields}}}'.encode(errors="surrogatepass")
            found = client.post("/runs/0/demo/do", content=body)
            assert (found.status_code, found.json()["error"][:31]) == (400, "a field holds half of a charact")


def test_a_configuration_that_is_wrong_is_told_in_the_words_of_the_schema(store: Store) -> None:
    text = "run: {name: x}\nmodel: {base: /none}\ntrain: {stepz: 5}\n"
    found = client_of(store).post("/new/plan", json={"config": text}).json()
    assert "train.stepz" in found["parts"]["verdict"]
    assert "Did you mean" in found["parts"]["verdict"]


def test_the_form_says_what_does_not_fit_and_what_each_setting_means(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = SimpleNamespace(shortfalls=["memory: <b>it</b> is too large."]), list[tuple[str, str | None]]()
    machine = SimpleNamespace(gpu=None, whose="")
    monkeypatch.setattr(
        "launcher.board.form.needs_of",
        lambda config, gpu, ranks: asked.append(("needs", gpu)) or SimpleNamespace(plan=plan, machine=machine),
    )
    monkeypatch.setattr(
        "launcher.board.form.plan_run",
        lambda config, gpu, ranks: asked.append(("plan", gpu)) or SimpleNamespace(plan=plan),
    )
    monkeypatch.setattr("launcher.board.form.fits_line", lambda *_: "of memory")
    monkeypatch.setattr("launcher.board.form.plan_lines", lambda *_: [("time", "of hours")])
    client, text = client_of(store), f"{CONFIG}quant: {{double: false}}\n"
    for look, line in (("quick", "of memory"), ("whole", "of hours")):
        given = {"config": text, "look": look, "gpu": " H100 "}
        verdict = client.post("/new/plan", json=given).json()["parts"]["verdict"]
        assert "&lt;b&gt;it&lt;/b&gt; is too large." in verdict
        assert line in verdict
        assert "quant.double" in verdict, "a setting that is off has a sentence, too"
    assert asked == [("needs", "H100"), ("plan", "H100")]


def test_the_form_offers_bases_in_their_order(store: Store) -> None:
    bases = re.findall(r'<option value="([^"]*/[^"]*)"', client_of(store).get("/new").text)
    assert len(bases) > 5
    assert bases == sorted(bases)


def test_files_of_data_are_offered_as_they_are_typed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("train.jsonl", "train.py", "trial.csv", "tripled.CSV", ".hidden.jsonl"):
        (tmp_path / name).write_text("")
    found = client_of(store).get("/new/files", params={"at": f"{tmp_path}/tr"}).json()
    assert found == [f"{tmp_path}/{name}" for name in ("train.jsonl", "trial.csv", "tripled.CSV")]
    found = client_of(store).get("/new/files", params={"at": f"{tmp_path}/"}).json()
    assert f"{tmp_path}/deep/" in found
    assert f"{tmp_path}/.hidden.jsonl" not in found
    assert client_of(store).get("/new/files", params={"at": "/no/such\0/x"}).json() == []
    (tmp_path / os.fsdecode(b"deep/\xff.jsonl")).write_text("")
    assert client_of(store).get("/new/files", params={"at": f"{tmp_path}/deep/"}).json() == []


def test_a_run_with_more_records_than_a_page_can_draw_is_a_page_that_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new(store)
    write(run, 1, start(1), step(1, 3.0))
    monkeypatch.setattr("launcher.board.live._MOST_RECORDS", 100)
    found = client_of(store).get("/runs/0/demo")
    assert found.status_code == 200
    assert "too many for a page that grows" in found.text


def test_a_sweep_is_a_page_whose_trials_lead_to_theirs(store: Store) -> None:
    make_sweep(store)
    page = client_of(store).get("/runs/0/search").text
    assert 'href="/runs/0/search-1"' in page
    assert "Trials over their settings" in page
    assert 'data-events="/runs/0/search/events"' in page


def test_a_long_run_with_many_measures_is_a_small_page_with_every_spike(store: Store) -> None:
    run = new(store)
    noisy = [
        {**step(number, 2 + number % 7 / 10), **{f"measure_{of}": number % (of + 3) for of in range(35)}}
        for number in range(1, 3001)
    ]
    noisy[1234]["measure_7"] = 99.0
    write(run, 1, start(1), *noisy, end("finished"))
    page = client_of(store).get("/runs/0/demo").text
    assert len(page) < 300_000
    assert page.count('aria-label="Measure') == 35
    plot = page[page.index('aria-label="Measure 7"') :]
    assert "100" in plot[: plot.index("</svg>")] or "80" in plot[: plot.index("</svg>")], "the axis reaches the spike"


def test_what_is_missing_or_taken_is_a_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="--port: port"):
            serve([store], port=taken.getsockname()[1], read_only=True, log=print)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"capstan-llm\[board\]"):
        board([store.uri])


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0, "0 s"), (9.9, "0 s"), (19.0, "10 s"), (69.0, "1 min 0 s"), (7391.0, "2 h 3 min")]
)
def test_the_age_of_a_run_is_another_one_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, seconds: float, words: str
) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0 + seconds)
    assert _age(Line(0, "demo", heard=1000.0)) == words


class Answers:
    """What `generate_answers` does: it asks for what is said, tells pieces and the answer, and perhaps fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> None:
        self.asked, self.said = list[Any](), list[Any]()
        self._fails = fails
        monkeypatch.setattr("launcher.board.talk.generate_answers", self)

    def __call__(self, ask: Any, folder: Store, config: Any, prompts: Any, log: Any, screen: Any) -> None:
        self.asked.append(ask)
        log("The base is being read.")
        screen.chats = True
        if self._fails:
            raise self._fails
        for turn in prompts:
            self.said += turn
            screen.piece("adapter", "part of an")
            screen.answers([{"prompt": "", "adapter": "an answer"}])


def waited(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_conversation_goes_on_until_it_is_ended_and_an_empty_line_begins_a_new_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, given = Answers(monkeypatch), {"step": " 12 ", "temperature": "0.5", "base": True}
    run = new(store)
    keep_as_own(run.get(layout.CONFIG))
    client, pages = client_of(store), Pages([store], read_only=False)
    talk = Talk(run, given)
    for count, text in enumerate(("hi", "and?"), 1):
        talk.say(text)
        waited(lambda count=count: talk.whole == count)
    assert talk.turns == [
        ("you", "hi"),
        ("the checkpoint", "an answer"),
        ("you", "and?"),
        ("the checkpoint", "an answer"),
    ]
    assert [message["content"] for message in answers.said[-1]["messages"]] == ["hi", "an answer", "and?"]
    talk.say("")
    talk.say("anew")
    waited(lambda: talk.whole == 3)
    assert talk.turns == [("you", "anew"), ("the checkpoint", "an answer")]
    assert [len(prompt["messages"]) for prompt in answers.said] == [1, 3, 1]
    talk.say("x" * 2**17)
    waited(lambda: talk.whole == 4)
    assert len(talk.turns[2][1]) == 2**16, "a page cannot fill the memory"
    (ask,) = answers.asked
    assert (ask.step, ask.base, ask.server, ask.sampling["temperature"], ask.sampling["max_tokens"]) == (
        12,
        True,
        "",
        0.5,
        512,
    )
    pages.keep(talk)
    pages.close()
    waited(lambda: talk.over)
    assert talk.state == "The conversation has ended. Begin a new one."
    assert (
        client.post("/started/unknown/say", json={"text": "x"}).json()["error"].startswith("the conversation has ended")
    )


def test_two_conversations_go_on_at_most_and_each_says_why_it_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers(monkeypatch)
    run = new(store)
    client = client_of(store)
    for given, said in (
        ({"step": "-1"}, "is no step of a checkpoint"),
        ({"step": "last"}, "is no step of a checkpoint"),
        ({"temperature": "11"}, "Allowed are 0 to 10"),
        ({"temperature": "-1"}, "Allowed are 0 to 10"),
    ):
        assert said in client.post("/runs/0/demo/talk", json=given).json()["error"]
    told = client.post("/runs/0/demo/talk", json={})
    assert told.status_code == 200
    names = [told.json()["go"].removeprefix("?with=") for _ in range(1)]
    names.append(client.post("/runs/0/demo/talk", json={"server": "http://gpu:1", "base": True}).json()["go"][6:])
    assert "2 conversations go on already" in client.post("/runs/0/demo/talk", json={}).json()["error"]
    monkeypatch.setattr("launcher.board.talk._ALONE_SECONDS", 0.0)
    waited(lambda: client.post(f"/started/{names[0]}/say", json={"text": "x"}).status_code == 400)
    run.put(layout.CONFIG, CONFIG.encode() + b"eval: {prompts: /etc/passwd}\n")
    assert "eval.prompts" in client.post("/runs/0/demo/talk", json={}).json()["error"], "somebody else's run"
    run.put(layout.CONFIG, CONFIG.encode())
    for fails, said in ((ConfigError("no such step."), "no such step."), (ValueError("odd"), "ValueError: odd")):
        answers = Answers(monkeypatch, fails)
        talk = Talk(run, {"server": "http://gpu:1", "base": True})
        waited(lambda talk=talk: talk.over)
        assert talk.state == said
        assert [(ask.server, ask.base) for ask in answers.asked] == [("http://gpu:1", False)], "a server has one model"


def test_the_time_that_an_answer_takes_is_no_silence_and_a_page_that_is_closed_ends_the_conversation(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = new(store), [0.0]
    monkeypatch.setattr("launcher.board.talk.threading", SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=int)))
    monkeypatch.setattr("launcher.board.talk.time", SimpleNamespace(monotonic=lambda: clock[0]))
    talk = Talk(run, {})
    look, lines = talk.look(lambda turns: ""), talk._lines()
    for text in ("hi", "and?", "still there?", "nobody"):
        talk.say(text)
    assert next(lines) == "hi"
    clock[0] += 1000
    list(look())
    assert next(lines) == "and?"
    clock[0] += 29
    assert next(lines) == "still there?"
    clock[0] += 1
    assert next(lines, None) is None, "nobody has looked for half a minute"

    def silence(timeout: float) -> None:
        clock[0] += 300
        list(look())
        raise queue.Empty

    list(look())
    monkeypatch.setattr(talk._said, "get", silence)
    began = clock[0]
    assert next(talk._lines(), None) is None
    assert clock[0] - began == 900, "a page that stays open says nothing for a quarter of an hour"


def test_the_rows_of_somebody_elses_run_are_not_read(store: Store) -> None:
    run = new(store)
    run.put(layout.CONFIG, CONFIG.replace("path: train.jsonl", "path: /etc/passwd").encode())
    assert "so it counts as somebody" in client_of(store).get("/runs/0/demo/rows/events").text


def test_the_form_writes_a_new_file_alone_and_trains_or_names_the_command_that_submits(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[tuple[Any, dict[str, Any]]]()

    def job(words: Any, **options: Any) -> Any:
        started.append((words, options))
        return Talk.__new__(Talk)

    monkeypatch.setattr("launcher.board.form.Job", job)
    client, path = client_of(store), tmp_path / "run.yaml"
    config = CONFIG.replace("name: demo", f"name: demo, store: {store.uri.removeprefix('file://')}")

    def post(**given: Any) -> dict[str, Any]:
        return client.post("/new/start", json={"config": config, "path": str(path), **given}).json()

    for wrong in (str(tmp_path / "run.txt"), "-x.yaml", "a\0.yaml"):
        assert "is no name of a configuration" in post(path=wrong)["error"]
    assert post(path=f"{'x' * 300}.yaml")["error"].endswith("cannot be written: File name too long.")
    assert post(machine="slurm") == {"parts": {"missing": f"{path} is written. Now: capstan submit slurm {path}"}}
    assert (path.read_text(), started) == (config, [])
    other = tmp_path / "other.yml"
    assert post(machine="ray", path=str(other)) == {
        "parts": {"missing": f"{other} is written. Now: capstan submit ray {other}"}
    }
    assert started == []
    path.write_text("kept")
    assert "exists already" in post()["error"]
    assert path.read_text() == "kept"
    path.unlink()
    assert post()["listen"].startswith("/started/")
    assert started.pop() == (["capstan", "train", str(path)], {"page": "/runs/0/demo"})
    client.post("/new/check", json={"config": config})
    assert started == [(["capstan", "data", "check", "/dev/stdin"], {"tied": True, "given": config})]


def test_a_draft_of_the_form_is_what_init_makes_of_the_answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Any]()

    def initial(answers: Any, path: Path) -> Any:
        made.append(answers)
        return SimpleNamespace(config="run: {}\n", missing=["<Name> the data."])

    monkeypatch.setattr("launcher.board.form.initial_config", initial)
    client = client_of(store)
    for given, said in (
        ({"data": "rows.jsonl"}, "base: empty"),
        ({"base": "b", "data": " "}, "data: empty"),
        ({"base": "b", "data": "d", "gpus": "0"}, "is no number of GPUs"),
        ({"base": "b", "data": "d", "gpus": "-1"}, "is no number of GPUs"),
    ):
        assert said in client.post("/new/draft", json=given).json()["error"]
    answer = client.post("/new/draft", json={"base": " b ", "data": "d", "gpus": "8", "goal": ""}).json()
    assert answer == {"values": {"config": "run: {}\n"}, "parts": {"missing": "&lt;Name&gt; the data."}}
    (answers,) = made
    assert (answers.base, answers.data, answers.goal, answers.machine, answers.gpu, answers.gpus) == (
        *("b", "d", "sft", "one", None, 8),
    )


def test_the_board_listens_at_the_loopback_address_alone_and_says_where(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = list[str]()

    class Server:
        def __init__(self, config: Any) -> None: ...

        async def serve(self, sockets: list[socket.socket]) -> None:
            served.append(sockets[0].getsockname())

    monkeypatch.setattr("uvicorn.Server", Server)
    said, closed = list[str](), list[bool]()
    monkeypatch.setattr("launcher.board.server.Pages.close", lambda pages: closed.append(True))
    serve([store], port=0, read_only=True, log=said.append)
    ((host, port),) = served
    assert host == "127.0.0.1"
    assert re.fullmatch(rf"the board is at http://127\.0\.0\.1:{port}/\?token=[\w-]{{32}}", said[0])
    assert f"ssh -L {port}:127.0.0.1:{port} " in said[1]
    assert said[1].endswith("; it is read-only")
    assert port not in range(8899, 8949), "0 is any free one"
    assert closed == [True], "what only the board needs ends with it"
    monkeypatch.setattr("launcher.board.server._listening", lambda port: pytest.fail("nobody may open a page of it"))

    def fail(prefix: str = "") -> Any:
        raise StorageError("the store cannot be listed.")

    store.children = fail
    with pytest.raises(StorageError, match="cannot be listed"):
        serve([store], port=0, read_only=True, log=said.append)


@pytest.mark.parametrize(("tied", "apart"), [(False, "True"), (True, "False")])
def test_a_command_reads_what_it_is_given_and_outlives_the_board_unless_it_is_tied(
    monkeypatch: pytest.MonkeyPatch, tied: bool, apart: str
) -> None:
    program = "import os, sys; print(os.getsid(0) != int(sys.argv[1]), sys.stdin.read())"
    monkeypatch.setattr("launcher.board.actions.VERB", (sys.executable, "-c", program))
    job = Job(["capstan", str(os.getsid(0))], tied=tied, given="typed")
    look, events = job.look(lambda job, how: how), list[Any]()
    waited(lambda: events.extend(look()) or ("end", None) in events)
    assert "".join(value["output"] for kind, value in events if kind == "text").split() == [apart, "typed"]
    monkeypatch.setattr("launcher.board.actions._PIECE", 2)
    monkeypatch.setattr("launcher.board.actions._MOST_OUTPUT", 3)
    shown = [value["output"] for kind, value in job.look(lambda job, how: how)() if kind == "text"]
    assert shown == [apart[:2]], "a command that says more than a page holds is not shown on"


def test_the_log_that_is_shown_first_is_rank_0s_of_the_newest_start() -> None:
    logs: dict[tuple[int, int], Any] = {(1, 0): [], (2, 0): [], (2, 1): []}
    assert chosen_log(logs, {}) == (2, 0)
    assert chosen_log(logs, {"start": "1", "rank": "0"}) == (1, 0)
    assert chosen_log(logs, {"start": "1", "rank": "7"}) == (2, 0)
    assert chosen_log({}, {}) is None


def test_as_many_runs_are_compared_as_are_marked(store: Store) -> None:
    names = ["first", "second", "third"]
    for name in names:
        write(new(store, name), 1, start(1), step(1, 3.0), end("finished"))
    client = client_of(store)
    page = client.get("/compare", params={"run": [f"0/{name}" for name in names]})
    assert [name for name in names if name not in page.text] == []
    assert "mark two or more runs" in client.get("/compare", params={"run": "0/first"}).text
