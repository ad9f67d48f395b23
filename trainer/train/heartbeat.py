"""Finds the rank that hangs, whoever started the ranks: Ray, torchrun or srun.

A rank says what it begins (`pulse("step", 12)`). A thread of its own publishes that, with a count of its own turns, in a
key-value server beside rank 0; rank 0 judges by its own clock. Where one rank has begun less than the others, they wait for
it: it is the one that hangs. A thread that publishes nothing belongs to a process that is frozen, gone or cut off. Once a
verdict is out, every rank that can writes its Python stacks to its log and ends, so that the group is started again.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Literal, NamedTuple, TypeAlias

from torch.distributed import DistError, TCPStore, distributed_c10d  # pyright: ignore[reportPrivateImportUsage]

from trainer import ranks as ranks_module
from trainer.config import Timeouts
from trainer.ranks import Ranks

Phase = Literal["load", "data", "compile", "step", "save", "evaluate"]
Pulse: TypeAlias = Callable[[Phase, int], None]

HUNG = 1
"""The exit code of a rank that ends because of a verdict."""
_FAREWELL_SECONDS = 5.0
_VERDICT, _HEARD = "verdict", "heard"
_EXCHANGES = {distributed_c10d.__file__, ranks_module.__file__}


@dataclass(frozen=True)
class Beat:
    """What a rank was at when its thread looked: `begun` counts its phases, `turns` the thread's own looks, and `waits` is
    whether it was inside an exchange with the other ranks."""

    phase: Phase
    step: int
    begun: int
    turns: int
    waits: bool = False

    @property
    def place(self) -> str:
        return f"{self.phase} of step {self.step}" if self.phase in ("data", "compile", "step") else self.phase


class Verdict(NamedTuple):
    """Why the ranks end, and which of them are to blame."""

    reason: str
    ranks: list[int]


def limit(timeouts: Timeouts, phase: Phase) -> tuple[str, float]:
    """The setting that bounds `phase`, and its seconds."""
    name = phase if phase in ("load", "save") else "step"
    return f"timeouts.{name}", getattr(timeouts, name)


class Judge:
    """Rank 0's view of all: when each rank last began something and last published anything, in seconds of `clock`."""

    def __init__(self, timeouts: Timeouts, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeouts, self._clock = timeouts, clock
        self._last: dict[int, Beat] = {}
        self._moved: dict[int, float] = {}
        self._heard: dict[int, float] = {}

    def look(self, beats: Sequence[Beat]) -> Verdict | None:
        """`beats` in rank order; a verdict once a rank is over the limit of its phase."""
        now = self._clock()
        for rank, beat in enumerate(beats):
            last = self._last.get(rank)
            # A rank whose data is still compiled waits for no rank, and for as long as that takes.
            if last is None or last.begun != beat.begun or beat.phase == "compile":
                self._moved[rank] = now
            if last is None or last.turns != beat.turns:
                self._heard[rank] = now
            self._last[rank] = beat
        limits = [limit(self._timeouts, beat.phase) for beat in beats]
        silent = [rank for rank in self._last if now - self._heard[rank] > limits[rank][1]]
        if silent:
            return self._verdict(silent, limits, "no sign of life", "frozen, or cut off from the others")
        # Ranks that have begun more wait for those that have begun less, for as long as these may take.
        fewest = min(beat.begun for beat in beats)
        behind = [rank for rank, beat in enumerate(beats) if beat.begun == fewest]
        behind = [rank for rank in behind if not beats[rank].waits] or behind
        if not any(now - self._moved[rank] > limits[rank][1] for rank in behind):
            return None
        if len(behind) == len(beats):
            return self._verdict(behind, limits, "no progress", "each waits for the others, or for what is outside")
        return self._verdict(behind, limits, "no progress", "the others wait for it")

    def _verdict(self, ranks: list[int], limits: list[tuple[str, float]], what: str, why: str) -> Verdict:
        beat, (setting, seconds) = self._last[ranks[0]], limits[ranks[0]]
        many = len(ranks) > 1
        named = f"rank{'s' if many else ''} {', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''}"
        return Verdict(
            f"{named} hang{'' if many else 's'} in {beat.place}: {what} for {seconds:.0f} s ({setting}); {why}", ranks
        )


class Heart:
    """This rank's pulse among the others'. Collective to make; calling it costs a few assignments.

    `on_verdict(verdict, mine)` is called once before this process ends; `mine` says that this rank speaks for all.
    """

    def __init__(self, ranks: Ranks, timeouts: Timeouts, on_verdict: Callable[[Verdict, bool], None]) -> None:
        self._ranks, self._timeouts, self._on_verdict = ranks, timeouts, on_verdict
        self._beat = Beat("load", 0, 0, 0)
        self._answered = time.monotonic()
        self._seconds = min(1.0, *(seconds / 5 for seconds in timeouts.model_dump().values()))
        self._main = threading.get_ident()
        self._closed, self._ending = threading.Event(), threading.Lock()
        self._judge = Judge(timeouts) if ranks.rank == 0 else None
        self._server = _serve(ranks)
        for work in (self._publish, self._watch):
            threading.Thread(target=work, name=f"heart{work.__name__}", daemon=True).start()

    def __call__(self, phase: Phase, step: int = 0) -> None:
        """This rank begins `phase`, for the update that makes `step`. "compile" is a part of "data" that not every rank has."""
        inside = phase == "compile" or (self._beat.phase == "compile" and phase == "data")
        self._beat = Beat(phase, step, self._beat.begun + (not inside), self._beat.turns)

    def close(self) -> None:
        self._closed.set()

    def _publish(self) -> None:
        """Tell the server, listen for a verdict, and on rank 0 judge. Ends with the connection: `_watch` sees to the rest."""
        turns = 0
        with suppress(DistError):
            while not self._closed.wait(self._seconds):
                turns += 1
                beat = self._beat
                now = Beat(beat.phase, beat.step, beat.begun, turns, _in_an_exchange(self._main))
                self._server.set(f"{self._ranks.rank}", json.dumps(asdict(now)))
                if self._server.check([_VERDICT]):
                    verdict = Verdict(*json.loads(self._server.get(_VERDICT)))
                    self._say(verdict, mine=False)
                    self._server.add(_HEARD, 1)
                    os._exit(HUNG)
                self._answered = time.monotonic()
                if self._judge is not None and (verdict := self._judge.look(self._everyones())):
                    self._pronounce(verdict)

    def _watch(self) -> None:
        """End when rank 0, where the server is, has not answered for longer than this rank's phase may take."""
        while not self._closed.wait(self._seconds):
            setting, seconds = limit(self._timeouts, self._beat.phase)
            if time.monotonic() - self._answered > seconds:
                reason = (
                    f"rank 0 hangs: no answer to the others for {seconds:.0f} s ({setting}); frozen, gone, or cut off "
                    f"(rank {self._ranks.rank} was in {self._beat.place})"
                )
                self._say(Verdict(reason, [0]), mine=self._ranks.rank == 1)
                os._exit(HUNG)

    def _everyones(self) -> list[Beat]:
        keys = [f"{rank}" for rank in range(self._ranks.world_size)]
        return [Beat(**json.loads(value)) for value in self._server.multi_get(keys)]

    def _pronounce(self, verdict: Verdict) -> None:
        """Rank 0 tells the others, waits until those that can have heard it, and ends too."""
        self._server.set(_VERDICT, json.dumps(verdict))
        self._say(verdict, mine=True)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._server.add(_HEARD, 0) < self._ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        os._exit(HUNG)

    def _say(self, verdict: Verdict, *, mine: bool) -> None:
        """Stacks to the log, last words to the run's folder. The thread that comes second waits here for the end."""
        self._ending.acquire()
        if self._closed.is_set():
            raise SystemExit  # of this thread: the run has just ended by itself
        print(f"{verdict.reason}. The Python stacks of this rank:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._on_verdict(verdict, mine)


def _serve(ranks: Ranks) -> TCPStore:
    """The key-value server at rank 0, with everyone's first beat in it. Collective."""
    timeout = timedelta(seconds=60)
    host = ranks.broadcast(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if ranks.rank == 0 else None
    port: int = ranks.broadcast(server.port if server else None)
    server = server or TCPStore(host, port, is_master=False, timeout=timeout)
    server.set(f"{ranks.rank}", json.dumps(asdict(Beat("load", 0, 0, 0))))
    ranks.sum(0)  # all are in it before anyone reads
    return server


def _in_an_exchange(thread: int) -> bool:
    """Whether `thread` waits for other ranks: it is in a collective, or reads the result of one from its device."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename in _EXCHANGES:
            return True
        frame = frame.f_back
    return False


def silent_pulse(phase: Phase, step: int = 0) -> None:
    """A pulse that nobody listens to."""
