"""A causal model over packed rows: documents of one row never see each other."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.attention import Attention
from trainer.model.front import Front, part_of_row
from trainer.model.head import LossHead
from trainer.model.micro_batch import MicroBatch, ModelInput
from trainer.model.parts import body
from trainer.model.rows.row import Peers, lengths_known, total
from trainer.model.towers import Lender, Lent


@dataclass(frozen=True)
class PackedModel:
    """`model` with the chosen attention kernel. It reserves `reserved` positions before each document, and shares rows
    in parts with `peers`. Rows are padded by the token `padding`. If the model cannot keep documents separate
    (`isolates`), a row is one document, and padding follows it, which it does not see. `front` has the tower, for rows
    with pictures, and `lender` has what learns in it.
    """

    model: PreTrainedModel
    attention: Attention
    reserved: int = 0
    peers: Peers | None = None
    padding: int = 0
    isolates: bool = True
    front: Front | None = None
    lender: Lender | None = None

    @property
    def head(self) -> LossHead:
        head = self.model.get_output_embeddings()
        assert isinstance(head, LossHead)
        return head

    def hidden(self, row: ModelInput) -> Tensor:
        """Hidden states of a packed row before the output head, (1, T, H); only of this rank's part if it shares the
        row.
        """
        tokens = self._padded(row)
        told = row if self.isolates else MicroBatch.of_text(tokens).input.to(tokens.device)
        segments = told.segments
        with lengths_known(segments.lengths, self.peers if row.parts > 1 else None, segments.prefixes):
            return body(self.model)(
                **self._handed(tokens, row if row.seen else told),
                use_cache=False,
                **self.attention.arguments(told.cu_seqlens, told.max_seqlen),
            )[0]

    def _handed(self, tokens: Tensor, row: ModelInput) -> dict[str, Any]:
        """The row as the body takes it: tokens and their positions, or what the front makes of a row with pictures."""
        lent = self.lent()
        if not row.seen and lent is not None:
            states = lent.joined(self.model.get_input_embeddings()(tokens))
            return {"inputs_embeds": states, "position_ids": row.position_ids}
        if not row.seen:
            return {"input_ids": tokens, "position_ids": row.position_ids}
        assert self.front is not None, "the rows have pictures, and the base was loaded without the tower"
        assert not self.reserved
        assert not row.segments.prefixes
        if row.every is not None:  # a class looks at whole documents
            tokens = self._padded(replace(row, input_ids=row.every, first=0))

        def embed(ids: Tensor) -> Tensor:
            states = self.model.get_input_embeddings()(ids)
            return lent.joined(states) if lent else states

        handed = self.front.row(tokens, embed, row.segments.lengths, row.seen, lent, body(self.model))
        return handed if row.parts == 1 else part_of_row(handed, row.first, row.input_ids.shape[1])

    def lent(self) -> Lent | None:
        """Return what learns in the tower, for a pass, if anything does.

        All ranks call it, also those whose rows have no picture.
        """
        return None if self.lender is None else self.lender.lent()

    def _padded(self, row: ModelInput) -> Tensor:
        """The tokens of a row with this model's padding token, for which data has 0."""
        padding = row.segments.padding if self.padding else []
        if not padding:
            return row.input_ids
        tokens = row.input_ids.clone()
        for begin, end in padding:
            tokens[:, max(0, begin - row.first) : max(0, end - row.first)] = self.padding
        return tokens

    def total(self, mine: Tensor, row: ModelInput) -> Tensor:
        """The sum over the ranks that share the row; `mine` if no others do."""
        return mine if row.parts == 1 or self.peers is None else total(mine, self.peers)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of one unpacked row: (1, T) int64 -> (1, T, V)."""
        # Rows are made on the host, and reach a device through pinned memory.
        row = MicroBatch.of_text(nn.functional.pad(tokens.cpu(), (self.reserved, 0))).input.to(tokens.device)
        return self.head(self.hidden(row)[:, self.reserved :])
