"""What ranks that share rows exchange."""

from torch import Tensor

from tests.dist.assembled import assemble_run
from trainer.config import parse_config
from trainer.data.order.position import Position
from trainer.model.sequence_parallel.exchange import RankPeers
from trainer.train.loop import train


def exchanged(config_text: str, fingerprint: str) -> int:
    """Bytes that this rank receives of its peers in the first step."""
    received, swap = [0], RankPeers.swap

    def counted(self: RankPeers, pieces: Tensor) -> Tensor:
        received[0] += pieces.nbytes * (self.size - 1) // self.size
        return swap(self, pieces)

    RankPeers.swap = counted  # type: ignore[method-assign]
    here = assemble_run(parse_config(config_text), fingerprint)
    next(train(here.training(), 0, Position()))
    return received[0]
