"""A first run by a form: `capstan init`, `plan` and `data check` in a page, and `train` or the command to submit."""

import shlex
import threading
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import escape
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from launcher.board.actions import Job
from launcher.board.pages import SURROGATES, Pages, answered
from launcher.init.commented import check_new, write_new
from launcher.init.initial import GOALS, KINDS, InitAnswers, initial_config
from launcher.init.recipes import table
from launcher.plan.planning import needs_of, plan_run
from launcher.plan.summary import fits_line, plan_lines
from trainer.config import Config, fields, parse_config
from trainer.config.reading import read_yaml
from trainer.errors import CapstanError, ConfigError
from trainer.plan.gpus import names
from trainer.run.folder import leaves
from trainer.store.store import open_run_store

_MOST_FILES = 60
_ANSWERS: Mapping[str, Any] = {"base": "", "data": "", "goal": "sft", "machine": "one", "gpu": None, "gpus": None}
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")


class Form:
    """The page of the form, and what it asks for at each change."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        # The first look at a base takes seconds in a process of its own; a second plan of it waits for what it finds.
        self._planning = threading.Lock()

    def routes(self) -> list[Route]:
        looks = [
            Route("/new", self.page),
            Route("/new/files", self.files),
            answered("/new/draft", self.draft),
            answered("/new/plan", self.plan),
        ]
        does = [answered("/new/check", self.check), answered("/new/start", self.start)]
        return looks if self._pages.read_only else looks + does

    def page(self, request: Request) -> Response:
        bases = sorted({recipe.base for recipe in table().recipes.values()})
        return self._pages.page("new.html.j2", bases=bases, goals=GOALS, kinds=KINDS, gpus=names())

    def files(self, request: Request) -> Response:
        """The folders and files of data of this machine that begin with the typed words."""
        typed = request.query_params.get("at", "")[:4096]
        folder, slash, begin = typed.rpartition("/")
        lead = f"{folder}{slash}"
        try:
            found = (one for one in sorted(Path(lead or ".").expanduser().iterdir()) if one.name.startswith(begin))
            # No configuration can name a file whose name is not UTF-8.
            found = (one for one in found if one.name[0] != "." and SURROGATES.search(one.name) is None)
            shown = (one for one in found if one.is_dir() or one.name.lower().endswith(_DATA))
            every = list(islice(shown, _MOST_FILES))
        except (OSError, ValueError, RuntimeError):
            every = []
        return JSONResponse([f"{lead}{one.name}{'/' if one.is_dir() else ''}" for one in every])

    def draft(self, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration that `capstan init` makes of the answers."""
        said = {name: str(given.get(name) or "").strip() or default for name, default in _ANSWERS.items()}
        for name in ("base", "data"):
            if not said[name]:
                raise ConfigError(f"{name}: empty. Give it a value.")
        gpus = said["gpus"]
        if gpus and not (gpus.isdecimal() and 0 < int(gpus[:9]) < 2**17):
            raise ConfigError(f"gpus: {gpus[:40]!r} is no number of GPUs. Example: 8.")
        answers = InitAnswers(**{**said, "gpus": int(gpus) if gpus else None})
        with self._planning:
            made = initial_config(answers, Path("run.yaml"))
        return {"values": {"config": made.config}, "parts": {"missing": escape(" ".join(made.missing))}}

    def plan(self, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
        """The verdict of `capstan plan` on a configuration, and the sentence of each of its settings.

        A quick one looks at the needs alone, and neither at the data, the weights, the exports nor the store.
        """
        text, gpu = str(given.get("config", "")), str(given.get("gpu") or "").strip() or None
        lines, wrong = [], list[str]()
        try:
            config = parse_config(text)
            if given.get("look") == "quick":
                needs = needs_of(config, gpu, None)
                plan = needs.plan
                lines = [("memory", str(fits_line(plan, needs.machine.gpu, needs.machine.whose)))]
            else:
                with self._planning:
                    planned = plan_run(config, gpu, None)
                lines = [(name, str(line)) for name, line in plan_lines(planned, config)]
                plan = planned.plan
            wrong = list(plan.shortfalls)
        except CapstanError as error:
            wrong = str(error).splitlines()
        return {"parts": {"verdict": self._pages.piece("verdict", lines, wrong, _about(text))}}

    def check(self, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
        """Start `capstan data check` of a configuration. It ends with the board."""
        text = str(given.get("config", ""))
        parse_config(text)
        return self._started(Job(["capstan", "data", "check", "/dev/stdin"], tied=True, given=text))

    def start(self, request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
        """Write the configuration to a file and train here, or return the command that submits it."""
        text, path = str(given.get("config", "")), Path(str(given.get("path") or "run.yaml"))
        config, machine = parse_config(text), str(given.get("machine") or "one")
        if path.suffix not in (".yaml", ".yml") or str(path).startswith("-") or "\0" in str(path):
            raise ConfigError(f"path: {str(path)[:200]!r} is no name of a configuration. Example: run.yaml.")
        check_new(path, False)
        write_new(path, text)
        if machine not in ("slurm", "ray"):
            return self._started(Job(["capstan", "train", str(path)], page=self._url(config)))
        command = shlex.join(["capstan", "submit", machine, str(path)])
        return {"parts": {"missing": escape(f"{path} is written. Now: {command}")}}

    def _started(self, job: Job) -> dict[str, Any]:
        return {"listen": f"/started/{self._pages.keep(job)}/events"}

    def _url(self, config: Config) -> str:
        """Return the address of the run's page, if its store is one of the board's."""
        uri = open_run_store(config).uri
        places = [place for place, store in enumerate(self._pages.stores) if store.uri == uri]
        return f"/runs/{places[0]}/{config.run.name}" if places else ""


def _about(text: str) -> list[tuple[str, Any, str]]:
    """Return the settings of a configuration, each with its value and its sentence."""
    try:
        tree = read_yaml(text, "the configuration")
    except ConfigError:
        return []
    sentences = {name: field.description or "" for name, field in fields()}
    given = leaves(tree) if isinstance(tree, dict) else ()
    return [(name, value, sentences[name]) for name, value in given if name in sentences]
