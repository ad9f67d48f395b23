"""Serves the board on this machine alone, and prints where it is."""

import getpass
import secrets
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from importlib.resources import files

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from launcher.board.form import Form
from launcher.board.guard import Guard
from launcher.board.pages import Pages
from trainer.errors import CapstanError, ConfigError
from trainer.store.store import Store

_HOST = "127.0.0.1"
_TRIED = 50
_LONGEST_MESSAGE = 4000
_FILES = {"page.css": "launcher.report", "board.css": "launcher.board", "board.js": "launcher.board"}


def application(pages: Pages, token: str, log: Callable[[str], None]) -> Guard:
    """Return every page and everything that pages ask for, behind the token."""
    styles = (Route(f"/{name}", partial(_file, package=package, name=name)) for name, package in _FILES.items())
    routes = [*styles, *pages.routes(), *Form(pages).routes()]

    def refused(request: Request, error: Exception) -> Response:
        sentence = str(error)[:_LONGEST_MESSAGE]
        if request.method == "POST":
            return JSONResponse({"error": sentence}, 400)
        page = pages.page("base.html.j2", sentence=sentence)
        page.status_code = 404 if isinstance(error, ConfigError) else 503
        return page

    def failed(request: Request, error: Exception) -> Response:
        log(f"{request.url.path}: {''.join(traceback.format_exception(error))}")
        return PlainTextResponse("The board has failed at this; the terminal that it runs in says how.", 500)

    return Guard(Starlette(routes=routes, exception_handlers={CapstanError: refused, Exception: failed}), token)


def _file(request: Request, package: str, name: str) -> Response:
    return FileResponse(str(files(package).joinpath(name)))


def serve(stores: Sequence[Store], *, port: int | None, read_only: bool, log: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. `port` is the one to listen on; by default the first free one from 8899 on.

    Raises:
        ConfigError: the port is taken.
    """
    for store in stores:
        store.children()  # a store that cannot be listed is told before anybody opens a page
    token = secrets.token_urlsafe(24)
    with closing(_listening(port)) as listening:
        at = listening.getsockname()[1]
        pages = Pages(stores, read_only=read_only)
        log(f"the board is at http://{_HOST}:{at}/?token={token}")
        log(
            f"from another machine first: ssh -L {at}:{_HOST}:{at} {getpass.getuser()}@{socket.gethostname()}"
            f"{'' if not read_only else '; it is read-only'}"
        )
        log("Ctrl-C ends it; what its buttons have started goes on")
        config = uvicorn.Config(
            application(pages, token, log),
            log_level="critical",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        with suppress(KeyboardInterrupt):
            anyio.run(lambda: uvicorn.Server(config).serve([listening]))
        pages.close()


def _listening(port: int | None) -> socket.socket:
    for number in [port] if port is not None else range(8899, 8899 + _TRIED):
        with suppress(OSError):
            return socket.create_server((_HOST, number))
    where = f"port {port}" if port is not None else f"ports 8899 to {8899 + _TRIED - 1}"
    raise ConfigError(f"--port: {where} of this machine cannot be listened on. Give another, or 0 for any free one.")
