"""Prepares a run's data: names the compiled data sets, and compiles those that are missing.

This happens before a process group exists, because compiling can take long and a collective would time out meanwhile.
If the data has several chapters, a run needs only the first one to start. The process that owns the ranks may compile
the others while they train.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil

from trainer.base.base import Base, Tokenizer
from trainer.base.find.tokenizer import read_tokenizer
from trainer.config import Config
from trainer.config.evaluation import UNNAMED
from trainer.data.compile.compile import Progress, compile_chapters
from trainer.data.compile.encode import refusals
from trainer.data.compile.fingerprint import count_chapters, fingerprint, hash_tokens
from trainer.data.compile.inputs import Input, describe_forms, find, find_evaluated, named, work_of
from trainer.data.compile.pool import Mapper, mapper_for
from trainer.data.dataset.dataset import open_chapter
from trainer.data.dataset.manifest import MANIFEST, damaged, read_manifest
from trainer.data.dataset.overlap import refuse_overlaps
from trainer.data.order.order import EpochPlan, nothing_visited, turns
from trainer.data.order.settings import (
    EpochBins,
    Order,
    Position,
    bins_before,
    bins_in,
    keep_bins,
    kept_bins,
    train_order,
)
from trainer.errors import DataError, NotFound
from trainer.run import layout
from trainer.state.checkpoint.manifest import CheckpointManifest, committed_steps, readable_manifests
from trainer.store.store import Store


@dataclass(frozen=True)
class Datasets:
    """Fingerprints of a run's compiled data, which any rank can open from the store.

    `epochs` has the bins of each epoch. They are counted if `train.epochs` ends the run, or if some event comes a given
    number of times in an epoch. `sets` has the fingerprints of `eval.sets`, by name.
    """

    train: str
    eval: str | None
    epochs: Sequence[EpochBins] = ()
    sets: Mapping[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> str | None:
        """The fingerprint of the data whose loss decides which checkpoint is kept and when a run ends early.

        It is that of `data.eval`, or else of the first set.
        """
        return self.eval or next(iter(self.sets.values()), None)


OnProgress = Callable[[str, Progress], None]


def prepare(
    config: Config,
    base: Base,
    store: Store,
    progress: OnProgress = lambda what, now: None,
    mapper: Mapper | None = None,
) -> Datasets:
    """Compile the run's training and evaluation data, unless the store has them.

    `progress` gets the data set's name in `find`, and its progress. `mapper` encodes large data, by default on this
    machine's cores.

    Raises:
        DataError: a source is missing, unreadable, or holds nothing to learn from, or evaluation data is also trained
            on.
    """
    datasets, rest = prepare_start(config, base, store, progress, mapper)
    for _ in rest:
        pass
    return datasets


def prepare_start(
    config: Config,
    base: Base,
    store: Store,
    progress: OnProgress = lambda what, now: None,
    mapper: Mapper | None = None,
) -> tuple[Datasets, Iterator[int]]:
    """`prepare` as far as a run needs to start. Iterating over the second value compiles the rest, a chapter at a time.

    The iterator yields the number of each chapter. It is empty for data of one chapter, and if all bins must be counted
    first: `train.epochs` ends the run, or some event comes a given number of times in an epoch.
    """
    inputs = find(config)
    for what, sources in (("train", config.data.train), ("eval", config.data.eval)):
        if forms := describe_forms(config.data, sources, inputs[what][0]) if sources else []:
            progress(what, Progress(0, sum(file.size for file in inputs[what][0]), forms=forms))
    keys = locate(config, base, inputs)
    compiling = {what: _compile(base, store, what, key, inputs[what], progress, mapper) for what, key in keys.items()}
    rest = compiling.pop("train")
    for chapters in compiling.values():
        for _ in chapters:
            pass
    next(rest)
    evaluated = {what: key for what, key in keys.items() if what != "train"}
    for what, sentence in refuse_overlaps(store, keys["train"], evaluated):
        size = sum(file.size for file in inputs[what].files)
        progress(what, Progress(size, size, notes=[sentence]))
    epochs: list[EpochBins] = []
    if config.train.epochs or config.eval.per_epoch or config.checkpoint.per_epoch:
        for _ in rest:
            pass
        epochs = _epochs_of(config, store, keys["train"])
    return Datasets(keys["train"], keys.get("eval"), epochs, named(keys)), rest


def prepare_evaluated(
    config: Config, base: Base, store: Store, progress: OnProgress = lambda what, now: None
) -> dict[str, str]:
    """Compile only the evaluation data. Returns its fingerprints by name; that of `data.eval` is "eval"."""
    inputs = find_evaluated(config)
    keys = locate(config, base, inputs)
    for what, key in keys.items():
        for _ in _compile(base, store, what, key, inputs[what], progress, None):
            pass
    return ({UNNAMED: keys[UNNAMED]} if UNNAMED in keys else {}) | named(keys)


def _compile(
    base: Base,
    store: Store,
    what: str,
    key: str,
    given: Input,
    progress: OnProgress,
    mapper: Mapper | None,
) -> Iterator[int]:
    """Yield each chapter's number once it is compiled. If all are compiled already, yield only the last one's."""
    files, part, data = given
    last = count_chapters(files) - 1
    chapters = iter([last])
    if not _is_compiled(store, key):
        report = partial(progress, what)
        who = mapper_for(work_of(given), mapper)
        chapters = compile_chapters(data, files, load_tokenizer(base), store, key, part, who, report)
    for chapter in chapters:
        if chapter == last:
            manifest = read_manifest(store, key)
            if len(manifest.sources) != files[-1].source + 1:
                where = f"{store.sub(layout.dataset(key)).uri}/{MANIFEST}"
                raise damaged(where, f"it has {len(manifest.sources)} sources, and the data {files[-1].source + 1}")
            if what == "train":
                documents = [source.documents for source in manifest.sources]
                if wrong := refusals(data, "data.train", manifest.counters, documents):
                    raise DataError(wrong[0])
        yield chapter


def load_tokenizer(base: Base) -> Tokenizer:
    """The run's tokenizer. Its imports take seconds, so only code that reads rows should call this."""
    return read_tokenizer(base.directory, base.name, base.tokens)


