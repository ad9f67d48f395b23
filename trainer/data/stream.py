"""Gives each rank its part of every global step, as packed rows.

A global step takes the next `global_batch` bins of the epoch's plan. Which rank gets which of them follows from
arithmetic alone, so the documents of a step never depend on the number of ranks, and a position is two integers.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.dataset import TARGET_BIT, Dataset
from trainer.data.order import EpochPlan
from trainer.errors import DataError

IGNORED = -100
"""The label of a position that predicts nothing (cross entropy's `ignore_index`)."""


@dataclass(frozen=True)
class Position:
    """Where a global step begins. It knows no ranks; a checkpoint stores it."""

    epoch: int = 0
    next_bin: int = 0

    def to_json(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next_bin": self.next_bin}

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> "Position":
        return cls(value["epoch"], value["next_bin"])


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What a rank takes through the model at once: one packed row of T = micro_batch * sequence_length tokens.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64, already shifted: what each position must predict, `IGNORED` where that is nothing.
        position_ids: (1, T) int64, from 0 in each segment.
        cu_seqlens: (segments + 1,) int32, borders of the segments from 0 to T. A segment is a document, or the padding
            at the end of a bin.
        max_seqlen: tokens of the longest segment.
        tokens: tokens of documents, without the padding.
        targets: labels that are not `IGNORED`.
        bins: the (epoch, bin) in the row, without the empty ones.
        documents: their documents, in the order of the row.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    tokens: int
    targets: int
    bins: tuple[tuple[int, int], ...]
    documents: tuple[int, ...]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same row with its tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)


class Stream:
    """One rank's view of the training data.

    `weights` are visits an epoch, one for each source; `pad_id` fills unused positions. A rank's `accumulation`, the
    micro-batches of a step, is derived: global_batch / (world_size * micro_batch), rounded up.
    """

    def __init__(
        self,
        dataset: Dataset,
        weights: Sequence[float],
        sequence_length: int,
        packing: bool,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        pad_id: int,
    ) -> None:
        assert len(weights) == len(dataset.manifest.sources)
        assert 0 <= rank < world_size
        self.accumulation = -(-global_batch // (world_size * micro_batch))
        self._dataset = dataset
        self._weights = tuple(weights)
        self._sequence_length = sequence_length
        self._packing = packing
        self._seed = seed
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank = rank
        self._world_size = world_size
        self._pad_id = pad_id
        # A step may straddle two windows, and the step after it two epochs.
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._documents = lru_cache(maxsize=2)(self._read_window)

    def step(self, position: Position) -> list[MicroBatch]:
        """This rank's micro-batches of the global step that begins at `position`, always `accumulation` of them.

        Bin b of the step belongs to rank (b // micro_batch) % world_size. Where the epoch ends or the ranks outnumber
        the bins, rows are empty: all padding, no targets.

        Raises:
            StorageError: the data cannot be read, or is not what was written.
        """
        plan = self._plan(position.epoch)
        end = min(position.next_bin + self._global_batch, plan.num_bins)
        assert 0 <= position.next_bin < end
        batches = []
        for micro in range(self.accumulation):
            first = position.next_bin + (micro * self._world_size + self._rank) * self._micro_batch
            batches.append(self._pack(position.epoch, range(first, min(first + self._micro_batch, end))))
        return batches

    def advance(self, position: Position) -> Position:
        """Where the next global step begins: after the last bin of an epoch, at the first of the next."""
        next_bin = position.next_bin + self._global_batch
        if next_bin >= self._plan(position.epoch).num_bins:
            return Position(position.epoch + 1, 0)
        return Position(position.epoch, next_bin)

    def steps_in_epoch(self, epoch: int) -> int:
        """Global steps of an epoch; the last one may have empty rows."""
        return -(-self._plan(epoch).num_bins // self._global_batch)

    def read_from(self, position: Position) -> Iterator[list[MicroBatch]]:
        """Every step from `position` on, without end; the next one is read while the caller works on the last."""
        with ThreadPoolExecutor(1, "read-ahead") as pool:
            ahead = pool.submit(self.step, position)
            while True:
                batches = ahead.result()
                position = self.advance(position)
                ahead = pool.submit(self.step, position)
                yield batches

    def epoch(self, epoch: int) -> Iterator[list[MicroBatch]]:
        """Every step of one epoch: as many on each rank, with as many micro-batches."""
        position = Position(epoch, 0)
        while position.epoch == epoch:
            yield self.step(position)
            position = self.advance(position)

    def _make_plan(self, epoch: int) -> EpochPlan:
        data = self._dataset
        plan = EpochPlan(
            lengths=data.lengths,
            blocks=data.blocks,
            block_sources=data.block_sources,
            weights=self._weights,
            sequence_length=self._sequence_length,
            seed=self._seed,
            epoch=epoch,
            packing=self._packing,
        )
        if plan.num_bins == 0:
            raise DataError(
                f"data.train: epoch {epoch} visits no document, as weights of {', '.join(map(str, self._weights))} are too "
                f"small for {len(data.lengths)} documents. Raise a weight."
            )
        return plan

    def _read_window(self, epoch: int, window: int) -> dict[int, NDArray[np.uint32]]:
        return self._dataset.read(self._plan(epoch).window(window).blocks.tolist())

    def _pack(self, epoch: int, bins: range) -> MicroBatch:
        """Lay bins end to end, each padded to the sequence length; missing ones are padding."""
        length = self._micro_batch * self._sequence_length
        input_ids = np.full(length, self._pad_id, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        segments: list[int] = []
        numbers: list[int] = []
        sizes: list[int] = []
        for row in range(self._micro_batch):
            at = row * self._sequence_length
            for number, stored in self._bin(epoch, bins[row]) if row < len(bins) else ():
                tokens = (stored & ~TARGET_BIT).astype(np.int64)
                end = at + len(tokens)
                input_ids[at:end] = tokens
                labels[at : end - 1] = np.where(stored[1:] & TARGET_BIT, tokens[1:], IGNORED)
                segments.append(len(tokens))
                numbers.append(number)
                sizes.append(len(tokens))
                at = end
            padding = (row + 1) * self._sequence_length - at
            if padding:
                segments.append(padding)
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids)[None],
            labels=torch.from_numpy(labels)[None],
            position_ids=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in segments]))[None],
            cu_seqlens=torch.from_numpy(np.cumsum([0, *segments]).astype(np.int32)),
            max_seqlen=max(segments),
            tokens=sum(sizes),
            targets=int((labels != IGNORED).sum()),
            bins=tuple((epoch, k) for k in bins),
            documents=tuple(numbers),
        )

    def _bin(self, epoch: int, k: int) -> list[tuple[int, NDArray[np.uint32]]]:
        plan = self._plan(epoch)
        window, place = plan.locate(k)
        documents = self._documents(epoch, window)
        return [(number, documents[number]) for number in plan.window(window).bins[place].tolist()]


def eval_stream(
    dataset: Dataset, sequence_length: int, packing: bool, micro_batch: int, rank: int, world_size: int, pad_id: int
) -> Stream:
    """The stream of an evaluation: `for (batch,) in stream.epoch(0)` visits every document once, whatever its weight.

    Every rank gets equally many micro-batches, and the bins are the same whatever the ranks and the run's seed.
    """
    return Stream(
        dataset,
        weights=[1.0] * len(dataset.manifest.sources),
        sequence_length=sequence_length,
        packing=packing,
        seed=0,
        global_batch=world_size * micro_batch,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        pad_id=pad_id,
    )
