"""Everything that is measured of one side, base or adapter, and both sides as one evaluation.

The interval of a paired comparison over documents tells how certain the difference of two losses is.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Base
from trainer.config import Config, override
from trainer.config.evaluation import UNNAMED
from trainer.config.objective import HEADS
from trainer.data.compile.inputs import config_of_set
from trainer.data.compile.prepare import prepare_evaluated
from trainer.data.dataset.dataset import Dataset, open_dataset
from trainer.data.dataset.overlap import document_hashes, overlap_of
from trainer.data.order.stream import Stream, eval_stream, sees_pictures
from trainer.errors import DataError, StorageError
from trainer.evaluate.losses import Continued, document_losses, objective_means
from trainer.evaluate.models import OpenedRun, likelihoods_by
from trainer.evaluate.prompts import Prompter
from trainer.evaluate.subjects import Gaps, SentencePair, gaps_as_json, gaps_of, has_likelihood, read_pairs
from trainer.export.trained import trained_config
from trainer.model.micro_batch import MicroBatch
from trainer.run.evaluations import json_number, keep_evaluation, other_settings
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.store.store import Store

OnProgress = Callable[[str, int, int], None]
"""Told of a part of the work, how much of it is done, and how much it is."""
TaskScores = dict[str, dict[str, tuple[float, float | None]]]
"""Task -> metric -> (value, standard error)."""
Tasks = Callable[[OpenedRun, str], TaskScores]
"""Runs the tasks by a run's model as it is, of which the text is the side's name."""
Losses = tuple[Any, Any]
"""The nats and the tokens of each document of a set, in the set's order, as (documents,) fp64."""


class EvaluatedSet(NamedTuple):
    """A set under its settings, and the cluster of each of its documents.

    The pieces of one long row, and copies of each other, are in one cluster.
    """

    config: Config
    dataset: Dataset
    clusters: NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """The things to measure: sets by name, pairs of sentences, tasks.

    `trained_on` is the number of documents of each set that are in the training data, if it is known.
    """

    sets: Mapping[str, EvaluatedSet]
    pairs: Sequence[SentencePair]
    tasks: Tasks | None
    trained_on: Mapping[str, int] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)  # the fingerprint of each set
    of_head: Stream | None = None  # of `data.eval`, for a run whose head has measures of its own


@dataclass(frozen=True)
class MeasuredSide:
    """The figures of one side. They are the same on every rank, except for the tasks, which rank 0 has."""

    sets: dict[str, Losses]
    bias: dict[str, Gaps]
    tasks: TaskScores = field(default_factory=dict)


def find_work(opened: OpenedRun, tasks: Tasks | None, progress: OnProgress) -> Work:
    """Compile the sets that the store lacks, and read the pairs. Collective. Raises as `evaluated`."""
    config, ranks = opened.resolved.config, opened.ranks
    keys = ranks.on_first(lambda: evaluated(config, opened.resolved.base, opened.store, progress))
    own = None if has_likelihood(config) else keys.pop(UNNAMED, None)
    of_head = None
    if own is not None and config.objective.name in HEADS:
        dataset = open_dataset(opened.store, own)
        of_head = eval_stream(config, dataset, ranks.rank, ranks.world_size)
        sees_pictures(of_head, config, opened.resolved.base, dataset.store)
    pairs = ranks.on_first(lambda: read_pairs(config.eval.bias) if config.eval.bias else [])
    known = ranks.on_first(lambda: trained_on(opened.store, opened.manifest, keys))
    return Work(sets_of(config, opened.store, keys), pairs, tasks, known, keys, of_head)


def evaluated(config: Config, base: Base, store: Store, progress: OnProgress) -> dict[str, str]:
    """Return the sets by name, and compile those that the store lacks.

    Raises `DataError` if a source is missing or unreadable.
    """

    def compiling(what: str, now: Any) -> None:
        progress(f"compiling {what}", now.bytes_done, now.bytes)

    return prepare_evaluated(config, base, store, progress=compiling)


def sets_of(config: Config, store: Store, keys: Mapping[str, str]) -> dict[str, EvaluatedSet]:
    """Open the sets of these fingerprints."""
    sets = dict[str, EvaluatedSet]()
    for name, key in keys.items():
        dataset, of_set = open_dataset(store, key), config if name == UNNAMED else config_of_set(config, name)
        longest = of_set.data.sequence_length if of_set.data.on_too_long == "split" else None
        sets[name] = EvaluatedSet(of_set, dataset, clusters_of(dataset.lengths, longest, document_hashes(store, key)))
    return sets


