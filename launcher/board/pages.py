"""The pages about runs that exist, and what each of them asks the board for while it is open."""

import json
import re
import secrets
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode

import anyio
from jinja2 import PackageLoader
from markupsafe import escape
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from launcher.board.actions import BUTTONS, VERB, Job, command_of
from launcher.board.live import Event, LiveRun, Parts, bounded, changes, chosen_log, followed, streamed, text_of
from launcher.board.talk import MOST_TALKS, Talk
from launcher.policy.foreign import check_own, started
from launcher.report.figures import read_figures
from launcher.report.page import environment, figure_in
from launcher.report.plots import spark
from launcher.report.report import comparison_values, read_sweep_figures, sweep_values
from launcher.view.listing import Line, Listing
from launcher.view.runs import NAME, is_there, poll_seconds
from launcher.view.sweep import is_sweep
from launcher.view.terminal import visible
from launcher.view.watch import find_lines, rank_logs
from trainer.config import dump_config
from trainer.errors import CapstanError, ConfigError
from trainer.processes import children
from trainer.run.folder import run_config
from trainer.run.lines import duration, of_total
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store

_PATIENCE_SECONDS = 0.7
_LIST_SECONDS = 3.0
_SWEEP_SECONDS = 10.0
_SHOWN = 50
_MOST_COMPARED = 12
_KEPT_RUNS = 8
_ROWS_SECONDS = 120
_MOST_ASKED = 2**20
SURROGATES = re.compile("[\ud800-\udfff]")
_BLOCKS: Mapping[str, Sequence[str]] = {
    "": "summary course starts evaluation checkpoints measures time data repeat notes".split(),
    "/samples": ("samples", "notes"),
}
"""The blocks of the report's run.html.j2 on the pages of a run, by the ends of their addresses."""


