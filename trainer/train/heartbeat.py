"""Finds the rank that hangs, however the ranks were started: by Ray, torchrun or srun.

A rank says what it begins (`pulse("step", 12)`). A thread of its own tells that to rank 0, with a count of its own
turns; rank 0 judges by its own clock. Where one rank has begun less than the others, they wait for it: it is the one
that hangs. Inside a phase the collectives that it has begun are counted, which come in the same order on all:
DeepSpeed's too, and NCCL's, which a rank begins and goes on from until it reads a result. A thread that tells nothing
belongs to a process that is frozen, gone or cut off. Once rank 0 has found a rank to hang, every rank that can writes
its Python stacks to its log and ends, so that the group is started again.

What a rank tells is a signed line: JSON behind its HMAC-SHA256 under a secret that rank 0 made for this start and told
the others through the process group. A stranger who reaches the port without it is not listened to: a key-value server
such as torch's TCPStore would let them overwrite or delete what the ranks say, signed or not.
"""

import asyncio
import faulthandler
import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from trainer.config import Timeouts
from trainer.processes.between_machines import sign, verified
from trainer.processes.ranks import World, collectives_begun
from trainer.run.background import Every, Harmless, say

_LINE_BYTES = 2**20
_PATIENCE_SECONDS = 10.0
_STRANGERS = 256
"""So many connections may be open that have not sent a signed line yet; one more takes the place of the oldest."""


