"""A store whose n-th operation goes wrong."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

from trainer.errors import StorageError
from trainer.store.store import Buffer, Entry, Store

# fail: it is not done. lost: it is done, but the answer never comes. stall: nothing comes for long, then it fails.
# kill: the process dies before it, or, writing an object, in the middle of it.
HOW = ("fail", "lost", "stall", "kill")


class Fault:
    """Strikes at one operation of all the stores that share it, counted from 1; at 0 it only counts."""

    def __init__(self, at: int = 0, how: str = "fail", stalled: Callable[[], None] = lambda: None) -> None:
        """`stalled` is called while the operation stalls; that it returns is the time-out."""
        assert how in HOW
        self.at, self.how, self._stalled = at, how, stalled
        self.operations: list[str] = []
        self._lock = threading.Lock()

    def around(self, name: str, operation: Callable[[], Any]) -> Any:
        with self._lock:
            self.operations.append(name)
            strikes = len(self.operations) == self.at
        if not strikes:
            return operation()
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "stall":
            self._stalled()
        if self.how == "lost":
            operation()
        raise StorageError(f"the store did not answer to {name}.")

    @property
    def kills_next_write(self) -> bool:
        return self.how == "kill" and len(self.operations) + 1 == self.at


class FaultyStore(Store):
    """`store`, but every operation meets `fault` first."""

    def __init__(self, store: Store, fault: Fault) -> None:
        super().__init__(store.uri, store._backend, store._prefix)
        self._fault = fault

    def sub(self, name: str) -> Store:
        return FaultyStore(super().sub(name), self._fault)

    def get(self, key: str) -> bytes:
        return self._fault.around(f"get {key}", lambda: Store.get(self, key))

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        return self._fault.around(f"get_range {key}", lambda: Store.get_range(self, key, start, end))

    def get_ranges(self, key: str, starts: list[int], ends: list[int]) -> list[Buffer]:
        return self._fault.around(f"get_ranges {key}", lambda: Store.get_ranges(self, key, starts, ends))

    def put_chunks(self, key: str, chunks: Iterable[Buffer], size: int) -> None:
        def torn() -> Iterable[Buffer]:
            """More than one part and less than all: the upload is under way when the process dies."""
            for chunk in chunks:
                yield chunk
                os.kill(os.getpid(), signal.SIGKILL)

        if self._fault.kills_next_write:
            Store.put_chunks(self, key, torn(), size)
        self._fault.around(f"put {key}", lambda: Store.put_chunks(self, key, chunks, size))

    def create(self, key: str, data: bytes) -> None:
        self._fault.around(f"create {key}", lambda: Store.create(self, key, data))

    def head(self, key: str) -> Entry:
        return self._fault.around(f"head {key}", lambda: Store.head(self, key))

    def children(self, prefix: str = "") -> tuple[list[str], list[Entry]]:
        return self._fault.around(f"list {prefix}", lambda: Store.children(self, prefix))

    def list(self, prefix: str = "") -> list[Entry]:
        return self._fault.around(f"list {prefix}", lambda: Store.list(self, prefix))

    def delete(self, key: str) -> None:
        self._fault.around(f"delete {key}", lambda: Store.delete(self, key))
