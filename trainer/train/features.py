"""The kept features of pictures: one pass through the base's tower, before the base itself is loaded.

It is made where the tower is too large to be whole beside the base (`sharding.tower_limit`), or where many epochs are
to pay for it. Each rank computes the documents of its own rows. Features that are there already, from an earlier start
or another run, are not computed again (trainer/data/dataset/features.py). A run over features decodes no picture, and
loads nothing of the tower.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trainer.base.find.check import keeps_no_features
from trainer.base.find.small_files import processor_files
from trainer.base.load.front import load_front
from trainer.base.load.load import DTYPES
from trainer.data.dataset.chapters import Chapters
from trainer.data.dataset.dataset import Dataset, open_dataset
from trainer.data.dataset.features import FeatureFiles, features_name
from trainer.data.format.row_format import PICTURES
from trainer.data.order.settings import Position
from trainer.data.order.stream import Stream, eval_stream, sees_pictures
from trainer.model.attention import Attention
from trainer.model.front import CannotSee, Front, TakenOut
from trainer.model.micro_batch import MicroBatch, Seen
from trainer.plan.resolve import Resolved, keeps_features
from trainer.run import layout
from trainer.train.start import Start

_TOLD_SECONDS = 10.0


def kept_features(
    start: Start, attention: Attention, datasets: Sequence[str], chapters: Chapters | None
) -> KeptFeatures | None:
    """The features of the pictures of these data sets, which are computed now where they are not there. Collective.

    None if the run has no use for them. `chapters` are those of the first data set, which may still be compiled.

    Raises:
        ConfigError: the class of the base cannot do without its tower. DataError, StorageError: as in training.
    """
    resolved = start.resolved
    if not keeps_features(resolved.config, resolved.base.architecture):
        return None
    facts = start.ranks.on_first(lambda: _facts(resolved, attention.name, start.ranks.device.type))
    files = FeatureFiles(start.store.sub(layout.features(features_name(facts))), facts)
    made = FeaturePass(start, attention.name, files)
    whole = all([made.is_whole(dataset, chapters if dataset == datasets[0] else None) for dataset in datasets])
    start.pulse("load", 0)
    start.metrics.write("phase", phase="load")
    return KeptFeatures(files, start.ranks.on_first(files.weights_so_far), whole)


class KeptFeatures(NamedTuple):
    """Where features are, the names of the weights of the class that are needed beside them, and whether all are there.
    After a stop request they may not be."""

    files: FeatureFiles
    weights: frozenset[str]
    whole: bool


def _facts(resolved: Resolved, attention: str, device: str) -> dict[str, Any]:
    """Everything that decides the values, beside the pictures."""
    base, model = resolved.base, resolved.config.model
    files = processor_files(base.directory)
    return {
        "format": 1,
        "base": base.fingerprint,
        "files": base.versions,
        "weights": base.samples,
        "layers": model.layers,
        "dtype": model.dtype,
        "processor": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "attention": attention,
        "device": device,
    }


class _Part(NamedTuple):
    """One rank's documents of a step, and its messages."""

    weights: frozenset[str]
    stop: bool
    clock: float  # seconds
    computed: int
    documents: int
    problem: str | None = None