def wait_until_prepared(config: Config, base: Base, store: Store, wait: Callable[[], None]) -> None:
    """Return once another process has compiled the run's data into `store`. Calls `wait` between two checks."""
    for key in locate(config, base).values():
        while not _is_compiled(store, key):
            wait()


def _is_compiled(store: Store, key: str) -> bool:
    try:
        read_manifest(store, key)
    except NotFound:
        return False
    return True


def locate(config: Config, base: Base, inputs: Mapping[str, Input] | None = None) -> dict[str, str]:
    """The fingerprint of each data set of `find`, known before anything is compiled. Raises as `find`."""
    tokenizer = hash_tokens(base.directory, config.model)
    found = find(config) if inputs is None else inputs
    return {what: fingerprint(data, files, tokenizer, part) for what, (files, part, data) in found.items()}


def _epochs_of(config: Config, store: Store, fingerprint: str) -> list[EpochBins]:
    """The bins of the epochs that the run visits. The last epoch may be visited only in part.

    A run that has begun continues from its place, which it may have reached with another `train.global_batch`."""
    order, train = train_order(config), config.train
    if train.epochs:
        return _epoch_bins(store, fingerprint, order, ceil(train.epochs))
    folder = store.sub(config.run.name)
    newest = next(readable_manifests(folder, [], committed_steps(folder)), None)
    step, place = training_place(newest)
    epochs = _epoch_bins(store, fingerprint, order, place.epoch + 1)
    rest = bins_in(epochs[-1]) - bins_before(epochs[-1], place)
    while (step := step + ceil(rest / train.global_batch)) < (train.steps or 0):
        epochs = _epoch_bins(store, fingerprint, order, len(epochs) + 1)
        rest = bins_in(epochs[-1])
    return epochs


def training_place(checkpoint: CheckpointManifest | None) -> tuple[int, Position]:
    """The step and the place in the data from which a start continues."""
    return (checkpoint.step, Position.from_json(checkpoint.position)) if checkpoint else (0, Position())


def _epoch_bins(store: Store, fingerprint: str, order: Order, epochs: int) -> list[EpochBins]:
    """The bins of the first `epochs` epochs. They are counted once, and kept beside the data for the next start."""
    bins = kept_bins(store, fingerprint, order)
    if missing := range(len(bins), epochs):
        chapters = read_manifest(store, fingerprint).chapters
        bins += _count_bins(store, fingerprint, order, missing, chapters)
        keep_bins(store, fingerprint, order, bins)
    return bins[:epochs]


def _count_bins(store: Store, fingerprint: str, order: Order, epochs: range, chapters: int) -> list[EpochBins]:
    bins = {epoch: [list[int]()] * chapters for epoch in epochs}
    for chapter in range(chapters):  # one at a time is in memory
        data = open_chapter(store, fingerprint, chapter)
        for epoch in epochs:
            turn = turns(chapters, order.seed, epoch).index(chapter)
            plan = EpochPlan(data.offsets, data.blocks, data.block_sources, order, epoch, turn)
            bins[epoch][turn] = plan.count_bins()
    for epoch, counted in bins.items():
        if not bins_in(counted):
            raise nothing_visited(epoch, order)
    return list(bins.values())
