"""Who may ask the board for anything: its token, one origin, and what its pages may load.

A page of the board shows texts of whoever may write to a store. They are escaped, and a page also runs no script and
loads nothing except the board's own files. Other web sites that the same browser has open cannot ask the board: they do
not know the token, their requests name another origin, and a name that they let lead to 127.0.0.1 is no name of ours.
"""

import hashlib
import re
import secrets

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
