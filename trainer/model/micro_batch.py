"""One packed row of a global step, as a rank gets it: what the model computes, and what the objective is told of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from trainer.model.head import IGNORE
from trainer.processes.accelerator import onto


class Role(IntEnum):
    """The part that a segment of a row has in its document."""

    DOCUMENT = 0
    """A whole document, or the first segment of one: the chosen answer of a pair, a labelled answer, a text."""
    REJECTED = 1
    """The rejected answer of the pair whose chosen one is the segment before."""
    MISMATCHED = 2
    """The mismatched answer behind a labelled one (trainer/data/render/answers.py), or the numbers of tags behind
    their words (trainer/data/render/numbered.py)."""
    ALTERNATIVE = 3
    """Another answer behind the prompt that its document begins with."""
    PADDING = 4
    """The end of a bin."""


@dataclass(frozen=True)
class Segments:
    """The segments of a whole row, end to end. Documents never see each other, and neither do the segments of one
    document.

    Attributes:
        lengths: tokens of each.
        roles: the role of each.
        prefixes: the prefix that each goes on from, as answers do that share their prompt: the place of its first token
            in the row, and its tokens, 0 for none. Empty where no segment has one.
    """

    lengths: tuple[int, ...]
    roles: tuple[Role, ...]
    prefixes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_documents(cls, lengths: "list[int] | tuple[int, ...]") -> "Segments":
        """Documents of these lengths."""
        return cls(tuple(lengths), (Role.DOCUMENT,) * len(lengths))

    @property
    def borders(self) -> list[int]:
        """(segments + 1,) where each begins in the row, and the row's end."""
        return [0, *accumulate(self.lengths)]

    @property
    def padding(self) -> list[tuple[int, int]]:
        """Where padding begins and ends in the row, for each stretch of it."""
        borders = self.borders
        return [(borders[number], borders[number + 1]) for number in self.of(Role.PADDING)]

    def of(self, role: Role) -> list[int]:
        """The numbers of the segments with this role."""
        return [number for number, own in enumerate(self.roles) if own == role]


@dataclass(frozen=True, eq=False)
class Seen:
    """The pictures of one document: the number of its `segment` in the row, and the `inputs` that the base's processor
    made for the class, without the ids. Pixels come first among them, and values for each token (1, n). Kept features
    may take the place of pixels (trainer/model/features.py). `key` names the pictures by their hashes and sizes. It is
    empty for a document without pictures, of whose tokens some classes must be told, too.
    """

    segment: int
    inputs: Mapping[str, torch.Tensor]
    key: str = ""

    def to(self, device: torch.device) -> "Seen":
        return replace(self, inputs={name: onto(value, device) for name, value in self.inputs.items()})


