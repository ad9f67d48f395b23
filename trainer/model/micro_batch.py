"""One packed row of a global step, as a rank gets it."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from trainer.model.divergence import Taught
from trainer.model.head import IGNORE
from trainer.processes.accelerator import onto

_NONE, _NO_FLAGS = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.bool)


class Place(Protocol):
    """The place of a bin in the order of the data; see `Position` in trainer/data/order/position.py."""

    @property
    def epoch(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def bin(self) -> int: ...
    @property
    def chapter(self) -> int: ...


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward pass: one packed row of T tokens, micro_batch times a bin's capacity.

    Attributes:
        input_ids: (1, T) int32.
        labels: (1, T) int32, already shifted: what each position must predict, `IGNORE` where that is nothing.
        position_ids: (1, T) int32, from 0 in each segment, or from the end of its prefix.
        cu_seqlens: (segments + 1,) int32, borders of the segments from 0 to T. A segment is a document, an answer of a
            pair, a labelled or a mismatched answer, or the padding at the end of a bin.
        max_seqlen: tokens of the longest segment.
        tokens: tokens of documents, without the padding and what is reserved.
        targets: labels that are not `IGNORE`.
        bins: the places of the bins in the row, without the empty ones.
        documents: their documents, in the order of the row; a pair counts as one.
        rejected: (pairs,) int32, the segments that are rejected answers; the segment before each is the chosen one.
        beginnings: (documents,) int32, the segments that documents begin with.
        desired: (documents,) bool, whether each is a labelled answer that is desired.
        mismatched: (mismatched,) int32, the segments that are mismatched answers; see trainer/data/render/labelled.py.
            Or, of words with
            tags, those with the tags' numbers; see trainer/data/render/numbered.py.
        survey: the figures that the losses of the step were found to need beforehand; see
            trainer/tuning/objective/objective.py.
        reference: (documents, answers) fp32, log-probabilities of their answers by a stored reference, in nats; None
            without one.
        taught: a stored teacher's word on each target, in the order of the labels; None without one.
        sampled: (targets, 2) fp32, of sampled answers each target's log p by the sampler, in nats, and its advantage;
            None without any.
        parts: the ranks that share the row, by slices of as many tokens each; see `cut`.
        first: the place in the row of the slice's first token.
        prefixes: the prefix that each segment goes on from, as answers do that share their prompt: the place of its
            first token in the row,
            and its tokens, 0 for none. Empty where no segment has one.
        padding: where padding begins and ends in the whole row, for each stretch of it.
        uncut: the whole row on the host, for a slice of one.
        host: the same row on the host, for a row that is on a device: reading it makes nobody wait for the device.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    tokens: int
    targets: int
    bins: tuple[Place, ...]
    documents: tuple[int, ...]
    rejected: torch.Tensor = _NONE
    beginnings: torch.Tensor = _NONE
    desired: torch.Tensor = _NO_FLAGS
    mismatched: torch.Tensor = _NONE
    survey: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    taught: Taught | None = None
    sampled: torch.Tensor | None = None
    parts: int = 1
    first: int = 0
    prefixes: tuple[tuple[int, int], ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    uncut: "MicroBatch | None" = None
    host: "MicroBatch | None" = None

    @classmethod
    def of_text(cls, tokens: torch.Tensor) -> "MicroBatch":
        """One text, `tokens` (1, T), as a row without targets."""
        length = tokens.shape[1]
        return cls(
            input_ids=tokens,
            labels=torch.full_like(tokens, IGNORE),
            position_ids=torch.arange(length)[None],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            max_seqlen=length,
            tokens=length,
            targets=0,
            bins=(),
            documents=(),
        )

    @cached_property
    def whole(self) -> "MicroBatch":
        """The row with all of its tokens, also for a rank that has a slice of them to compute."""
        return self if self.uncut is None else self.uncut.to(self.labels.device)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return tuple((self.host or self).cu_seqlens.diff().tolist())

    @cached_property
    def places(self) -> torch.Tensor:
        """(targets,) int64, the positions whose label is not `IGNORE`."""
        return onto(_places((self.host or self).labels), self.labels.device)

    def cut(self, part: int, parts: int) -> "MicroBatch":
        """The slice number `part` of a row on the host that `parts` ranks share: ids, labels and positions are of its
        tokens, `targets` and `places` of its labels, and segments and their borders of the whole row. The first one
        alone counts the row's tokens, bins and documents."""
        size = self.input_ids.shape[1] // parts
        assert size * parts == self.input_ids.shape[1]
        ids, labels, positions = (
            values[:, part * size : (part + 1) * size] for values in (self.input_ids, self.labels, self.position_ids)
        )
        counted: dict[str, Any] = {} if part == 0 else {"tokens": 0, "bins": (), "documents": ()}
        sliced = replace(
            self, input_ids=ids, labels=labels, position_ids=positions, parts=parts, first=part * size, uncut=self
        )
        before, targets = (int((values != IGNORE).sum()) for values in (self.labels[:, : part * size], labels))
        if self.taught is not None:
            counted["taught"] = self.taught.part(slice(before, before + targets))
        return replace(sliced, targets=targets, **counted)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same row on `device`, with int64 for what the model and the loss take; half the bytes travel."""
        return replace(
            self,
            input_ids=onto(self.input_ids, device).long(),
            labels=onto(self.labels, device).long(),
            position_ids=onto(self.position_ids, device).long(),
            cu_seqlens=onto(self.cu_seqlens, device),
            rejected=onto(self.rejected, device).long(),
            beginnings=onto(self.beginnings, device).long(),
            desired=onto(self.desired, device),
            mismatched=onto(self.mismatched, device).long(),
            survey=None if self.survey is None else self.survey.to(device),  # the device made it
            reference=None if self.reference is None else onto(self.reference, device),
            taught=None if self.taught is None else Taught(*(onto(values, device) for values in self.taught)),
            sampled=None if self.sampled is None else onto(self.sampled, device),
            host=self,
        )

    def part(self, segments: Literal["beginnings", "mismatched"]) -> "MicroBatch":
        """These of the row's segments alone, in rising order, each behind the prefix that it goes on from, and where
        ranks share the row perhaps padding behind them; this rank's slice of that. All that it has of the row where
        they are none, as a pass needs tokens. `max_seqlen` may be more than the longest."""
        row = self.uncut or self.host or self
        chosen: torch.Tensor = getattr(row, segments).long()
        if not len(chosen):
            return self
        begins, prefixes = row.cu_seqlens.tolist(), row.prefixes or ((0, 0),) * len(row.lengths)
        spans = [(prefixes[number], (begins[number], row.lengths[number])) for number in chosen.tolist()]
        places = torch.cat([torch.arange(begin, begin + size) for pair in spans for begin, size in pair])
        sizes = [sum(size for _, size in pair) for pair in spans]
        ids, labels, positions = (values[:, places] for values in (row.input_ids, row.labels, row.position_ids))
        if uneven := -len(places) % self.parts:  # ranks share a row by as many tokens each: a last segment of padding
            sizes.append(uneven)
            ids, labels = F.pad(ids, (0, uneven)), F.pad(labels, (0, uneven), value=IGNORE)
            positions = torch.cat([positions, torch.arange(uneven, dtype=positions.dtype)[None]], 1)
        part = MicroBatch(
            input_ids=ids,
            labels=labels,
            position_ids=positions,
            cu_seqlens=F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(row.cu_seqlens.dtype),
            max_seqlen=max(self.max_seqlen, *sizes),
            tokens=len(places),
            targets=int((labels != IGNORE).sum()),
            bins=(),
            documents=(),
            padding=((len(places), len(places) + uneven),) if uneven else (),
        )
        mine = part if self.parts == 1 else part.cut(self.first // self.labels.shape[1], self.parts)
        return mine.to(self.labels.device)


def _places(labels: torch.Tensor) -> torch.Tensor:
    return (labels[0] != IGNORE).nonzero()[:, 0]
