"""The pages about runs that exist, and what each of them asks the board for while it is open."""

import json
import shlex
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import anyio
from jinja2 import Environment, PackageLoader
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from launcher.board.actions import ACTIONS, VERB, Jobs, command_of
from launcher.board.listing import Line, Listing
from launcher.board.live import LiveRun, Parts, bounded, events, streamed
from launcher.board.logs import chosen_log, followed, search
from launcher.board.talk import Talks
from launcher.policy.foreign import check_own, started
from launcher.report.figures import SampleFigures, read_figures, read_samples
from launcher.report.history import read_history
from launcher.report.page import environment, figure_in
from launcher.report.plots import spark
from launcher.report.report import comparison_values, read_sweep_figures, sweep_values
from launcher.report.trained import read_settings
from launcher.view.checkpoints import list_checkpoints
from launcher.view.runs import NAME, is_there
from launcher.view.sweep import is_sweep
from launcher.view.terminal import visible
from launcher.view.watch import rank_logs
from trainer.config import dump_config
from trainer.errors import CapstanError, ConfigError
from trainer.processes import children
from trainer.run.folder import leaves, run_config
from trainer.run.lines import duration, of_total
from trainer.store.store import Store

_PATIENCE_SECONDS = 0.7
_LIST_SECONDS = 3.0
_SWEEP_SECONDS = 10.0
_SHOWN = 50
_MOST_COMPARED = 12
_KEPT_RUNS = 8
_ROWS_SECONDS = 120


