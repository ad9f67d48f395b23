"""From a run's configuration to compiled data: finds the sources, names the result, compiles what is missing.

Happens before a process group exists: compiling can take long, and a collective would time out meanwhile. If the
data has several chapters, a run needs only the first one to start; the process that owns its ranks may compile the
others beside them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.base.locate import Base
from trainer.base.tokenizer import read_tokenizer
from trainer.config import Config, Data, Source, Train
from trainer.config.data import LIKELY
from trainer.config.evaluation import UNNAMED
from trainer.data.compile import Progress, compile_chapters, count_chapters, fingerprint, hash_tokenizer
from trainer.data.dataset import MANIFEST, open_chapter, read_manifest
from trainer.data.detection import describe_forms, with_forms
from trainer.data.encode import EVERYTHING, Part
from trainer.data.labelled import one_kind
from trainer.data.manifest import Count, DatasetManifest, Record, damaged, unsealed
from trainer.data.order import EpochPlan, Order, turns
from trainer.data.pool import Mapper, mapper_for
from trainer.data.sources import SourceFile, expand
from trainer.data.weights import find_weights, keep_weights, kept_weights
from trainer.errors import CapstanError, Damaged, DataError, NotFound
from trainer.objective.objective import find_objective, segments_of
from trainer.run import layout
from trainer.store import Store
from trainer.tuning.method import method_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Input(NamedTuple):
    """The files of a data set, which of their rows it has, and the settings that they are read by."""

    files: list[SourceFile]
    part: Part
    data: Data


@dataclass(frozen=True)
class Datasets:
    """Fingerprints of a run's compiled data, which any rank can open from the store.

    `epoch_bins` are the bins of each epoch, where `train.epochs` is what ends the run, of which the last may be a part only; `sets` are those of `eval.sets`, by name.
    """

    train: str
    eval: str | None
    epoch_bins: Sequence[int] = ()
    sets: Mapping[str, str] = field(default_factory=dict)

    def steps(self, train: Train) -> int:
        """Optimizer steps of the run: those that are asked for, or those of its epochs."""
        return train.steps or steps_of_epochs(self.epoch_bins, Fraction(str(train.epochs)), train.global_batch)


_SETS = "eval.sets."
OnProgress = Callable[[str, Progress], None]


def prepare(
    config: Config,
    base: Base,
    store: Store,
    progress: OnProgress = lambda what, now: None,
    mapper: Mapper | None = None,
) -> Datasets:
    """Compile the run's training and evaluation data unless the store has them; `progress` gets the name in `find` too.

    `mapper` encodes what is not small, by default on this machine's cores.

    Raises:
        DataError: a source is missing, unreadable, or holds nothing to learn from.
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

    It yields the number of each chapter, and is empty where the data is one chapter, or where `train.epochs` ends the run: then
    all bins have to be counted first.
    """
    inputs = find(config)
    for what, sources in (("train", config.data.train), ("eval", config.data.eval)):
        if forms := describe_forms(config.data, sources, inputs[what][0]) if sources else []:
            progress(what, Progress(0, sum(file.size for file in inputs[what][0]), forms=forms))
    keys = locate(config, base, store, inputs, progress)
    compiling = {
        what: _compile(config, base, store, what, key, inputs[what], progress, mapper) for what, key in keys.items()
    }
    rest = compiling.pop("train")
    for evaluated in compiling.values():
        for _ in evaluated:
            pass
    next(rest)
    bins: list[int] = []
    if config.train.epochs:
        for _ in rest:
            pass
        bins = _epoch_bins(store, keys["train"], train_order(config), ceil(config.train.epochs))
    return Datasets(keys["train"], keys.get("eval"), bins, named(keys)), rest


def prepare_evaluated(
    config: Config, base: Base, store: Store, progress: OnProgress = lambda what, now: None
) -> dict[str, str]:
    """Compile the evaluation data alone; returns its fingerprints by the names of the sets, that of `data.eval` as "eval"."""
    inputs = find_evaluated(config)
    keys = locate(config, base, store, inputs, progress)
    for what, key in keys.items():
        for _ in _compile(config, base, store, what, key, inputs[what], progress, None):
            pass
    return ({UNNAMED: keys[UNNAMED]} if UNNAMED in keys else {}) | named(keys)


def _compile(
    config: Config,
    base: Base,
    store: Store,
    what: str,
    key: str,
    given: Input,
    progress: OnProgress,
    mapper: Mapper | None,
) -> Iterator[int]:
    """Each chapter's number once it is compiled; the last one's where all are already."""
    files, part, data = given
    last = count_chapters(files) - 1
    chapters = iter([last])
    if not _is_compiled(store, key):
        report = partial(progress, what)
        who = mapper_for(sum(file.size for file in files), mapper)
        chapters = compile_chapters(data, files, load_tokenizer(base), store, key, part, who, report)
    for chapter in chapters:
        if chapter == last:
            manifest = read_manifest(store, key)
            if len(manifest.sources) != files[-1].source + 1:
                where = f"{store.sub(layout.dataset(key)).uri}/{MANIFEST}"
                raise damaged(where, f"it has {len(manifest.sources)} sources, and the data {files[-1].source + 1}")
            if what == "train":
                _check_fractions(config, manifest)
                _check_labels(manifest)
        yield chapter


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """The run's tokenizer. Takes seconds of imports, so only what reads rows asks for it."""
    return read_tokenizer(base.directory, base.name, base.added_tokens)