@dataclass(frozen=True, eq=False)
class ModelInput:
    """All that a model gets of a row of T tokens, micro_batch times a bin's capacity.

    Attributes:
        input_ids: (1, T) int32.
        position_ids: (1, T) int32, from 0 in each segment, or from the end of its prefix.
        segments: those of the whole row, also where this is a slice of it.
        cu_seqlens: (segments + 1,) int32, the borders of the segments, where the tokens are.
        max_seqlen: tokens of the longest segment, or more.
        parts: the ranks that share the row, by slices of as many tokens each; see `cut`.
        first: the place in the row of the slice's first token.
        seen: the documents that have pictures.
        every: the ids of the whole row, for a slice of a row with pictures.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    cu_seqlens: torch.Tensor
    max_seqlen: int
    parts: int = 1
    first: int = 0
    seen: tuple[Seen, ...] = ()
    every: torch.Tensor | None = None

    @classmethod
    def of(cls, input_ids: torch.Tensor, position_ids: torch.Tensor, segments: Segments) -> "ModelInput":
        """The whole row of these segments, on the host."""
        borders = torch.tensor(segments.borders, dtype=torch.int32)
        return cls(input_ids, position_ids, segments, borders, max(segments.lengths))

    @property
    def prefixes(self) -> tuple[tuple[int, int], ...]:
        return self.segments.prefixes or ((0, 0),) * len(self.segments.lengths)

    def cut(self, part: int, parts: int) -> "ModelInput":
        """The slice number `part` of a row that `parts` ranks share: the ids and positions of its tokens."""
        size = self.input_ids.shape[1] // parts
        assert size * parts == self.input_ids.shape[1]
        ids, positions = (values[:, part * size : (part + 1) * size] for values in (self.input_ids, self.position_ids))
        every = self.input_ids if self.seen else None
        return replace(self, input_ids=ids, position_ids=positions, parts=parts, first=part * size, every=every)

    def to(self, device: torch.device) -> "ModelInput":
        """The same row on `device`, with the int64 that models take; half the bytes travel."""
        return replace(
            self,
            input_ids=onto(self.input_ids, device).long(),
            position_ids=onto(self.position_ids, device).long(),
            cu_seqlens=onto(self.cu_seqlens, device),
            seen=tuple(one.to(device) for one in self.seen),
            every=None if self.every is None else onto(self.every, device).long(),
        )


class ColumnValues(NamedTuple):
    """A column of a row: `values` (n, ...) for each of its documents, of its targets, or of its tokens, in the order of
    the row.
    """

    per: Literal["document", "target", "token", "picture"]
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One packed row: the model's `input`, and what an objective is told of it.

    Attributes:
        labels: (1, T) int32, already shifted: what each position must predict, `IGNORE` where that is nothing.
        tokens: tokens of documents, without the padding and what is reserved.
        targets: labels that are not `IGNORE`.
        bins: the places of the bins in the row, each a `trainer.data.order.settings.Position`, without the empty ones.
        documents: their documents, in the order of the row; a pair counts as one.
        columns: what is known of documents, targets or tokens beside their ids, by name: the columns of the kind of
            rows (trainer/data/format/row_format.py), `reference` (documents, answers) fp32, the log-probabilities of
            their answers by a stored reference, in nats, `teacher_ids` and `teacher_log_p`, a stored teacher's word on
            each target, and `sampled` (targets, 2) fp32, of sampled answers each target's log p by the sampler, in
            nats, and its advantage.
        survey: the figures that the losses of the step were found to need beforehand; see
            trainer/tuning/objective/__init__.py.
        uncut: the whole row on the host, for a slice of one.
        host: the same row on the host, for a row that is on a device: reading it makes nobody wait for the device.
    """

    input: ModelInput
    labels: torch.Tensor
    tokens: int
    targets: int
    bins: tuple[Any, ...] = ()
    documents: tuple[int, ...] = ()
    columns: Mapping[str, ColumnValues] = field(default_factory=dict[str, ColumnValues])
    survey: torch.Tensor | None = None
    uncut: "MicroBatch | None" = None
    host: "MicroBatch | None" = None

    @classmethod
    def of_text(cls, tokens: torch.Tensor, pictures: Mapping[str, torch.Tensor] | None = None) -> "MicroBatch":
        """One text, `tokens` (1, T), as a row without targets. `pictures` are the inputs of its pictures (`Seen`)."""
        length = tokens.shape[1]
        row = ModelInput.of(tokens, torch.arange(length)[None], Segments.of_documents([length]))
        row = replace(row, seen=(Seen(0, pictures),)) if pictures else row
        return cls(row, torch.full_like(tokens, IGNORE), length, 0)

    @cached_property
    def whole(self) -> "MicroBatch":
        """The row with all of its tokens, also for a rank that has a slice of them to compute."""
        return self if self.uncut is None else self.uncut.to(self.labels.device)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each segment."""
        return self.input.segments.lengths

    @cached_property
    def places(self) -> torch.Tensor:
        """(targets,) int64, the positions whose label is not `IGNORE`."""
        return onto(_places((self.host or self).labels), self.labels.device)

    def segments(self, role: Role) -> torch.Tensor:
        """(n,) int64, the numbers of the row's segments with this role."""
        return onto(torch.tensor(self.input.segments.of(role), dtype=torch.int64), self.labels.device)

    def column(self, name: str) -> torch.Tensor:
        """The values of a column that the rows of the run have."""
        return self.columns[name].values

    def cut(self, part: int, parts: int) -> "MicroBatch":
        """The slice number `part` of a row on the host that `parts` ranks share: `labels`, `targets` and `places` are
        of its tokens, and so are columns of targets and of tokens. The first one alone counts the row's tokens, bins
        and documents.
        """
        row = self.input.cut(part, parts)
        mine = slice(row.first, row.first + row.input_ids.shape[1])
        labels = self.labels[:, mine]
        before, targets = (int((values != IGNORE).sum()) for values in (self.labels[:, : row.first], labels))
        whole = slice(None)
        slices = {"token": mine, "target": slice(before, before + targets), "document": whole, "picture": whole}
        columns = {name: ColumnValues(per, values[slices[per]]) for name, (per, values) in self.columns.items()}
        counted: dict[str, Any] = {} if part == 0 else {"tokens": 0, "bins": (), "documents": ()}
        return replace(self, input=row, labels=labels, targets=targets, columns=columns, uncut=self, **counted)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same row on `device`, with int64 for what the model and the loss take; half the bytes travel."""
        return replace(
            self,
            input=self.input.to(device),
            labels=onto(self.labels, device).long(),
            columns={name: ColumnValues(per, onto(values, device)) for name, (per, values) in self.columns.items()},
            survey=None if self.survey is None else self.survey.to(device),  # the device made it
            host=self,
        )

    def part(self, role: Role) -> "MicroBatch":
        """Return only the row's segments of this role, each after the prefix that it goes on from. If ranks share the
        row, padding may follow, and this is this rank's slice. If there are no such segments, it is all that the rank
        has of the row, because a pass needs tokens."""
        row = self.uncut or self.host or self
        given, chosen = row.input, row.input.segments.of(role)
        if not chosen:
            return self
        begins = given.segments.borders
        spans = [(given.prefixes[number], (begins[number], given.segments.lengths[number])) for number in chosen]
        places = torch.cat([torch.arange(begin, begin + size) for pair in spans for begin, size in pair])
        sizes = [sum(size for _, size in pair) for pair in spans]
        ids, labels, positions = (values[:, places] for values in (given.input_ids, row.labels, given.position_ids))
        segments = Segments.of_documents(sizes)
        # Ranks share a row by as many tokens each: a last segment of padding.
        if uneven := -len(places) % self.input.parts:
            segments = Segments((*sizes, uneven), (*segments.roles, Role.PADDING))
            ids, labels = F.pad(ids, (0, uneven)), F.pad(labels, (0, uneven), value=IGNORE)
            positions = torch.cat([positions, torch.arange(uneven, dtype=positions.dtype)[None]], 1)
        numbers = {number: place for place, number in enumerate(chosen)}
        seen = tuple(replace(one, segment=numbers[one.segment]) for one in given.seen if one.segment in numbers)
        made = replace(ModelInput.of(ids, positions, segments), seen=seen)
        longest = max(self.input.max_seqlen, made.max_seqlen)
        part = MicroBatch(
            replace(made, max_seqlen=longest), labels, tokens=len(places), targets=int((labels != IGNORE).sum())
        )
        shared = self.input
        mine = part if shared.parts == 1 else part.cut(shared.first // self.labels.shape[1], shared.parts)
        return mine.to(self.labels.device)


def _places(labels: torch.Tensor) -> torch.Tensor:
    return (labels[0] != IGNORE).nonzero()[:, 0]
