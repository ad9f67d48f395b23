"""Serves the board on this machine alone, prints where it is, and refuses whoever may not ask.

A page of the board shows texts of whoever may write to a store. They are escaped, and a page also runs no script and
loads nothing except the board's own files. Other web sites that are open in the same browser cannot ask the board. They
do not know the token, and their requests name another origin. If such a site lets its own name lead to 127.0.0.1, the
board does not answer to that name.
"""

import getpass
import hashlib
import re
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
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.board.form import Form
from launcher.board.pages import Pages
from trainer.errors import CapstanError, ConfigError
from trainer.store.store import Store

_HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses with 403 every request that lacks the token or comes from another page than the board's own."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token
        # Browsers send a cookie to all ports of a host, so each board has a name of its own.
        self._cookie = f"capstan-board-{hashlib.sha256(token.encode()).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "uvicorn is told to take nothing else"
        request = Request(scope)
        by_address = self._is_token(request.query_params.get("token"))

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                if by_address and not refusal:
                    headers.append("Set-Cookie", f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        refusal = self._refusal(request, by_address=by_address)
        app = PlainTextResponse(refusal, 403) if refusal else self._app
        await app(scope, receive, guarded)

    def _refusal(self, request: Request, *, by_address: bool) -> str:
        """Return why the request is refused, or nothing."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not _HOSTS.fullmatch(host):
            return "The board answers at 127.0.0.1 and localhost only."
        if origin is not None and origin != f"{request.url.scheme}://{host}":
            return "The board answers its own pages only, and this request comes from another origin."
        elsewhere = request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if elsewhere and request.headers.get("sec-fetch-mode") != "navigate":
            return "The board answers its own pages only, and this request comes from another site."
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        by_header = scheme.lower() in ("token", "bearer") and self._is_token(given)
        if by_address or by_header or self._is_token(request.cookies.get(self._cookie)):
            return ""
        return "The token is missing or wrong. Open the address that `capstan board` has printed, with its token."

    def _is_token(self, given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), self._token.encode())


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