def find(config: Config) -> dict[str, Input]:
    """The files, and which of their rows, that "train" and, where there is any, "eval" are made of, and each of the
    `eval.sets`, such as "eval.sets.general".

    Raises:
        ConfigError: the objective cannot learn from the rows of a source.
        DataError: a source is missing, or of a kind that cannot be read.
    """
    train = find_train(config)
    return {"train": train} | find_evaluated(config, train.files)


def find_train(config: Config) -> Input:
    """The part of `find` that is trained on."""
    data = config.data
    return Input(_read(config, data, data.train, "data.train"), Part(data.held_out, data.held_out_seed), data)


def find_evaluated(config: Config, train: list[SourceFile] | None = None) -> dict[str, Input]:
    """The part of `find` that is never trained on. `train` are the files of `data.train`, where they are known already."""
    data, inputs = config.data, dict[str, Input]()
    if data.eval:
        inputs["eval"] = Input(_read(config, data, data.eval, "data.eval"), EVERYTHING, data)
    elif data.held_out:
        files = _read(config, data, data.train, "data.train") if train is None else train
        inputs["eval"] = Input(files, Part(data.held_out, data.held_out_seed, held_out=True), data)
    sets = {f"{_SETS}{name}": given.data(data) for name, given in config.eval.sets.items()}
    return inputs | {
        what: Input(with_forms(config, data, expand(data.train, what), data.train, what, LIKELY), EVERYTHING, data)
        for what, data in sets.items()
    }


def as_trained(config: Config) -> Data:
    """The settings of the data with the kind of the training rows in the place of `format: auto`: that of conversations where there
    are any. As they are where the rows cannot be read here and now, or are answers to be judged."""
    data = config.data
    if data.format != "auto":
        return data
    try:
        found = {file.form.kind for file in _read(config, data, data.train, "data.train") if file.form}
    except CapstanError:
        return data
    kind = next((kind for kind in LIKELY if kind in found), data.format)
    return data.model_copy(update={"format": kind})


def _read(config: Config, data: Data, sources: Sequence[Source], setting: str) -> list[SourceFile]:
    kinds = find_objective(config).formats
    return with_forms(config, data, expand(sources, setting), sources, setting, kinds)


