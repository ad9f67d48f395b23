"""Stored tensors, or parts of them, that several pieces of a weight need: read once, and kept while that is likely."""

from collections import OrderedDict
from concurrent.futures import Future
from threading import Lock

from trainer.safetensors_index import TensorSource


class LastReads:
    """The last `most` ranges that were read. Threads that want the same range at the same time share one read of it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int, int], Future[bytearray]] = OrderedDict()

    def read(self, source: TensorSource, begin: int, end: int) -> bytearray:
        """The bytes of elements [begin, end), which the caller must not change. Raises what the store raises, every time."""
        key = (source.key, *source.byte_range(begin, end))
        with self._lock:
            future = self._kept.get(key)
            first = future is None
            if future is None:
                future = self._kept[key] = Future()
            self._kept.move_to_end(key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        if first:
            try:
                future.set_result(source.read(begin, end))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
        return future.result()
