"""A first run by a form: `capstan init`, `plan` and `data check` in a page, and `train` or the command to submit."""

import shlex
import threading
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from launcher.board.actions import Jobs
from launcher.board.pages import Pages, body_of
from launcher.init.commented import check_new, write_new
from launcher.init.initial import GOALS, KINDS, InitAnswers, Initial, initial_config
from launcher.init.recipes.recipe import table
from launcher.plan.planning import fits as fits_in
from launcher.plan.planning import needs_of, plan_run
from launcher.plan.summary import fits_line, plan_lines
from trainer.config import Config, fields, parse_config
from trainer.config.reading import read_yaml
from trainer.errors import CapstanError, ConfigError
from trainer.plan.gpus import names
from trainer.run.folder import leaves
from trainer.store.store import open_run_store

_MOST_FILES = 60
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")


class Form:
    """The page of the form, and what it asks for at each change."""

    def __init__(self, pages: Pages, jobs: Jobs) -> None:
        self._pages, self._jobs = pages, jobs
        # The first look at a base takes seconds in a process of its own; a second plan of it waits for what it finds.
        self._planning = threading.Lock()

    def routes(self) -> list[Route]:
        looks = [
            Route("/new", self.page),
            Route("/new/files", self.files),
            Route("/new/draft", self.draft, methods=["POST"]),
            Route("/new/plan", self.plan, methods=["POST"]),
        ]
        does = [
            Route("/new/check", self.check, methods=["POST"]),
            Route("/new/start", self.start, methods=["POST"]),
        ]
        return looks if self._pages.read_only else looks + does

    def page(self, request: Request) -> Response:
        bases = sorted({recipe.base for recipe in table().recipes.values()})
        return self._pages.page("new.html.j2", bases=bases, goals=GOALS, kinds=KINDS, gpus=names())

    def files(self, request: Request) -> Response:
        """The folders and files of data of this machine that begin with the typed words."""
        typed = request.query_params.get("at", "")[:4096]
        folder, _, begin = typed.rpartition("/")
        try:
            place = Path(f"{folder}/" if "/" in typed else ".").expanduser()
            found = (one for one in sorted(place.iterdir()) if one.name.startswith(begin) and one.name[0] != ".")
            shown = (one for one in found if one.is_dir() or one.name.lower().endswith(_DATA))
            every = list(islice(shown, _MOST_FILES))
        except (OSError, ValueError, RuntimeError):
            every = []
        lead = f"{folder}/" if "/" in typed else ""
        return JSONResponse([f"{lead}{one.name}{'/' if one.is_dir() else ''}" for one in every])

    async def draft(self, request: Request) -> Response:
        """The configuration that `capstan init` makes of the answers."""
        given = await body_of(request)
        gpus = str(given.get("gpus") or "").strip()
        if gpus and not (gpus.isdecimal() and 0 < int(gpus) < 2**17):
            raise ConfigError(f"gpus: {gpus[:40]!r} is no number of GPUs. Example: 8.")
        base, data = (str(given.get(name) or "").strip() for name in ("base", "data"))
        for name, value in (("base", base), ("data", data)):
            if not value:
                raise ConfigError(f"{name}: empty. Give it a value.")
        answers = InitAnswers(
            base=base,
            data=data,
            goal=str(given.get("goal") or "sft"),
            machine=str(given.get("machine") or "one"),
            gpu=str(given.get("gpu") or "").strip() or None,
            gpus=int(gpus) if gpus else None,
        )
        made = await anyio.to_thread.run_sync(self._draft, answers)
        return JSONResponse({"config": made.config, "missing": made.missing})

    def _draft(self, answers: InitAnswers) -> Initial:
        with self._planning:
            return initial_config(answers, Path("run.yaml"))

    async def plan(self, request: Request) -> Response:
        """The verdict of `capstan plan` on a configuration, and the sentence of each of its settings.

        A quick one looks at the needs alone, and neither at the data, the weights, the exports nor the store.
        """
        given = await body_of(request)
        found = await anyio.to_thread.run_sync(partial(self._plan, given))
        return JSONResponse(found)

    def _plan(self, given: Mapping[str, Any]) -> dict[str, Any]:
        text, gpu = str(given.get("config", "")), str(given.get("gpu") or "").strip() or None
        lines, wrong, fits = [], list[str](), None
        try:
            config = parse_config(text)
            if given.get("quick"):
                needs = needs_of(config, gpu, None)
                machine, plan = needs.machine, needs.plan
                lines, fits = [("memory", str(fits_line(plan, machine.gpu, machine.whose)))], fits_in(plan, machine.gpu)
            else:
                with self._planning:
                    planned = plan_run(config, gpu, None)
                lines = [(name, str(line)) for name, line in plan_lines(planned, config)]
                plan, fits = planned.plan, planned.fits
            wrong = list(plan.shortfalls)
        except CapstanError as error:
            wrong = str(error).splitlines()
        verdict = self._pages.templates.get_template("plan.html.j2")
        html = verdict.render(lines=lines, wrong=wrong, about=_about(text))
        return {"html": html, "ok": not wrong, "fits": fits}

    async def check(self, request: Request) -> Response:
        """Start `capstan data check` of a configuration. It ends with the board."""
        given = await body_of(request)
        text = str(given.get("config", ""))
        parse_config(text)
        words = ["capstan", "data", "check", "/dev/stdin"]
        return JSONResponse({"job": self._jobs.start(words, tied=True, given=text)})

    async def start(self, request: Request) -> Response:
        """Write the configuration to a file and train here, or return the command that submits it."""
        given = await body_of(request)
        text, path = str(given.get("config", "")), Path(str(given.get("path") or "run.yaml"))
        config = parse_config(text)
        if path.suffix not in (".yaml", ".yml") or str(path).startswith("-"):
            raise ConfigError(f"path: {str(path)[:200]!r} is no name of a configuration. Example: run.yaml.")
        await anyio.to_thread.run_sync(check_new, path, False)
        await anyio.to_thread.run_sync(write_new, path, text)
        machine = str(given.get("machine") or "one")
        if machine in ("slurm", "ray"):
            return JSONResponse(
                {"written": str(path), "command": shlex.join(["capstan", "submit", machine, str(path)])}
            )
        words = ["capstan", "train", str(path)]
        job = self._jobs.start(words)
        return JSONResponse({"written": str(path), "command": shlex.join(words), "job": job, "run": self._url(config)})

    def _url(self, config: Config) -> str | None:
        """Return the address of the run's page, if its store is one of the board's."""
        uri = open_run_store(config).uri
        places = [place for place, store in enumerate(self._pages.stores) if store.uri == uri]
        return f"/runs/{places[0]}/{config.run.name}" if places else None


def _about(text: str) -> list[tuple[str, Any, str]]:
    """Return the settings of a configuration, each with its value and its sentence."""
    try:
        tree = read_yaml(text, "the configuration")
    except ConfigError:
        return []
    sentences = {name: field.description or "" for name, field in fields()}
    given = leaves(tree) if isinstance(tree, dict) else ()
    return [(name, value, sentences[name]) for name, value in given if name in sentences]