def trained_on(store: Store, manifest: CheckpointManifest | None, keys: Mapping[str, str]) -> dict[str, int]:
    """Return how many documents of each set are in the training data of the checkpoint.

    The training data of the checkpoints from which it began (`tuning.start`) counts too: the result is the largest
    number in one of these, as far as the data is still there.
    """
    found = dict[str, int]()
    if manifest is None:
        return found
    for dataset in (manifest.dataset, *manifest.base.get("start_data", [])):
        with suppress(StorageError):
            for name, key in keys.items():
                if overlap := overlap_of(store, dataset, key):
                    found[name] = max(overlap.shared, found.get(name, 0))
    return found


def measure(opened: OpenedRun, work: Work, side: str, progress: OnProgress) -> MeasuredSide:
    """Measure all of `work` with the model as it is now. Collective. `side` is its name in what `progress` is told."""
    sets = {name: _losses(opened, one, partial(progress, f"{name}, {side}")) for name, one in work.sets.items()}
    tasks = work.tasks(opened, side) if work.tasks else {}
    if work.of_head is not None:
        tasks = {**tasks, UNNAMED: _measures(opened, work.of_head, partial(progress, f"{UNNAMED}, {side}"))}
    return MeasuredSide(sets, _gaps(opened, work.pairs, side, progress), tasks)


def _measures(
    opened: OpenedRun, stream: Stream, told: Callable[[int, int], None]
) -> dict[str, tuple[float, float | None]]:
    """Return the loss and the measures of the objective over all rows of the set. Collective."""
    engine, objective, rows = opened.engine, opened.resolved.objective, list(stream.epoch(0))

    def batches() -> Iterator[MicroBatch]:
        for number, row in enumerate(rows, 1):
            yield from row
            told(number, len(rows))

    with engine.evaluating():
        means, _ = objective_means(opened.ranks, objective, batches(), partial(engine.look, objective.loss))
    return {name: (value, None) for name, value in means.items()}


def _losses(opened: OpenedRun, of: EvaluatedSet, told: Callable[[int, int], None]) -> Losses:
    world, documents = opened.ranks.world_size, len(of.clusters)
    stream = eval_stream(of.config, of.dataset, opened.ranks.rank, world)
    sees_pictures(stream, of.config, opened.resolved.base, of.dataset.store)
    mine = document_losses(opened.engine, stream, lambda done: told(min(documents, done * world), documents))
    every = opened.ranks.gather_objects(tuple(column.numpy() for column in mine))
    told(documents, documents)
    numbers, nats, tokens = (np.concatenate(column) for column in zip(*every, strict=True))
    order = np.argsort(numbers)
    return nats[order], tokens[order]


def _gaps(opened: OpenedRun, pairs: Sequence[SentencePair], side: str, progress: OnProgress) -> dict[str, Gaps]:
    if not pairs:
        return {}
    texts = texts_of(pairs, opened.words.prompter)
    found = likelihoods_by(opened, texts, told=lambda done: progress(f"pairs, {side}", done, len(texts)))
    return gaps_of(pairs, [likelihood.log_p for likelihood in found])


def texts_of(pairs: Sequence[SentencePair], prompter: Prompter) -> list[Continued]:
    """Return the sentences of the pairs in turn. Raises `DataError` for a sentence that nothing predicts."""
    sentences = (sentence for pair in pairs for sentence in (pair.first, pair.second))
    texts = [Continued([*prompter.text_begin, *prompter.encode(sentence)]) for sentence in sentences]
    if any(len(text.tokens) < 2 for text in texts):
        raise DataError(
            "eval.bias: a sentence is one token, and the base has no token before a text, so nothing predicts it."
        )
    return texts


def evaluation(
    config: Config, base: Base, step: int | None, work: Work, sides: Mapping[str, MeasuredSide]
) -> dict[str, Any]:
    """Return the sides by their names, in the form of `trainer.run.layout.evaluation`.

    docs/evaluation.md describes every field.
    """
    one = next(iter(sides.values()))
    return {
        "step": step,
        "made": time.time(),
        "base": {"name": base.name, "fingerprint": base.fingerprint, "quant.type": config.quant.type},
        "sets": {name: _of_set(name, sides, work) for name in one.sets},
        "tasks": {task: _of_task(task, sides) for task in one.tasks},
        "bias": gaps_as_json(work.pairs, {name: side.bias for name, side in sides.items()}),
    }


def keep(run: Store, config: Config, manifest: CheckpointManifest, found: dict[str, Any]) -> dict[str, Any]:
    """Store the evaluation of a checkpoint under `config` in the run's folder.

    If these are other settings than the run's, nothing is stored, and the result names them.
    """
    if under := other_settings(override(trained_config(run, manifest)), config):
        return {**found, "under": under}
    keep_evaluation(run, found)
    return found


