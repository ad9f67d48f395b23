"""The lines of all runs of the stores, for the first page: as `capstan ls` reads them, and kept while they are true."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace

from launcher.view.listing import RunLine, loss_curve, run_line
from launcher.view.runs import NAME, is_there, poll_seconds
from launcher.view.status import ENDED
from trainer.config.reading import read_yaml
from trainer.errors import CapstanError, StorageError
from trainer.run import layout
from trainer.run.folder import name_of
from trainer.store.store import Store

_AT_A_TIME = 32
_EDGE_BYTES = 2**12
_PLACES, _MOST_CURVES = 24, 2000
_ENDED_SECONDS = 60.0
"""A run that has ended is read again after so long, as somebody may have resumed it."""


@dataclass(frozen=True, eq=False)
class Line:
    """A run's line and the place of its store among the stores. `line` is None until the run has been read.

    `read` and `heard` are in seconds since 1970. `price` is track.price_per_gpu_hour.
    """

    place: int
    name: str
    line: RunLine | None = None
    read: float = 0.0
    heard: float = 0.0
    price: float | None = None

    @property
    def key(self) -> tuple[int, str, int]:
        """The key of the run's curve. One step more does not change it, because nobody would see the difference."""
        step, total = (self.line.step, self.line.total_steps) if self.line else (0, None)
        return self.place, self.name, step // max(1, (total or step) // 40)

    @property
    def words(self) -> str:
        """The words that a filter looks into."""
        return f"{self.name} {self.line.state} {self.line.reason}".lower() if self.line else self.name.lower()

    @property
    def cost(self) -> float | None:
        hours = self.line.gpu_hours if self.line else None
        return None if hours is None or self.price is None else hours * self.price

    @property
    def whole_cost(self) -> float | None:
        """The cost of the run at its last step, if it goes on as it has so far."""
        if self.cost is None or not self.line or self.line.eta_seconds is None or not self.line.step:
            return None
        return self.cost * (self.line.total_steps or self.line.step) / self.line.step


class Listing:
    """Reads the runs of `stores`, many at a time. Folders that are no runs are passed over."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = stores
        self._pool = ThreadPoolExecutor(_AT_A_TIME, "listing")
        self._known: dict[tuple[int, str], Line | None] = {}
        self._looked: dict[tuple[int, str], float] = {}
        self._reading: dict[tuple[int, str], Future[None]] = {}
        self._curves: dict[tuple[int, str, int], list[tuple[int, float]]] = {}
        self._lock = threading.Lock()

    def read(self, patience: float) -> tuple[list[Line], int]:
        """Return the lines, those with the newest signs of life first, and how many runs have not been read yet.

        After `patience` seconds it returns what is known. What is being read comes with a later call.

        Raises:
            StorageError: a store cannot be listed.
        """
        began = time.monotonic()
        names = {
            (place, name)
            for place, names in enumerate(self._pool.map(lambda store: store.children()[0], self.stores))
            for name in names
            if NAME.fullmatch(name)
        }
        with self._lock:
            for key in self._known.keys() - names:
                del self._known[key]
            for key in sorted(names):
                if key not in self._reading and self._is_old(key):
                    self._reading[key] = self._pool.submit(self._read, key)
            reading = list(self._reading.values())
        wait(reading, timeout=max(0.0, patience - (time.monotonic() - began)))
        with self._lock:
            known = dict(self._known)
        unread = names - known.keys()
        lines = [line for line in known.values() if line] + [Line(*key) for key in unread]
        return sorted(lines, key=lambda line: (-line.heard, line.place, line.name)), len(unread)

    def with_curves(self, lines: Sequence[Line], patience: float) -> list[Line]:
        """Return `lines` with curves over all steps of their newest starts, as far as they can be read in this time."""
        began, wanted = time.monotonic(), [line for line in lines if line.line and line.line.step]
        reading = {line: self._pool.submit(self._curve, line) for line in wanted if line.key not in self._curves}
        wait(reading.values(), timeout=max(0.0, patience - (time.monotonic() - began)))
        curves = {line.key: curve for line in wanted if (curve := self._curves.get(line.key))}
        return [
            replace(line, line=replace(line.line, curve=curves[line.key])) if line.line and line.key in curves else line
            for line in lines
        ]

    def _curve(self, line: Line) -> None:
        with suppress(StorageError):
            curve = loss_curve(self.stores[line.place].sub(line.name), _PLACES)
            if len(self._curves) >= _MOST_CURVES:
                self._curves.clear()
            self._curves[line.key] = curve

    def forget(self, folder: Store) -> None:
        """Read the run in `folder` anew at the next look, as something was done with it."""
        with self._lock:
            for place, store in enumerate(self.stores):
                if folder.uri == f"{store.uri}/{name_of(folder)}":
                    self._looked.pop((place, name_of(folder)), None)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _is_old(self, key: tuple[int, str]) -> bool:
        line = self._known.get(key)
        ended = line is None or line.line is None or line.line.state in (*ENDED, "over")
        seconds = _ENDED_SECONDS if ended else 2 * poll_seconds(self.stores[key[0]])
        return time.monotonic() - self._looked.get(key, -seconds) >= seconds

    def _read(self, key: tuple[int, str]) -> None:
        place, name = key
        folder, line = self.stores[place].sub(name), None
        try:
            if is_there(folder):
                found, now = run_line(folder, name, time.time, _EDGE_BYTES), time.time()
                price = _price(folder) if found.gpu_hours else None
                line = Line(place, name, found, now, now - (found.age_seconds or 0.0), price)
        except StorageError as error:
            line = Line(place, name, RunLine(name, "unreadable", reason=str(error)), time.time())
        finally:
            with self._lock:
                self._known[key], self._looked[key] = line, time.monotonic()
                self._reading.pop(key, None)


def _price(folder: Store) -> float | None:
    """Return the price of a GPU hour by the run's settings; None if they have none or are damaged."""
    with suppress(CapstanError, AttributeError):
        price = read_yaml(folder.get(layout.CONFIG), layout.CONFIG)["track"]["price_per_gpu_hour"]
        return price if isinstance(price, int | float) and not isinstance(price, bool) else None
    return None