@dataclass
class FeaturePass:
    """The pass on this rank, over one data set after another."""

    start: Start
    attention: str
    files: FeatureFiles
    front: Front | None = None

    def is_whole(self, fingerprint: str, chapters: Chapters | None) -> bool:
        """Compute the features of a data set that are not there. False after a stop request. Collective."""
        start, ranks = self.start, self.start.ranks
        if ranks.on_first(lambda: self.files.weights(fingerprint)) is not None:
            start.log(f"the features of the pictures are in {self.files.folder.uri}")
            return True
        dataset = self._dataset(fingerprint, chapters)
        if PICTURES not in dataset.columns:
            return True
        stream = self._stream(dataset)
        if self.front is None:
            config, base = start.config, start.resolved.base
            with ranks.world.agreeing():
                self.front, size = load_front(
                    base, config.model.layers, DTYPES[config.model.dtype], self.attention, ranks.device
                )
            what = "for one pass over the pictures"
            start.log(f"the base's tower (encoder and projector): {size / 2**20:,.1f} MiB, {what}")
        start.metrics.write_now("phase", phase="features")
        return self._compute(fingerprint, stream)

    def _dataset(self, fingerprint: str, chapters: Chapters | None) -> Dataset:
        if chapters is not None and chapters.count > 1:
            self.start.log("features are computed before the first step, so they wait until all data is compiled")
            self.start.pulse("compile", 0)
            chapters.get(chapters.count - 1)
        return open_dataset(self.start.store, fingerprint)

    def _stream(self, dataset: Dataset) -> Stream:
        """Rows of the data set for each rank alone, with the pictures that have no features yet."""
        start, config = self.start, self.start.config
        config = config.model_copy(update={"sharding": config.sharding.model_copy(update={"sequence_parallel": 1})})
        with start.ranks.agreeing():
            stream = eval_stream(config, dataset, start.ranks.rank, start.ranks.world_size)
            sees_pictures(stream, config, start.resolved.base, dataset.store)
            assert stream.pictures is not None
            stream.pictures.leave_out(self.files.has)
        return stream

    def _compute(self, fingerprint: str, stream: Stream) -> bool:
        ranks, told = self.start.ranks, time.monotonic()
        steps, position = 0, Position()
        while position.epoch == 0:
            steps, position = steps + 1, stream.advance(position)
        known, done, documents = ranks.on_first(self.files.weights_so_far), 0, 0
        first = True
        with closing(stream.read_from(Position(), steps=steps)) as reader:
            for _ in range(steps):
                self.start.pulse("features", 0)
                batches = next(reader)
                seen = sum(bool(one.key) for batch in batches for one in batch.input.seen)
                made, problem = self._taken_out(batches)
                weights = frozenset().union(*(one.weights for one in made.values()))
                part = _Part(weights, bool(self.start.stop.requested), time.monotonic(), len(made), seen, problem)
                every: list[_Part] = ranks.gather_objects(part)
                self._check(every)
                # A run that finds features must find the weights that it needs beside them.
                found = known.union(*(one.weights for one in every))
                if first or found != known:
                    ranks.on_first(lambda found=found: self.files.keep_weights(found))
                    known, first = found, False
                with ranks.agreeing():
                    for key, one in made.items():
                        self.files.write(key, one.kept)
                done += sum(one.computed for one in every)
                documents += sum(one.documents for one in every)
                if every[0].clock - told > _TOLD_SECONDS:  # rank 0's, so that all decide alike
                    told = every[0].clock
                    self.start.log(f"the features of the pictures of {done:,} documents are computed")
                if any(one.stop for one in every):
                    return False
        ranks.on_first(lambda: self.files.finish(fingerprint, documents))
        self.start.log(f"the features of the pictures of {done:,} documents were computed: {self.files.folder.uri}")
        return True

    def _check(self, every: Sequence[_Part]) -> None:
        if problem := next((one.problem for one in every if one.problem), None):
            raise keeps_no_features("this base", problem)

    def _taken_out(self, batches: Sequence[MicroBatch]) -> tuple[dict[str, TakenOut], str | None]:
        """Return what the class makes of the pictures of each document of the rows, by their key."""
        from trainer.base.find.processor import TYPES

        assert self.front is not None
        device, made = self.start.ranks.device, dict[str, TakenOut]()
        dtype, width = DTYPES[self.start.config.model.dtype], self.start.resolved.base.architecture.hidden
        for batch in batches:
            ids = batch.input.input_ids.split(list(batch.lengths), 1)
            for one in batch.input.seen:
                if not one.inputs or not one.key or one.key in made:
                    continue
                own, seen = ids[one.segment].to(device).long(), Seen(0, one.inputs).to(device).inputs
                pixels = {name: value for name, value in seen.items() if name not in TYPES}
                types = {name: value for name, value in seen.items() if name in TYPES}
                states = torch.ones(1, own.shape[1], width, dtype=dtype, device=device)
                try:
                    made[one.key] = self.front.taken_out(own, pixels, types, states)
                except CannotSee as error:
                    return {}, str(error)
        return made, None