class Server:
    """Listens in a thread of its own, at one address of this machine. Whoever knows the secret gets what `answer` makes
    of their lines.
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
        except asyncio.CancelledError:
            pass  # the run is over; Python 3.11 prints a traceback for a connection that is cancelled
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


Phase = Literal["load", "data", "compile", "step", "save", "evaluate", "reference", "features"]
Pulse: TypeAlias = Callable[[Phase, int], None]

HUNG = 1
"""The exit code of a rank that ends because some rank hangs."""
_FAREWELL_SECONDS = 5.0


@dataclass(frozen=True)
class Beat:
    """The state of a rank when its thread looked: `begun` counts its phases, `collectives` those that it has begun over
    all phases, and `turns` the thread's own looks.
    """

    phase: Phase
    step: int
    begun: int
    turns: int
    collectives: int = 0

    @property
    def place(self) -> str:
        return f"{self.phase} of step {self.step}" if self.phase in ("data", "compile", "step") else self.phase


class Hang(NamedTuple):
    """Why the ranks end, and which of them hang."""

    reason: str
    ranks: list[int]


def limit(timeouts: Timeouts, phase: Phase) -> tuple[str, float]:
    """The setting that bounds `phase`, and its seconds."""
    name = phase if phase in ("load", "save") else "step"
    return f"timeouts.{name}", getattr(timeouts, name)


class Judge:
    """Rank 0's view of all ranks: when each last began something, last progressed and last published anything, in
    seconds of `clock`.
    """

    def __init__(self, timeouts: Timeouts, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeouts, self._clock = timeouts, clock
        self._last: dict[int, Beat] = {}
        self._moved: dict[int, float] = {}
        self._heard: dict[int, float] = {}
        self._went: dict[int, float] = {}

    def look(self, beats: Sequence[Beat]) -> Hang | None:
        """Take `beats` in rank order. Returns what hangs, once a rank is over the limit of its phase."""
        now = self._clock()
        for rank, beat in enumerate(beats):
            last = self._last.get(rank)
            # A rank whose data is still being compiled waits for no rank, and may take as long as that takes.
            if last is None or last.begun != beat.begun or beat.phase == "compile":
                self._moved[rank] = now
            if last is None or last.turns != beat.turns:
                self._heard[rank] = now
            if last is None or (last.begun, last.collectives) != (beat.begun, beat.collectives):
                self._went[rank] = now
            self._last[rank] = beat
        limits = [limit(self._timeouts, beat.phase) for beat in beats]
        silent = [rank for rank in self._last if now - self._heard[rank] > limits[rank][1]]
        if silent:
            return self._found(silent, limits, "no sign of life", "frozen, or cut off from the others")
        # Ranks that have begun more wait for those that have begun less, as long as these may take.
        fewest = min((beat.begun, beat.collectives) for beat in beats)
        behind = [rank for rank, beat in enumerate(beats) if (beat.begun, beat.collectives) == fewest]
        if not any(now - self._moved[rank] > limits[rank][1] for rank in behind):
            return None
        # Beats are taken at slightly different moments, so some rank always seems behind while collectives proceed.
        if all(now - self._went[rank] < limits[rank][1] / 2 for rank in behind):
            return self._found(
                list(range(len(beats))), limits, "no end", "collectives go on, so it is slow and not stuck"
            )
        if len(behind) == len(beats):
            return self._found(behind, limits, "no progress", "each waits for the others, or for what is outside")
        return self._found(behind, limits, "no progress", "the others wait for it")

    def _found(self, ranks: list[int], limits: list[tuple[str, float]], what: str, why: str) -> Hang:
        beat, (setting, seconds) = self._last[ranks[0]], limits[ranks[0]]
        many = len(ranks) > 1
        named = f"rank{'s' if many else ''} {', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''}"
        return Hang(
            f"{named} hang{'' if many else 's'} in {beat.place}: {what} for {seconds:.0f} s ({setting}); {why}", ranks
        )


class Heart:
    """This rank's pulse among the others'. Making it is collective; calling it costs a few assignments.

    `on_hang(hang, mine)` is called once before this process ends; `mine` says that this rank speaks for all.
    """

    def __init__(self, ranks: World, timeouts: Timeouts, on_hang: Callable[[Hang, bool], None]) -> None:
        self._ranks, self._timeouts, self._on_hang = ranks, timeouts, on_hang
        self._beat = Beat("load", 0, 0, 0)
        self._answered = time.monotonic()
        # Rank 0 hears a thousand ranks at a rate that costs it at most a few milliseconds a second.
        self._seconds = min(
            max(1.0, ranks.world_size / 200), *(limit(timeouts, phase)[1] / 5 for phase in get_args(Phase))
        )
        self._closed, self._ending = threading.Event(), threading.Lock()
        # On rank 0: each rank's last message, the rank that it found to hang, and which ranks know.
        self._beats = [self._beat] * ranks.world_size
        self._hang: Hang | None = None
        self._told: set[int] = set()
        self._judge = Judge(timeouts) if ranks.rank == 0 else None
        self._server, self._line = _connect(ranks, self._hear)
        turn = self._turn_of_judge if ranks.rank == 0 else self._turn_of_other
        turns = itertools.count(1)
        self._threads = (
            Every(self._seconds, lambda: turn(next(turns)), "the heartbeat's pulse"),
            Every(self._seconds, self._watch, "the heartbeat's watch"),
        )

    def __call__(self, phase: Phase, step: int = 0) -> None:
        """Record that this rank begins `phase`, for the update that makes `step`. "compile" is a part of "data" that
        not every rank has.
        """
        inside = phase == "compile" or (self._beat.phase == "compile" and phase == "data")
        self._beat = Beat(phase, step, self._beat.begun + (not inside), self._beat.turns)

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.stop(wait=False)
        if self._server is not None:
            self._server.close()

    def let_last_words(self) -> None:
        """Wait for the end of this process if a thread of this object is about to end it."""
        with self._ending:
            pass

    def _now(self, turns: int) -> Beat:
        return replace(self._beat, turns=turns, collectives=collectives_begun())

    def _hear(self, told: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's answer to another rank; called in the server's thread."""
        rank, beat = told["rank"], Beat(**told["beat"])
        if beat.turns > self._beats[rank].turns:  # else it is an old line, sent again by somebody who overheard it
            self._beats[rank] = beat
        if told["knows"]:
            self._told.add(rank)
        return {"turns": beat.turns, "hang": self._hang}

    def _turn_of_judge(self, turns: int) -> None:
        assert self._judge is not None
        self._beats[0] = self._now(turns)
        self._answered = time.monotonic()
        if hang := self._judge.look(self._beats):
            self._pronounce(hang)

    def _turn_of_other(self, turns: int) -> None:
        """Tell rank 0, and end when it says that some rank hangs. If it does not answer, `_watch` decides."""
        line = self._line
        assert line is not None
        told = {"rank": self._ranks.rank, "beat": asdict(self._now(turns)), "knows": False}
        with suppress(OSError):
            answer = line.ask(told)
            if answer["turns"] != turns:
                return
            self._answered = time.monotonic()
            if answer["hang"]:
                self._end(Hang(*answer["hang"]), mine=False, tell=lambda: line.ask({**told, "knows": True}))

    def _watch(self) -> None:
        """End if rank 0 has not answered for longer than this rank's phase may take."""
        setting, seconds = limit(self._timeouts, self._beat.phase)
        if time.monotonic() - self._answered > seconds:
            reason = (
                f"rank 0 hangs: no answer to the others for {seconds:.0f} s ({setting}); frozen, gone, or cut off "
                f"(rank {self._ranks.rank} was in {self._beat.place})"
            )
            self._end(Hang(reason, [0]), mine=self._ranks.rank == 1)

    def _pronounce(self, hang: Hang) -> None:
        """On rank 0: tell the others, wait until those that can hear it have heard it, and end too."""

        def wait() -> None:
            deadline = time.monotonic() + _FAREWELL_SECONDS + self._seconds
            while len(self._told) < self._ranks.world_size - 1 and time.monotonic() < deadline:
                time.sleep(0.05)

        self._end(hang, mine=True, tell=wait)

    def _end(self, hang: Hang, *, mine: bool, tell: Callable[[], None] = lambda: None) -> None:
        """Write stacks to the log and last words to the run's folder, `tell`, and end. A second thread waits for the
        first.
        """
        with self._ending:
            if self._closed.is_set():
                return  # the run has just ended by itself
            self._hang = hang  # rank 0's server tells it
            say(f"{hang.reason}. The Python stacks of this rank:")
            Harmless("writing the stacks")(lambda: faulthandler.dump_traceback(file=2, all_threads=True))
            Harmless("leaving last words")(lambda: self._on_hang(hang, mine))
            Harmless("telling the other ranks")(tell)
            os._exit(HUNG)


def _connect(ranks: World, hear: Callable[[Any], Any]) -> tuple[Server | None, Line | None]:
    """Rank 0's server, at the address by which the others reach it, and the others' lines to it. Collective."""
    secret: bytes = ranks.broadcast(secrets.token_bytes(32) if ranks.rank == 0 else None)
    name = ranks.broadcast(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    # A machine may know itself by an address of its own only, such as 127.0.1.1, so the last rank's answer counts.
    host: str = ranks.gather_objects(_resolved(name))[-1]
    server = Server(host, secret, hear) if ranks.rank == 0 and ranks.world_size > 1 else None
    port: int = ranks.broadcast(server.port if server else None)
    return server, Line(host, port, secret) if ranks.rank else None


def _resolved(name: str) -> str:
    with suppress(OSError):
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    return name


def silent_pulse(phase: Phase, step: int = 0) -> None:
    """A pulse that nobody listens to."""
