"""How often a view of a run looks again."""

from trainer.store.store import Store


def poll_seconds(folder: Store) -> float:
    """A bucket bills each listing; a folder does not."""
    return 0.5 if folder.uri.startswith(("file://", "memory://")) else 5.0
