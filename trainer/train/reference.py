"""The stored reference: one pass through the base over all data before the first step, and none in any step.

The model is as it was attached, before a checkpoint is restored, so that a base that learns is still the base. Every
rank computes its own rows of one order, which does not depend on the ranks. Values that are there already, from an
earlier start or another run, are read. The values are one object beside the data, which any run may read:

    data/<fingerprint>/reference-<hash of the facts>.safetensors

Its tensor `log_p` is (documents, answers) F32, in nats, with NaN for an answer that is not computed yet. The metadata
are JSON: the `facts` that decide the values, `progress`, which is null once all values are there, and a `sha256` of the
three.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trainer.data.dataset.chapters import Chapters
from trainer.data.dataset.dataset import Dataset, open_dataset
from trainer.data.order.settings import Position, eval_order
from trainer.data.order.stream import eval_stream, sees_pictures
from trainer.errors import NOT_JSON, Damaged, NonFiniteLoss, NotFound
from trainer.model.micro_batch import MicroBatch
from trainer.run import layout
from trainer.state.zero.engine import Engine
from trainer.store.json_text import canonical, digest_of
from trainer.store.store import Store, read_twice
from trainer.train.start import Start, begin_from

if TYPE_CHECKING:
    from trainer.data.dataset.features import FeatureFiles

_KEPT_SECONDS = 300.0  # between two writes of the results so far
_TOLD_SECONDS = 10.0
_TENSOR = "log_p"


@dataclass(frozen=True)
class ReferencePass:
    """The pass on this rank, by `kernels`, that of attention first. It reads `features` of pictures if any are kept."""

    start: Start
    engine: Engine
    kernels: str
    features: FeatureFiles | None = None

    def log_probabilities(self, fingerprint: str, chapters: Chapters | None = None) -> NDArray[np.float32] | None:
        """(documents, answers) of a data set, in nats; None if a stop was requested meanwhile. Collective.

        `chapters` are those of a data set that may still be compiled: the pass begins when it is whole.

        Raises:
            DataError, Stopped: it will never be whole. NonFiniteLoss: the base gives an answer no finite
            log-probability. StorageError: the store failed.
        """
        dataset = self._whole(fingerprint, chapters)
        folder, facts = (
            self.start.store.sub(layout.dataset(fingerprint)),
            self.start.ranks.on_first(lambda: self._facts(dataset)),
        )
        found = self.start.ranks.on_first(lambda: self._read(folder, facts, dataset))
        if found is not None and found.progress is None:
            self.start.log(f"the reference of {len(found.log_p):,} {self.start.objective.unit} is in {folder.uri}")
            return found.log_p
        method, beginning = self.start.resolved.method, self.start.resolved.beginning
        if beginning is not None and beginning.begun:
            begin_from(beginning, self.start, self.engine)
        as_attached = method.trains_base or beginning is not None  # no update has been made yet
        as_base = nullcontext() if as_attached else method.switched_off(self.engine.model)
        with as_base, self.engine.evaluating():
            computed = self._compute(folder, facts, dataset, found)
        self.start.pulse("load", 0)
        self.start.metrics.write("phase", phase="load")
        return computed

    def _whole(self, fingerprint: str, chapters: Chapters | None) -> Dataset:
        if chapters is not None and chapters.count > 1:
            self.start.log("the reference is computed before the first step, so it waits until all data is compiled")
            self.start.pulse("compile", 0)
            chapters.get(chapters.count - 1)
        return open_dataset(self.start.store, fingerprint)

    def _facts(self, dataset: Dataset) -> dict[str, Any]:
        """Everything that decides the values."""
        model, quant, base = self.start.config.model, self.start.config.quant, self.start.resolved.base
        beginning = self.start.resolved.beginning
        return {
            "format": 1,
            "dataset": dataset.manifest.fingerprint,
            "of": self.start.objective.unit,
            "base": base.fingerprint,
            "files": base.versions,
            "weights": base.samples,
            "layers": model.layers,
            "dtype": model.dtype,
            "quant": {"type": quant.type, "block_size": quant.block_size, "double": quant.double},
            "attention": self.kernels,
            **({"start": beginning.facts["start_weights"]} if beginning else {}),
        }

    def _read(self, folder: Store, facts: dict[str, Any], dataset: Dataset) -> References | None:
        try:
            return read_references(folder, facts, dataset.manifest.documents)
        except NotFound:
            return None
        except Damaged as error:
            self.start.log(f"{error} The reference is computed again.")
            return None

    def _compute(
        self, folder: Store, facts: dict[str, Any], dataset: Dataset, found: References | None
    ) -> NDArray[np.float32] | None:
        """Compute all that `found` lacks. Rank 0 writes the results from time to time, and at the end or a stop."""
        order = eval_order(self.start.config, dataset.manifest).to_json()
        stream = eval_stream(self.start.config, dataset, self.start.ranks.rank, self.start.ranks.world_size)
        sees_pictures(stream, self.start.config, self.start.resolved.base, folder)
        if stream.pictures is not None and self.features is not None:
            stream.pictures.over(self.features)
        log_p, position = None, Position()
        if found is not None and found.progress is not None and found.progress["order"] == order:
            log_p, position = found.log_p.copy(), Position.from_json(found.progress["position"])
        kept = told = time.monotonic()
        self.start.metrics.write_now("phase", phase="reference")
        while position.epoch == 0:
            self.start.pulse("reference", 0)
            every: list[_Part] = self.start.ranks.gather_objects(self._part(stream.step(position)))
            position, now = stream.advance(position), every[0].clock  # rank 0's, so that all decide alike
            if log_p is None:
                log_p = np.full((dataset.manifest.documents, every[0].log_p.shape[1]), np.nan, np.float32)
            for part in every:
                log_p[part.documents] = part.log_p
            whole, stopping = position.epoch > 0, any(part.stop for part in every)
            if whole or now - told > _TOLD_SECONDS:
                told = self._tell(log_p, now)
            if whole:
                self._check(log_p)
            if whole or stopping or now - kept > _KEPT_SECONDS:
                progress = None if whole else {"order": order, "position": position.to_json()}
                references, kept = References(log_p, progress), now
                self.start.ranks.on_first(partial(write_references, folder, facts, references))
            if stopping and not whole:
                return None
        return log_p

    def _part(self, batches: Sequence[MicroBatch]) -> _Part:
        rows = [self.engine.look(self.start.objective.reference, batch).float().cpu().numpy() for batch in batches]
        # All ranks that share a row have its values, and one of them names its documents.
        values = [row[: len(batch.documents)] for row, batch in zip(rows, batches, strict=True)]
        documents = [number for batch in batches for number in batch.documents]
        return _Part(documents, np.concatenate(values), bool(self.start.stop.requested), time.monotonic())

    def _tell(self, log_p: NDArray[np.float32], now: float) -> float:
        done = len(log_p) - int(np.isnan(log_p[:, 0]).sum())
        self.start.metrics.write_now("phase", phase="reference", done=done, in_all=len(log_p))
        self.start.log(f"the reference of {done:,} of {len(log_p):,} {self.start.objective.unit} is computed")
        return now

    def _check(self, log_p: NDArray[np.float32]) -> None:
        wrong = np.flatnonzero(~np.isfinite(log_p).all(axis=1))
        if len(wrong):
            raise NonFiniteLoss(
                f"the base gives {len(wrong):,} of {len(log_p):,} {self.start.objective.unit} of the data no finite"
                f" log-probability, document {wrong[0]} first, so it cannot be their reference. Leave them out of the"
                " data."
            )


class _Part(NamedTuple):
    """One rank's rows of a step: their documents, their log-probabilities (documents, answers), and the rank's
    messages.
    """

    documents: list[int]
    log_p: NDArray[np.float32]
    stop: bool
    clock: float  # seconds


@dataclass(frozen=True, eq=False)
class References:
    """`log_p` (documents, answers) fp32; `progress` is where the computation goes on, or None."""

    log_p: NDArray[np.float32]
    progress: Mapping[str, Any] | None = None


def references_key(facts: Mapping[str, Any]) -> str:
    """The key in the folder of the data set. Different facts give a different object."""
    return f"reference-{digest_of(facts)[:20]}.safetensors"


def write_references(folder: Store, facts: Mapping[str, Any], references: References) -> None:
    """Write or replace them; they become visible whole or not at all."""
    texts = {"facts": canonical(facts), "progress": canonical(references.progress)}
    values = np.ascontiguousarray(references.log_p, np.float32)
    folder.put(references_key(facts), save({_TENSOR: values}, {**texts, "sha256": _digest(texts, values)}))


@read_twice
def read_references(folder: Store, facts: Mapping[str, Any], documents: int) -> References:
    """Read the references that were written with the same facts.

    Raises:
        NotFound: there are none.
        Damaged: they are not what was written, or have another number of documents.
    """
    key = references_key(facts)
    data = folder.get(key)
    try:
        values = load(data)[_TENSOR]
        size = int.from_bytes(data[:8], "little")
        texts: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
        digest = texts.pop("sha256")
        if digest != _digest(texts, values):
            raise ValueError("its content does not match its sha256")
        if texts["facts"] != canonical(facts):
            raise ValueError("it was computed from something else")
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != documents:
            raise ValueError(f"it has {values.dtype} values of shape {values.shape} for {documents} documents")
        return References(values, json.loads(texts["progress"]))
    except (*NOT_JSON, SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder.uri}/{key} is damaged: {error}.") from error


def _digest(texts: Mapping[str, str], values: NDArray[np.float32]) -> str:
    return hashlib.sha256(canonical([texts["facts"], texts["progress"]]).encode() + values.tobytes()).hexdigest()
