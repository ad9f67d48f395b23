"""Caches values that several pieces of a weight need, so that they are made or read only once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

from trainer.store.safetensors_index import TensorSource

Value = TypeVar("Value")


class LastMade(Generic[Value]):
    """A cache of the values that were asked for last. Threads that need the same value at once make it only once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[Hashable, Future[Value]] = OrderedDict()

    def get(self, key: Hashable, most: int, make: Callable[[], Value]) -> Value:
        """The value `key`, made by the first thread that asks. Keeps `most` values. Raises the errors of `make`."""
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
    """A cache of the last `most` ranges that were read.

    32 ranges hold the scales of as many matrices, a few thousand numbers each. Pieces of more matrices are never in
    flight."""

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._kept = LastMade[bytearray]()

    def read(self, source: TensorSource, begin: int, end: int) -> bytearray:
        """The bytes of elements [begin, end), which the caller must not change. Raises the store's errors."""
        key = (source.key, *source.byte_range(begin, end))
        return self._kept.get(key, self._most, lambda: source.read(begin, end))