def named(keys: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints of `eval.sets` among those of `locate`, by the names of the sets."""
    return {what.removeprefix(_SETS): key for what, key in keys.items() if what.startswith(_SETS)}


def config_of_set(config: Config, name: str) -> Config:
    """The settings of a run over one of `eval.sets` alone, by which its compiled rows are packed."""
    return config.model_copy(update={"data": config.eval.sets[name].data(config.data)})


def wait_until_prepared(config: Config, base: Base, store: Store, wait: Callable[[], None]) -> None:
    """Return once another process has compiled the run's data into `store`; `wait` is called between two looks."""
    for files, part, data in find(config).values():
        name = partial(fingerprint, data, files, hash_tokenizer(base.directory, base.added_tokens), part)
        while (weighted := kept_weights(store, name()) if _may_have_weights(files) else False) is None:
            wait()
        while not _is_compiled(store, name(weighted)):
            wait()


def _is_compiled(store: Store, key: str) -> bool:
    try:
        read_manifest(store, key)
    except NotFound:
        return False
    return True


def locate(
    config: Config,
    base: Base,
    store: Store,
    inputs: dict[str, Input] | None = None,
    progress: OnProgress = lambda what, now: None,
    keep: bool = True,
) -> dict[str, str]:
    """The fingerprint of each of the data sets of `find`: known before anything is compiled.

    The rows of conversations are looked through for weights, once: what is found is kept in the store if `keep` says so.

    Raises:
        DataError: a source is missing, or a file as a whole is damaged.
    """
    tokenizer = hash_tokenizer(base.directory, base.added_tokens)
    keys: dict[str, str] = {}
    found: dict[tuple[SourceFile, ...], bool] = {}  # the same files may be split between both
    for what, (files, part, data) in (find(config) if inputs is None else inputs).items():
        keys[what] = plain = fingerprint(data, files, tokenizer, part)
        if not _may_have_weights(files):
            continue
        weighted = kept_weights(store, plain)
        if weighted is None:
            same, size = tuple(files), sum(file.size for file in files)
            if same not in found:
                show = partial(_show_reading, progress, what, size)
                found[same] = find_weights(files, show)
            weighted = found[same]
            if keep:
                keep_weights(store, plain, weighted)
        if weighted:
            keys[what] = fingerprint(data, files, tokenizer, part, weighted)
    return keys


def _may_have_weights(files: Sequence[SourceFile]) -> bool:
    return any(file.form is not None and file.form.kind == "chat" for file in files)


def _show_reading(progress: OnProgress, what: str, size: int, read: int) -> None:
    progress(what, Progress(min(read, size), size))


def train_order(config: Config) -> Order:
    """The order of a run's training data."""
    data = config.data
    weights, fractions = (source.weight for source in data.train), (source.fraction for source in data.train)
    return Order(
        tuple(weights),
        data.sequence_length,
        data.packing,
        config.run.seed,
        tuple(fractions),
        reserved=method_of(config).virtual.reserved,
        segments=segments_of(config),
    )


def eval_order(config: Config, manifest: DatasetManifest) -> Order:
    """Every document once, in an order that the run's seed does not move."""
    return replace(train_order(config), weights=(1.0,) * len(manifest.sources), fractions=(), seed=0)


def _check_fractions(config: Config, manifest: DatasetManifest) -> None:
    """A chapter may lack a source, but not all of them."""
    for index, (source, found) in enumerate(zip(config.data.train, manifest.sources, strict=True)):
        if source.fraction is not None and not found.tokens:
            raise DataError(f"data.train[{index}]: has a fraction of {source.fraction}, but no document. Remove it.")


def _check_labels(manifest: DatasetManifest) -> None:
    desired = manifest.counters.desired
    if desired is not None and (sentence := one_kind(desired, manifest.documents)):
        raise DataError(sentence)


def steps_of_epochs(epoch_bins: Sequence[int], epochs: Fraction, global_batch: int) -> int:
    """Optimizer steps of `epochs`: of the last one, where only a part of it is asked for, its first steps, rounded up to whole ones.

    `epochs` is the very number that was given: 2.1 epochs of 30 steps are 63 steps, and would be 64 by the nearest binary numbers.
    """
    whole = [-(-bins // global_batch) for bins in epoch_bins]
    return sum(ceil(steps * min(Fraction(1), epochs - epoch)) for epoch, steps in enumerate(whole))


def nothing_visited(epoch: int, order: Order) -> DataError:
    return DataError(
        f"data.train: epoch {epoch} visits no document, as weights of {', '.join(map(str, order.weights))} are too "
        "small for so few documents. Raise a weight."
    )


class Bins(Record):
    """Bins of each epoch of a data set in an order."""

    order: dict[str, Any]
    bins: list[Count]


def _epoch_bins(store: Store, fingerprint: str, order: Order, epochs: int) -> list[int]:
    """Bins of each of the first `epochs` epochs: planned once, and kept beside the data for the next start."""
    bins = kept_bins(store, fingerprint, order)
    if missing := range(len(bins), epochs):
        chapters = read_manifest(store, fingerprint).chapters
        bins += _count_bins(store, fingerprint, order, missing, chapters)
        store.sub(layout.dataset(fingerprint)).put(_bins_key(order), Bins(order=order.to_json(), bins=bins).sealed())
    return bins[:epochs]


def kept_bins(store: Store, fingerprint: str, order: Order) -> list[int]:
    """Bins of each of the first epochs, as far as an earlier start has counted them."""
    folder, key = store.sub(layout.dataset(fingerprint)), _bins_key(order)
    try:
        return unsealed(Bins, folder.get(key), f"{folder.uri}/{key}").bins
    except (NotFound, Damaged):  # what is damaged is counted again
        return []


def _bins_key(order: Order) -> str:
    settings = json.dumps(order.to_json(), sort_keys=True)
    return f"bins-{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"


def _count_bins(store: Store, fingerprint: str, order: Order, epochs: range, chapters: int) -> list[int]:
    bins = dict.fromkeys(epochs, 0)
    for chapter in range(chapters):  # one at a time is in memory
        data = open_chapter(store, fingerprint, chapter)
        for epoch in epochs:
            turn = turns(chapters, order.seed, epoch).index(chapter)
            bins[epoch] += EpochPlan(data.offsets, data.blocks, data.block_sources, order, epoch, turn).count_bins()
    for epoch, count in bins.items():
        if not count:
            raise nothing_visited(epoch, order)
    return list(bins.values())
