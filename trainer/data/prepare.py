"""From a run's configuration to compiled data: finds the sources, names the result, compiles what is missing.

Happens before a process group exists: compiling can take long, and a collective would time out meanwhile.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer import run_layout
from trainer.base import Base
from trainer.config import Config
from trainer.data.compile import Progress, compile_dataset, fingerprint, hash_tokenizer
from trainer.data.dataset import Dataset, Manifest, open_dataset
from trainer.data.encode import EVERYTHING, Part
from trainer.data.order import EpochPlan, Order
from trainer.data.pool import Mapper, mapper_for
from trainer.data.sources import SourceFile, expand
from trainer.errors import DataError, NotFound
from trainer.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Input = tuple[list[SourceFile], Part]


@dataclass(frozen=True)
class Datasets:
    """Fingerprints of a run's compiled data, which any rank can open from the store.

    `epoch_bins` are the bins of each epoch, where `train.epochs` is what ends the run.
    """

    train: str
    eval: str | None
    epoch_bins: Sequence[int] = ()


def prepare(
    config: Config,
    base: Base,
    store: Store,
    progress: Callable[[str, Progress], None] = lambda what, now: None,
    mapper: Mapper | None = None,
) -> Datasets:
    """Compile the run's training and evaluation data unless the store has them; `progress` gets "train" or "eval" too.

    `mapper` encodes what is not small, by default on this machine's cores.

    Raises:
        DataError: a source is missing, unreadable, or holds nothing to learn from.
    """
    inputs = find(config)
    datasets: dict[str, Dataset] = {}
    for what, key in locate(config, base, inputs).items():
        try:
            datasets[what] = open_dataset(store, key)
        except NotFound:
            files, part = inputs[what]

            def report(now: Progress, what: str = what) -> None:
                progress(what, now)

            tokenizer = load_tokenizer(base)
            who = mapper_for(sum(file.size for file in files), mapper)
            datasets[what] = compile_dataset(config.data, files, tokenizer, store, key, part, who, report)
    order = train_order(config, datasets["train"].manifest)
    bins = _epoch_bins(datasets["train"], order, config.train.epochs, store) if config.train.epochs else []
    held_out = datasets.get("eval")
    return Datasets(datasets["train"].manifest.fingerprint, held_out and held_out.manifest.fingerprint, bins)


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """The base's tokenizer. Takes seconds of imports, so only what reads rows asks for it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.directory)


def find(config: Config) -> dict[str, Input]:
    """The files, and which of their rows, that "train" and, where there is any, "eval" are made of.

    Raises:
        DataError: a source is missing, or of a kind that cannot be read.
    """
    data = config.data
    train = expand(data.train, "data.train")
    inputs = {"train": (train, Part(data.held_out, data.held_out_seed))}
    if data.eval:
        inputs["eval"] = (expand(data.eval, "data.eval"), EVERYTHING)
    elif data.held_out:
        inputs["eval"] = (train, Part(data.held_out, data.held_out_seed, held_out=True))
    return inputs


def wait_until_prepared(
    config: Config, base: Base, store: Store, wait: Callable[[], None] = lambda: time.sleep(2)
) -> None:
    """Return once another process has compiled the run's data into `store`, however long that takes."""
    for key in locate(config, base).values():
        while not _compiled(store, key):
            wait()


def _compiled(store: Store, key: str) -> bool:
    try:
        open_dataset(store, key)
    except NotFound:
        return False
    return True


def locate(config: Config, base: Base, inputs: dict[str, Input] | None = None) -> dict[str, str]:
    """The fingerprints of "train" and, where there is any, "eval": known before anything is compiled."""
    tokenizer = hash_tokenizer(base.directory)
    found = inputs or find(config)
    return {what: fingerprint(config.data, files, tokenizer, part) for what, (files, part) in found.items()}


def train_order(config: Config, manifest: Manifest) -> Order:
    """The order of a run's training data; a source's `fraction` becomes the weight that gives it.

    Raises:
        DataError: a source with a fraction holds nothing.
    """
    given, tokens = config.data.train, [source.tokens for source in manifest.sources]
    plain = sum(source.weight * size for source, size in zip(given, tokens, strict=True) if source.fraction is None)
    total = plain / (1 - sum(source.fraction or 0 for source in given))
    weights = []
    for index, (source, size) in enumerate(zip(given, tokens, strict=True)):
        if source.fraction is None:
            weights.append(source.weight)
        elif size:
            weights.append(source.fraction * total / size)
        else:
            raise DataError(f"data.train[{index}]: has a fraction of {source.fraction}, but no document. Remove it.")
    return Order(tuple(weights), config.data.sequence_length, config.data.packing, config.run.seed)


def eval_order(config: Config, manifest: Manifest) -> Order:
    """Every document once, in an order that the run's seed does not move."""
    return Order((1.0,) * len(manifest.sources), config.data.sequence_length, config.data.packing, seed=0)


def nothing_visited(epoch: int, order: Order, documents: int) -> DataError:
    return DataError(
        f"data.train: epoch {epoch} visits no document, as weights of {', '.join(map(str, order.weights))} are too "
        f"small for {documents} documents. Raise a weight."
    )


def _epoch_bins(dataset: Dataset, order: Order, epochs: int, store: Store) -> list[int]:
    """Bins of each of the first `epochs` epochs: planned once, and kept beside the data for the next start."""
    settings = json.dumps(order.to_json(), sort_keys=True)
    key = f"bins-{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"
    folder = store.sub(run_layout.dataset(dataset.manifest.fingerprint))
    try:
        bins: list[int] = json.loads(folder.get(key))["bins"]
    except NotFound:
        bins = []
    if len(bins) < epochs:
        for epoch in range(len(bins), epochs):
            plan = EpochPlan(dataset.offsets, dataset.blocks, dataset.block_sources, order, epoch)
            bins.append(plan.count_bins())
            if not bins[-1]:
                raise nothing_visited(epoch, order, len(dataset.offsets) - 1)
        folder.put(key, json.dumps({"order": order.to_json(), "bins": bins}).encode())
    return bins[:epochs]
