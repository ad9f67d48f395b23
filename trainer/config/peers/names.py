"""Our names for other tools' settings, for people who write those names into a configuration of ours."""

from trainer.config.peers.table import Needless, Refused, Row, To, Together, Unsupported, read_peer

_NAMES = "axolotl trl llamafactory accelerate llamafactory-v1 ms-swift ms-swift-megatron automodel"
PEERS = tuple(map(read_peer, _NAMES.split()))


SETTINGS_HERE, NONE_HERE = (To, Together), (Needless, Unsupported, Refused)


def said_of(key: str, kinds: tuple[type[Row], ...]) -> str | None:
    """Return a sentence about a key of a peer: what the setting is called here, or why there is none. `kinds` says
    which of both is wanted. None if no peer has such a key.
    """
    for peer in PEERS:
        row = peer.rows.get(key) or next(
            (row for name, row in peer.rows.items() if name.rpartition(".")[2] == key and isinstance(row, kinds)), None
        )
        if isinstance(row, kinds):
            return _sentence(row, peer.title)
    return None


def _sentence(row: Row, title: str) -> str:
    if isinstance(row, To | Together):
        return f"It is {'' if isinstance(row, To) else 'part of '}{row.setting} here."
    needed = "needs no setting here" if isinstance(row, Needless) else "has no counterpart here"
    return f"That of {title} {needed}: {row.why}"
