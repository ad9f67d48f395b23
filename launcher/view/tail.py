"""Following an object that grows, such as a log or a file of metrics, by looking at it again and again."""

from trainer.store import Store


class Appended:
    """Reads of a growing object only what was appended since the last look."""

    def __init__(self, run: Store, key: str) -> None:
        self._run, self._key = run, key
        self._offset = 0

    def read(self, size: int) -> bytes:
        """Up to `size`, the object's length in bytes as of a listing. A shorter one than before holds nothing new."""
        data = bytes(self._run.get_range(self._key, self._offset, max(size, self._offset)))
        self._offset += len(data)
        return data


def poll_seconds(run: Store) -> float:
    """A bucket bills each listing; a folder does not."""
    return 0.5 if run.uri.startswith(("file://", "memory://")) else 5.0
