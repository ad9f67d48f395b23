"""From a run's configuration to compiled data: finds the sources, names the result, compiles what is missing.

Happens before a process group exists: compiling can take long, and a collective would time out meanwhile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.base import Base
from trainer.config import Config, Source
from trainer.data.compile import Progress, compile_dataset, fingerprint, hash_tokenizer
from trainer.data.dataset import Dataset, open_dataset
from trainer.data.sources import expand
from trainer.errors import NotFound
from trainer.store import Store


@dataclass(frozen=True)
class Datasets:
    """Fingerprints of a run's compiled data, which any rank can open from the store."""

    train: str
    eval: str | None


def prepare(
    config: Config, base: Base, store: Store, progress: Callable[[str, Progress], None] = lambda what, progress: None
) -> Datasets:
    """Compile the run's training and evaluation data unless the store has them; `progress` gets "train" or "eval" too.

    Raises:
        DataError: a source is missing, unreadable, or holds nothing to learn from.
    """

    def ready(what: str, sources: Sequence[Source]) -> str:
        return _compiled(config, base, store, what, sources, lambda now: progress(what, now)).manifest.fingerprint

    return Datasets(ready("train", config.data.train), ready("eval", config.data.eval) if config.data.eval else None)


def _compiled(
    config: Config, base: Base, store: Store, what: str, sources: Sequence[Source], progress: Callable[[Progress], None]
) -> Dataset:
    files = expand(sources, f"data.{what}")
    key = fingerprint(config.data, files, hash_tokenizer(base.directory))
    try:
        return open_dataset(store, key)
    except NotFound:
        from transformers import AutoTokenizer  # seconds of imports, needed only to compile

        tokenizer = AutoTokenizer.from_pretrained(base.directory)
        return compile_dataset(config.data, files, tokenizer, store, key, progress)
