"""The wire of the heartbeat: a rank sends rank 0 a signed line now and then, and gets a signed line back.

A line is JSON behind its HMAC-SHA256 under a secret that rank 0 made for this start and told the others through the
process group. A stranger who reaches the port without it is not listened to: a key-value server such as torch's
TCPStore would let them overwrite or delete what the ranks say, signed or not.
"""

import asyncio
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

from trainer.run.background import say

_LINE_BYTES = 2**20
_PATIENCE_SECONDS = 10.0
_STRANGERS = 256
"""So many connections may be open that have not sent a signed line yet; one more takes the place of the oldest."""


def sign(secret: bytes, told: Any) -> bytes:
    """The signed line for `told`, which is plain JSON."""
    text = json.dumps(told).encode()
    return hmac.new(secret, text, hashlib.sha256).hexdigest().encode() + b" " + text + b"\n"


def verified(secret: bytes, line: bytes) -> Any:
    """The value that a line carries, or None if it is not signed with `secret`."""
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    expected = hmac.new(secret, text, hashlib.sha256).hexdigest().encode()
    return json.loads(text) if hmac.compare_digest(digest, expected) else None


class Server:
    """Answers, with `answer`, the lines of whoever knows the secret, in a thread of its own, at one address of this
    machine.
    """

    def __init__(self, host: str, secret: bytes, answer: Callable[[Any], Any]) -> None:
        self._secret, self._answer = secret, answer
        self._strangers = dict[asyncio.StreamWriter, None]()  # the oldest first
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listening = socket.create_server((host, 0), family=family, backlog=4096)
        except OSError as error:  # the ranks reach this machine by an address that it does not know itself
            say(f"the heartbeat listens at every address, as it cannot at {host}: {error.strerror}")
            self._listening = socket.create_server(("", 0), family=family, backlog=4096)
        self.port: int = self._listening.getsockname()[1]
        self._started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), name="heart-server", daemon=True).start()
        self._started.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        server = await asyncio.start_server(self._talk, sock=self._listening, limit=_LINE_BYTES)
        await self._over.wait()
        server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await self._first_line(reader, writer)
            while (told := verified(self._secret, line)) is not None:
                writer.write(sign(self._secret, self._answer(told)))
                await writer.drain()
                line = await reader.readline()
        except (OSError, ValueError, TimeoutError):
            pass  # a connection that ends, a line that is too long, or one that does not come
        finally:
            writer.close()

    async def _first_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        if len(self._strangers) >= _STRANGERS:  # a rank speaks at once, so it is not the one that is disconnected
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        self._strangers[writer] = None
        try:
            return await asyncio.wait_for(reader.readline(), _PATIENCE_SECONDS)
        finally:
            self._strangers.pop(writer, None)


class Line:
    """A rank's connection to the server, which is made again whenever it breaks."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self._address, self._secret = (host, port), secret
        self._connection: socket.socket | None = None

    def ask(self, told: Any) -> Any:
        """The server's answer to `told`. Raises `OSError` if it does not come, or is not signed."""
        if self._connection is None:
            self._connection = socket.create_connection(self._address, timeout=_PATIENCE_SECONDS)
        try:
            self._connection.sendall(sign(self._secret, told))
            line = bytearray()
            while not line.endswith(b"\n"):
                if len(line) > _LINE_BYTES or not (part := self._connection.recv(65536)):
                    raise ConnectionError("the heartbeat's server hung up")
                line += part
            answer = verified(self._secret, bytes(line))
            if answer is None:
                raise ConnectionError("the answer is not of the heartbeat's server")
            return answer
        except OSError:
            self._connection.close()
            self._connection = None
            raise
