"""What ranks that share rows exchange, and what steps over rows cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from torch import Tensor

from tests.dist.assembled import assemble_run
from trainer.config import parse_config
from trainer.data.order.position import Position
from trainer.model.rows.peers import RankPeers
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
    here = assemble_run(parse_config(config_text), fingerprint)
    with received() as found:
        next(train(here.training(), 0, Position()))
    return sum(found)


def step_costs(config_text: str, fingerprint: str) -> tuple[int, float]:
    """The tokens of a step, and the median of the seconds that steps take behind the first."""
    config = parse_config(config_text)
    here = assemble_run(config, fingerprint)
    records = [record for record in train(here.training(), 0, Position()) if "tokens" in record]
    return records[0]["tokens"], median(record["seconds"] for record in records[1:])