class Pages:
    """The pages of the runs in `stores`. With `read_only` they have no buttons, and nothing can be started."""

    def __init__(self, stores: Sequence[Store], jobs: Jobs, *, read_only: bool) -> None:
        self.stores, self.jobs, self.read_only = stores, jobs, read_only
        self.listing, self.talks = Listing(stores), Talks()
        self._live: OrderedDict[str, LiveRun] = OrderedDict()
        self.templates = templates()
        self.templates.globals |= {"read_only": read_only, "actions": ACTIONS, "stores": stores}

    def routes(self) -> list[Route]:
        run = "/runs/{place:int}/{name}"
        looks = [
            Route("/", self.runs),
            Route("/events", self.runs_events),
            Route("/compare", self.compare),
            Route(run, self.run),
            Route(f"{run}/events", self.run_events),
            Route(f"{run}/samples", self.samples),
            Route(f"{run}/rows", self.rows),
            Route(f"{run}/rows/shown", self.rows_shown),
            Route(f"{run}/settings", self.settings),
            Route(f"{run}/logs", self.logs),
            Route(f"{run}/logs/events", self.log_events),
        ]
        does = [
            Route(f"{run}/do", self.do, methods=["POST"]),
            Route("/jobs/{job}/events", self.job_events),
            Route(f"{run}/talk", self.talk_page),
            Route(f"{run}/talk", self.talk, methods=["POST"]),
            Route("/talks/{talk}/events", self.talk_events),
            Route("/talks/{talk}", self.say, methods=["POST"]),
        ]
        return looks if self.read_only else looks + does

    def page(self, template: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(visible(self.templates.get_template(template).render(style="", **values)))

    def folder_of(self, place: Any, name: str) -> Store:
        """Return the folder of a run. Raises `ConfigError` if there is none."""
        if not (str(place).isdecimal() and int(place) < len(self.stores) and NAME.fullmatch(name)):
            raise ConfigError(f"there is no run {name[:100]!r} in store {str(place)[:20]}.")
        folder = self.stores[int(place)].sub(name)
        if not is_there(folder):
            raise ConfigError(f"there is no run {name!r} in {self.stores[int(place)].uri}.")
        return folder

    def _found(self, request: Request) -> Store:
        return self.folder_of(request.path_params["place"], request.path_params["name"])

    def close(self) -> None:
        """End what only this board needs."""
        self.talks.end()
        self.listing.close()

    # The list of runs.

    def runs(self, request: Request) -> Response:
        query = _query(request)
        parts, total, unread = self._rows(query, _PATIENCE_SECONDS)
        return self.page("runs.html.j2", parts=parts, query=query, total=total, unread=unread, most=_SHOWN)

    def runs_events(self, request: Request) -> StreamingResponse:
        query = _query(request)

        def draw() -> Parts:
            return self._rows(query, _LIST_SECONDS)[0]

        return events(draw, lambda: _LIST_SECONDS, {})

    def _rows(self, query: Mapping[str, str], patience: float) -> tuple[Parts, int, int]:
        """Return the rows and the words above them, how many runs the filter leaves, and how many are not read yet."""
        began = time.monotonic()
        lines, unread = self.listing.read(patience)
        words = query["words"].lower().split()
        left = [line for line in lines if all(word in line.words for word in words)]
        first = int(query["first"])
        shown = self.listing.with_curves(left[first : first + _SHOWN], began + patience - time.monotonic())
        count = f"{len(left):,} of {len(lines):,} runs" if words else f"{len(lines):,} runs"
        still = f"; {unread:,} are still being read" if unread else ""
        row = self.templates.get_template("row.html.j2")
        rows = "".join(row.render(run=line, url=_url(line), heard=_age(line)) for line in shown)
        return {"rows": rows, "count": f"{count}{still}"}, len(left), unread

    def compare(self, request: Request) -> Response:
        asked = request.query_params.getlist("run")[:_MOST_COMPARED]
        places = [place.partition("/")[::2] for place in asked]
        if len(places) < 2:
            raise ConfigError("compare: mark two or more runs in the list first.")
        figures = [read_figures(self.folder_of(place, name)) for place, name in places]
        tree, values = comparison_values(figures)
        return self.page("live_comparison.html.j2", figure=figure_in(tree), **values)

    # A run.

    def run(self, request: Request) -> Response:
        folder = self._found(request)
        about = {"url": request.url.path.rstrip("/"), "folder": folder.uri, "name": request.path_params["name"]}
        if is_sweep(folder):
            return self.page("live_sweep.html.j2", parts=self._sweep_parts(request, folder), **about)
        return self.page("live_run.html.j2", parts=self._parts(folder), run=about, **about)

    def run_events(self, request: Request) -> StreamingResponse:
        folder = self._found(request)
        if is_sweep(folder):
            return events(partial(self._sweep_parts, request, folder), lambda: _SWEEP_SECONDS, {})
        live = self._live_run(folder)
        return events(partial(self._parts, folder), lambda: live.interval, {})

    def _sweep_parts(self, request: Request, folder: Store) -> Parts:
        figures = read_sweep_figures(folder)
        values = sweep_values(figures, f"/runs/{request.path_params['place']}/")
        return {"whole": self._block("sweep.html.j2", "whole", {"figure": figure_in(figures.to_json()), **values})}

    def _live_run(self, folder: Store) -> LiveRun:
        """Return what is known of the run. The runs that were looked at last are kept."""
        live = self._live.pop(folder.uri, None) or LiveRun(folder, self._block)
        self._live[folder.uri] = live
        while len(self._live) > _KEPT_RUNS:
            self._live.popitem(last=False)
        return live

    def _parts(self, folder: Store) -> Parts:
        live = self._live_run(folder)
        parts = live.parts()
        return {**parts, "buttons": self._buttons(live.state)}

    def _buttons(self, state: str) -> str:
        return "" if self.read_only else self.templates.get_template("buttons.html.j2").render(state=state)

    def _block(self, name: str, block: str, values: Mapping[str, Any]) -> str:
        template = self.templates.get_template(name)
        return bounded("".join(template.blocks[block](template.new_context(dict(values)))))

    def samples(self, request: Request) -> Response:
        notes: list[str] = []
        prompts = _by_prompt(read_samples(self._found(request), notes))
        return self.page("samples.html.j2", **_names(request), prompts=prompts, notes=notes)

    def settings(self, request: Request) -> Response:
        notes: list[str] = []
        folder = self._found(request)
        tree = dict(leaves(read_settings(folder, notes).tree))
        starts = read_history(folder).starts
        return self.page("settings.html.j2", **_names(request), starts=starts, tree=tree, notes=notes)

    def rows(self, request: Request) -> Response:
        return self.page("rows.html.j2", **_names(request), query=request.query_params, asked=request.url.query)

    def rows_shown(self, request: Request) -> Response:
        """Show rows as `capstan data show` does, which runs beside the board: it needs the base's tokenizer."""
        folder, query = self._found(request), request.query_params
        options = ["--split", "eval"] if query.get("split") == "eval" else []
        options += ["--row", query["row"]] if query.get("row", "").isdecimal() else []
        options += ["--packed"] if query.get("packed") else []
        shown, trouble = None, ""
        try:
            config = run_config(folder)
            check_own(folder, config, started, (), trust=False)
            shown = _rows_of(dump_config(config), options)
        except CapstanError as error:
            trouble = str(error)
        template = self.templates.get_template("rows_shown.html.j2")
        return HTMLResponse(bounded(template.render(shown=shown, trouble=trouble, query=query)))

    # Logs.

    def logs(self, request: Request) -> Response:
        folder, words = self._found(request), request.query_params.get("words", "")[:200]
        logs = rank_logs(folder)
        chosen = chosen_log(logs, request.query_params)
        found, whole = search(folder, logs[chosen], words) if chosen and words.strip() else (None, True)
        about = {"logs": sorted(logs), "chosen": chosen, "words": words, "found": found, "whole": whole}
        return self.page("logs.html.j2", **_names(request), **about)

    def log_events(self, request: Request) -> StreamingResponse:
        folder = self._found(request)
        return streamed(followed(folder, chosen_log(rank_logs(folder), request.query_params)))

    # Buttons and conversations.

    async def do(self, request: Request) -> Response:
        given = await body_of(request)
        folder = await anyio.to_thread.run_sync(self._found, request)
        fields = given.get("fields")
        fields = fields if isinstance(fields, dict) else {}
        words = command_of(str(given.get("action")), folder, fields, dry_run=bool(given.get("dry_run")))
        command = shlex.join(words)
        if given.get("only_show"):
            return JSONResponse({"command": command})
        job = self.jobs.start(words)
        self.listing.forget(folder)
        self._live_run(folder).draw_soon()
        return JSONResponse({"command": command, "job": job})

    def job_events(self, request: Request) -> Response:
        job = self.jobs.find(request.path_params["job"])
        return streamed(job.events()) if job else Response(status_code=404)

    def talk_page(self, request: Request) -> Response:
        folder = self._found(request)
        steps = [manifest.step for manifest in list_checkpoints(folder).manifests]
        return self.page("talk.html.j2", **_names(request), steps=steps)

    async def talk(self, request: Request) -> Response:
        given = await body_of(request)
        folder = await anyio.to_thread.run_sync(self._found, request)
        return JSONResponse({"talk": await anyio.to_thread.run_sync(self.talks.begin, folder, given)})

    def talk_events(self, request: Request) -> Response:
        talk = self.talks.find(request.path_params["talk"])
        return streamed(talk.events()) if talk else Response(status_code=404)

    async def say(self, request: Request) -> Response:
        given, talk = await body_of(request), self.talks.find(request.path_params["talk"])
        if talk is None or talk.over:
            raise ConfigError("the conversation has ended. Begin a new one.")
        talk.say(str(given.get("text", "")))
        return JSONResponse({})


def templates() -> Environment:
    """Return the board's templates, which are those of reports with a few more."""
    pages = environment(PackageLoader("launcher", "board"))
    pages.globals |= {"spark": spark, "duration": duration, "of_total": of_total}
    return pages


async def body_of(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request. Raises `ConfigError` if it has none, or too large a one."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > 2**20:
            raise ConfigError("the request is larger than a page of the board sends.")
    try:
        given = json.loads(data)
    except ValueError as error:
        raise ConfigError("the request is no JSON object, as a page of the board sends.") from error
    if not isinstance(given, dict):
        raise ConfigError("the request is no JSON object, as a page of the board sends.")
    return given


def _by_prompt(samples: Sequence[SampleFigures]) -> dict[str, list[tuple[int, str | None, str | None]]]:
    """Return by prompt its answers at each step, as (step, the base's, the adapter's)."""
    found: dict[str, list[tuple[int, str | None, str | None]]] = {}
    for at in samples:
        for sample in at.samples:
            found.setdefault(sample.prompt, []).append((at.step, sample.base, sample.adapter))
    return found


def _rows_of(config: str, options: Sequence[str]) -> Any:
    """Return what `capstan data show --json` prints of a configuration. Raises `ConfigError` with what it says."""
    command = children.apart([*VERB, "data", "show", "/dev/stdin", "--json", *options])
    done = children.run(command, input=config, capture_output=True, text=True, errors="replace", timeout=_ROWS_SECONDS)
    if done.returncode:
        raise ConfigError(done.stderr.strip()[-2000:] or f"capstan data show ended with {done.returncode}.")
    return json.loads(done.stdout)


def _query(request: Request) -> dict[str, str]:
    first = request.query_params.get("first", "0")
    return {"words": request.query_params.get("words", "")[:200], "first": first if first.isdecimal() else "0"}


def _age(line: Line) -> str:
    """Return the time since a run was heard of, in steps that do not change at every look."""
    seconds = time.time() - line.heard
    return duration(seconds if seconds < 0 else seconds - seconds % (60 if seconds >= 60 else 10))


def _url(line: Line) -> str:
    return f"/runs/{line.place}/{quote(line.name)}"


def _names(request: Request) -> dict[str, str]:
    """Return the name of a run and the address of its page, for pages below that one."""
    place, name = request.path_params["place"], request.path_params["name"]
    return {"name": name, "url": f"/runs/{place}/{quote(name)}"}