class Pages:
    """The pages of the runs in `stores`. With `read_only` they have no buttons, and nothing can be started."""

    def __init__(self, stores: Sequence[Store], *, read_only: bool) -> None:
        self.stores, self.read_only = stores, read_only
        self.listing, self.started = Listing(stores), dict[str, Job | Talk]()
        self._live: OrderedDict[tuple[str, str], LiveRun] = OrderedDict()
        self.templates = environment(PackageLoader("launcher", "board"))
        self.templates.globals |= {"read_only": read_only, "actions": BUTTONS, "stores": stores}
        self.templates.globals |= {"spark": spark, "duration": duration, "of_total": of_total}

    def routes(self) -> list[Route]:
        run = "/runs/{place}/{name}"
        looks = [
            Route("/", self.runs),
            Route("/events", self.runs_events),
            Route("/compare", self.compare),
            *(Route(f"{run}{at}", partial(self.run, at=at)) for at in _BLOCKS),
            *(Route(f"{run}{at}/events", partial(self.run_events, at=at)) for at in _BLOCKS),
            Route(f"{run}/rows", self.rows),
            Route(f"{run}/rows/events", self.rows_events),
            Route(f"{run}/logs", self.logs),
            Route(f"{run}/logs/events", self.log_events),
        ]
        does = [
            answered(f"{run}/do", self.do),
            Route("/started/{name}/events", self.started_events),
            Route(f"{run}/talk", self.talk_page),
            answered(f"{run}/talk", self.talk),
            answered("/started/{name}/say", self.say),
        ]
        return looks if self.read_only else looks + does

    def page(self, template: str, **values: Any) -> HTMLResponse:
        given = {"style": "", "url": "", "at": "", "events": "", **values}
        return HTMLResponse(visible(self.templates.get_template(template).render(given)))

    def piece(self, name: str, *given: Any, **values: Any) -> str:
        """Return a macro of pieces.html.j2, drawn."""
        pieces: Any = self.templates.get_template("pieces.html.j2").module
        return bounded(str(getattr(pieces, name)(*given, **values)))

    def folder_of(self, place: str, name: str) -> Store:
        """Return the folder of a run. Raises `ConfigError` if there is none."""
        if not (place in map(str, range(len(self.stores))) and NAME.fullmatch(name)):
            raise ConfigError(f"there is no run {name[:100]!r} in store {place[:20]!r}.")
        folder = self.stores[int(place)].sub(name)
        if not is_there(folder):
            raise ConfigError(f"there is no run {name!r} in {self.stores[int(place)].uri}.")
        return folder

    def _found(self, request: Request) -> Store:
        return self.folder_of(request.path_params["place"], request.path_params["name"])

    def close(self) -> None:
        """End what only this board needs."""
        for talk in self._talks():
            talk.end()
        self.listing.close()

    # The list of runs.

    def runs(self, request: Request) -> Response:
        query = _query(request)
        parts, total, unread = self._rows(query, _PATIENCE_SECONDS)
        about = {"query": query, "total": total, "unread": unread, "most": _SHOWN}
        return self.page("runs.html.j2", parts=parts, events=f"/events?{urlencode(query)}", **about)

    def runs_events(self, request: Request) -> StreamingResponse:
        query = _query(request)
        return streamed(changes(lambda: self._rows(query, _LIST_SECONDS)[0]), lambda: _LIST_SECONDS)

    def _rows(self, query: Mapping[str, str], patience: float) -> tuple[Parts, int, int]:
        """Return the rows and the words above them, how many runs the filter leaves, and how many are not read yet."""
        began = time.monotonic()
        lines, unread = self.listing.read(patience)
        words = query["words"].lower().split()
        left = [line for line in lines if all(word in line.words for word in words)]
        first = int(query["first"])
        shown = self.listing.with_curves(left[first : first + _SHOWN], began + patience - time.monotonic())
        runs = f"{len(lines):,} run{'' if len(lines) == 1 else 's'}"
        more = [f"{unread:,} are still being read"] if unread else []
        more += [f"{self.stores[place].uri}: {why}" for place, why in sorted(self.listing.silent.items())]
        count = escape("; ".join([f"{len(left):,} of {runs}" if words else runs, *more]))
        rows = "".join(self.piece("row", line, f"/runs/{line.place}/{quote(line.name)}", _age(line)) for line in shown)
        return {"rows": rows, "count": count}, len(left), unread

    def compare(self, request: Request) -> Response:
        asked = request.query_params.getlist("run")[:_MOST_COMPARED]
        places = [place.partition("/")[::2] for place in asked]
        if len(places) < 2:
            raise ConfigError("compare: mark two or more runs in the list first.")
        figures = [read_figures(self.folder_of(place, name)) for place, name in places]
        tree, values = comparison_values(figures)
        return self.page("live_comparison.html.j2", figure=figure_in(tree), **values)

    # A run.

    def run(self, request: Request, at: str) -> Response:
        folder = self._found(request)
        if is_sweep(folder):
            return self.page("live_sweep.html.j2", parts=self._sweep_parts(request, folder), **_names(request, at))
        parts = self._parts(folder, at)
        return self.page("live_run.html.j2", parts=parts, blocks=_BLOCKS[at], **_names(request, at))

    def run_events(self, request: Request, at: str) -> StreamingResponse:
        folder = self._found(request)
        if is_sweep(folder):
            return streamed(changes(partial(self._sweep_parts, request, folder)), lambda: _SWEEP_SECONDS)
        return streamed(changes(partial(self._parts, folder, at)), lambda: self._live_run(folder, at).interval)

    def _sweep_parts(self, request: Request, folder: Store) -> Parts:
        figures = read_sweep_figures(folder)
        values = sweep_values(figures, f"/runs/{request.path_params['place']}/")
        return {"whole": self._block("sweep.html.j2", "whole", {"figure": figure_in(figures.to_json()), **values})}

    def _live_run(self, folder: Store, at: str) -> LiveRun:
        """Return what is known of the run. The runs that were looked at last are kept."""
        live = self._live.pop((folder.uri, at), None) or LiveRun(folder, _BLOCKS[at], self._block)
        self._live[folder.uri, at] = live
        while len(self._live) > _KEPT_RUNS:
            self._live.popitem(last=False)
        return live

    def _parts(self, folder: Store, at: str = "") -> Parts:
        live = self._live_run(folder, at)
        parts = live.parts()
        return parts if at or self.read_only else {**parts, "buttons": self.piece("buttons", live.state)}

    def _block(self, name: str, block: str, values: Mapping[str, Any]) -> str:
        template = self.templates.get_template(name)
        return bounded("".join(template.blocks[block](template.new_context(dict(values)))))

    def rows(self, request: Request) -> Response:
        return self.page("rows.html.j2", **_names(request, "/rows"), query=request.query_params)

    def rows_events(self, request: Request) -> StreamingResponse:
        """Show rows as `capstan data show` does, which runs beside the board: it needs the base's tokenizer."""
        folder, query = self._found(request), request.query_params
        options = ["--split", "eval"] if query.get("split") == "eval" else []
        options += ["--row", query["row"]] if query.get("row", "").isdecimal() else []
        options += ["--packed"] if query.get("packed") else []

        def look() -> Iterable[Event]:
            shown, trouble = None, ""
            try:
                config = run_config(folder)
                check_own(folder, config, started, (), trust=False)
                shown = _rows_of(dump_config(config), options)
            except CapstanError as error:
                trouble = str(error)
            return [("parts", {"shown": self.piece("shown", shown, trouble, query)}), ("end", None)]

        return streamed(look, lambda: 0)

    # Logs.

    def logs(self, request: Request) -> Response:
        folder, words = self._found(request), request.query_params.get("words", "")[:200]
        logs = rank_logs(folder)
        chosen = chosen_log(logs, request.query_params)
        found, whole = find_lines(folder, logs[chosen], words) if chosen and words.strip() else (None, True)
        lines = None if found is None else [text_of(line) for line in found]
        about = {"logs": sorted(logs), "chosen": chosen, "words": words, "found": lines, "whole": whole}
        return self.page("logs.html.j2", **_names(request, "/logs"), **about)

    def log_events(self, request: Request) -> StreamingResponse:
        folder = self._found(request)
        return streamed(followed(folder, request.query_params), lambda: 2 * poll_seconds(folder))

    # Buttons and conversations.

    def do(self, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
        folder, action = self._found(request), str(given.get("action"))
        words = command_of(action, folder, given, dry_run=bool(given.get("dry_run")))
        if given.get("look"):
            return {"parts": {f"command-{action}": escape(shlex.join(words))}}
        self.listing.forget(folder)
        self._live_run(folder, "").draw_soon()
        return {"listen": f"/started/{self.keep(Job(words))}/events"}

    def keep(self, one: Job | Talk) -> str:
        """Keep what was started, so that it can be looked at. Returns a name for it that nobody guesses."""
        self.started[name := secrets.token_hex(8)] = one
        return name

    def started_events(self, request: Request) -> Response:
        found = self.started.get(request.path_params["name"])
        if found is None:
            return Response(status_code=404)
        return streamed(found.look(partial(self.piece, found.macro)), lambda: found.look_seconds)

    def _talks(self) -> list[Talk]:
        return [one for one in self.started.values() if isinstance(one, Talk) and not one.over]

    def talk_page(self, request: Request) -> Response:
        steps = sorted(committed_steps(self._found(request)), reverse=True)
        name = request.query_params.get("with", "")
        about = _names(request, "/talk") | {"events": f"/started/{name}/events" if name in self.started else ""}
        return self.page("talk.html.j2", **about, steps=steps)

    def talk(self, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
        folder = self._found(request)
        if len(self._talks()) >= MOST_TALKS:
            raise ConfigError(f"{MOST_TALKS} conversations go on already, and each has a base in memory. End one.")
        return {"go": f"?with={self.keep(Talk(folder, given))}"}

    def say(self, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
        found = self.started.get(request.path_params["name"])
        if not isinstance(found, Talk) or found.over:
            raise ConfigError("the conversation has ended. Begin a new one.")
        found.say("" if given.get("anew") else str(given.get("text", "")))
        return {}


def answered(path: str, answer: Callable[[Request, Mapping[str, Any]], Mapping[str, Any]]) -> Route:
    """Return the route of a request of the page's script, with a JSON object. A thread makes the `answer`.

    An answer has HTML for `parts` of the page, `values` of fields, an address to `listen` to, or one to `go` to.
    """

    async def answer_all(request: Request) -> Response:
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > _MOST_ASKED:
                raise ConfigError("the request is larger than a page of the board sends.")
        try:
            given = json.loads(data)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ConfigError("the request is no JSON object, as a page of the board sends.")
        if SURROGATES.search(json.dumps(given, ensure_ascii=False)):
            raise ConfigError(
                "a field holds half of a character (a lone surrogate), which no file or command can have. Type the"
                " character again."
            )
        return JSONResponse(await anyio.to_thread.run_sync(answer, request, given))

    return Route(path, answer_all, methods=["POST"])


def _rows_of(config: str, options: Sequence[str]) -> Any:
    """Return what `capstan data show --json` prints of a configuration. Raises `ConfigError` with what it says."""
    command = children.apart([*VERB, "data", "show", "/dev/stdin", "--json", *options])
    done = children.run(command, input=config, capture_output=True, text=True, errors="replace", timeout=_ROWS_SECONDS)
    if done.returncode:
        raise ConfigError(done.stderr.strip()[-2000:] or f"capstan data show ended with {done.returncode}.")
    return json.loads(done.stdout)


def _query(request: Request) -> dict[str, str]:
    first = request.query_params.get("first", "0")[:9]
    return {"words": request.query_params.get("words", "")[:200], "first": first if first.isdecimal() else "0"}


def _age(line: Line) -> str:
    """Return the time since a run was heard of, in steps that do not change at every look."""
    return duration((time.time() - line.heard) // 10 * 10)


def _names(request: Request, at: str) -> dict[str, str]:
    """Return the name of a run, the address of its page, the end of that of a page below it, and that of its events."""
    place, name = request.path_params["place"], request.path_params["name"]
    url = f"/runs/{place}/{quote(name)}"
    return {"name": name, "url": url, "at": at, "events": f"{url}{at}/events?{request.url.query}".rstrip("?")}
