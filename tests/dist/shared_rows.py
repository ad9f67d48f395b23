"""What ranks that share rows exchange, and what steps over rows cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import process_time

from torch import Tensor

from tests.dist.assembled import assemble_run
from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.model.rows.row import RankPeers
from trainer.train.loop import train


@contextmanager
def received() -> Iterator[list[int]]:
    """The bytes that this rank receives of its peers inside, exchange by exchange."""
    found, swap = list[int](), RankPeers.swap

    def counted(self: RankPeers, pieces: Tensor) -> Tensor:
        found.append(pieces.nbytes * (self.size - 1) // self.size)
        return swap(self, pieces)

    RankPeers.swap = counted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        RankPeers.swap = swap  # type: ignore[method-assign]


def exchanged(config_text: str, fingerprint: str) -> int:
    """Bytes that this rank receives of its peers in the first step."""
    with received() as found:  # the engine keeps its peers' swap from the beginning on
        here = assemble_run(parse_config(config_text), fingerprint)
        found.clear()
        next(train(here.training(), 0, Position()))
    return sum(found)


def pair_costs(config_text: str, fingerprint: str) -> tuple[float, float]:
    """The tokens of a pair of answers, and the processor's seconds for it, in the steps behind the first."""
    here = assemble_run(parse_config(config_text), fingerprint)
    found = list[tuple[int, int, float]]()
    for record in train(here.training(), 0, Position()):
        if "tokens" in record:
            found.append((record["tokens"], record[here.resolved.objective.unit], process_time()))
    tokens, pairs = (sum(step[which] for step in found[1:]) for which in (0, 1))
    return tokens / pairs, (found[-1][2] - found[0][2]) / pairs