def _of_set(name: str, sides: Mapping[str, MeasuredSide], work: Work) -> dict[str, Any]:
    clusters = work.sets[name].clusters
    tokens = next(iter(sides.values())).sets[name][1]
    nats = {side: measured.sets[name][0] for side, measured in sides.items()}
    losses = {side: float(values.sum() / tokens.sum()) for side, values in nats.items()}
    found: dict[str, Any] = {
        "data": work.data.get(name),
        "tokens": int(tokens.sum()),
        "documents": len(tokens),
        "clusters": len(set(clusters.tolist())),
    }
    found |= {side: {"loss": json_number(loss), "perplexity": _perplexity(loss)} for side, loss in losses.items()}
    if name in work.trained_on:
        found["trained_on"] = work.trained_on[name]
    if len(nats) > 1:
        found["difference"] = json_number(losses["adapter"] - losses["base"])
        interval = difference_interval(nats["base"], nats["adapter"], tokens, clusters)
        found["interval"] = None if interval is None else list(interval)
    return found


def _perplexity(loss: float) -> float | None:
    """Return the perplexity; None if it is too large for a number."""
    return math.exp(loss) if loss < 700 else None


def _of_task(task: str, sides: Mapping[str, MeasuredSide]) -> dict[str, Any]:
    last, before = list(sides.values())[-1].tasks[task], sides["base"].tasks[task] if "base" in sides else {}
    return {
        metric: {
            **{side: json_number(measured.tasks[task][metric][0]) for side, measured in sides.items()},
            "base_stderr": before[metric][1] if before else None,
            "stderr": error,
        }
        for metric, (_, error) in last.items()
    }


_OUTSIDE = 0.025
"""The share of the subsets that lies beyond each end of the interval."""
_SUBSETS = 1999
_ALL_SUBSETS_OF = 11
"""Up to this many clusters every subset is taken; above, about as many are drawn at random."""
_AT_ONCE = 2**22  # values of the subsets in memory

Figures = NDArray[np.float64]


def difference_interval(
    before: Figures, after: Figures, tokens: Figures, clusters: NDArray[np.int64]
) -> tuple[float, float] | None:
    """Return the 95 % interval of (sum of `after` - sum of `before`) / sum of `tokens`, all (documents,).

    None means that there are too few documents for this promise, or that a loss is no finite number.
    Documents of one of the `clusters`, such as the pieces of a long text, are not independent draws and count as one.

    The ends of the interval are quantiles of the same ratio over random subsets of the clusters (Hartigan 1969, "Using
    subsample values as typical values"). This inverts the test that flips the signs of the clusters' residuals. It is
    exact for any number and any lengths of documents, as long as a change that helps is as likely as one that hurts as
    much. A bootstrap's percentiles are far too narrow for few documents. The subsets are the same in every call.
    """
    _, members = np.unique(clusters, return_inverse=True)
    changes, sizes = (np.bincount(members, figures).astype(np.float64) for figures in (after - before, tokens))
    counted = sizes > 0
    ratios = _subset_ratios(changes[counted], sizes[counted])
    outside = int(_OUTSIDE * (len(ratios) + 1) + 1e-9)  # 0 for fewer clusters than trainer.run.evaluations.FEWEST
    if not outside or not np.isfinite(changes).all():
        return None
    return float(ratios[outside - 1]), float(ratios[-outside])


def clusters_of(
    lengths: NDArray[np.int64], longest: int | None, hashes: NDArray[np.uint64] | None = None
) -> NDArray[np.int64]:
    """Return the cluster of each document of a set.

    If rows are split into pieces of `longest` tokens, a document that follows such a piece may be the rest of the same
    row. Rows whose documents have the same `hashes` change alike: a copy is no second draw.
    """
    rows = np.arange(len(lengths))
    if longest is not None and len(lengths):
        rows = np.cumsum(np.concatenate([[0], lengths[:-1] != longest]))
    if hashes is None:
        return rows
    totals = np.zeros(len(rows), np.uint64)
    np.add.at(totals, rows, hashes)
    return np.unique(totals, return_inverse=True)[1][rows]


def _subset_ratios(changes: Figures, sizes: Figures) -> Figures:
    """Return the ratio of the sums over each of some subsets, sorted. The empty subset has none."""
    clusters, draw = len(sizes), np.random.default_rng(0)
    if clusters <= _ALL_SUBSETS_OF:
        every = (np.arange(1, 2**clusters)[:, None] >> np.arange(clusters)) & 1
        return np.sort((every @ changes) / (every @ sizes))
    found, step = list[Figures](), max(1, _AT_ONCE // clusters)
    for first in range(0, _SUBSETS, step):
        chosen = draw.integers(0, 2, size=(min(step, _SUBSETS - first), clusters), dtype=np.int8).astype(np.float64)
        found.append((chosen @ changes) / (chosen @ sizes).clip(min=sizes.min()))
    return np.sort(np.concatenate(found))
