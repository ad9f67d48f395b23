"""Values that several pieces of a weight need: made or read once, and kept while that is likely."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

from trainer.store.safetensors_index import TensorSource

Value = TypeVar("Value")


class LastMade(Generic[Value]):
    """The values that were asked for last. Threads that want the same one at the same time share the making of it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[Hashable, Future[Value]] = OrderedDict()

    def get(self, key: Hashable, most: int, make: Callable[[], Value]) -> Value:
        """The value `key`, made by the first thread that asks; `most` stay. Raises what `make` raises, every time."""
        with self._lock:
            future = self._kept.get(key)
            first = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
            while len(self._kept) > most:
                self._kept.popitem(last=False)
        if first:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
        return future.result()


class LastReads:
    """The last `most` ranges that were read. 32 are the scales of as many matrices, a few thousand numbers each: pieces
    of more are never in flight."""

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._kept = LastMade[bytearray]()

    def read(self, source: TensorSource, begin: int, end: int) -> bytearray:
        """The bytes of elements [begin, end), which the caller must not change. Raises what the store raises, every
        time.
        """
        key = (source.key, *source.byte_range(begin, end))
        return self._kept.get(key, self._most, lambda: source.read(begin, end))
