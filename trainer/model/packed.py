"""A causal model over packed rows: documents of one row never see each other."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.attention import Attention
from trainer.model.head import LossHead
from trainer.model.micro_batch import MicroBatch, PartOfRow
from trainer.model.parts import body
from trainer.model.rows.peers import Peers, total
from trainer.model.rows.row import Prefixes, lengths_known


@dataclass(frozen=True)
class TextRow:
    """One text as a packed row."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    parts: int = 1
    first: int = 0
    prefixes: Prefixes = ()

    @classmethod
    def of(cls, tokens: Tensor) -> "TextRow":
        """`tokens` (1, T) int64."""
        length = tokens.shape[1]
        return cls(tokens, torch.arange(length)[None], torch.tensor([0, length], dtype=torch.int32))

    @property
    def max_seqlen(self) -> int:
        return self.input_ids.shape[1]

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.max_seqlen,)

    def to(self, device: torch.device) -> "TextRow":
        return TextRow(self.input_ids.to(device), self.position_ids.to(device), self.cu_seqlens.to(device))


PackedRow = MicroBatch | PartOfRow | TextRow


@dataclass(frozen=True)
class PackedModel:
    """`model` with the attention kernel that was chosen for it. It wants `reserved` positions before each document. Rows in parts are shared
    with `peers`."""

    model: PreTrainedModel
    attention: Attention
    reserved: int = 0
    peers: Peers | None = None

    @property
    def head(self) -> LossHead:
        head = self.model.get_output_embeddings()
        assert isinstance(head, LossHead)
        return head

    def hidden(self, row: PackedRow) -> Tensor:
        """Hidden states of a packed row before the output head, (1, T, H); of this rank's part, where it shares the row."""
        with lengths_known(row.lengths, self.peers if row.parts > 1 else None, row.prefixes):
            return body(self.model)(
                input_ids=row.input_ids,
                position_ids=row.position_ids,
                use_cache=False,
                **self.attention.arguments(row.cu_seqlens, row.max_seqlen),
            )[0]

    def total(self, mine: Tensor, row: PackedRow) -> Tensor:
        """The sum of what the ranks that share the row have of it; `mine` where no others do."""
        return mine if row.parts == 1 or self.peers is None else total(mine, self.peers)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of one unpacked row: (1, T) int64 -> (1, T, V)."""
        row = TextRow.of(nn.functional.pad(tokens, (self.reserved, 0))).to(tokens.device)
        return self.head(self.hidden(row)[:, self.reserved :])
