"""From a run's configuration to compiled data: finds the sources, names the result, compiles what is missing.

Happens before a process group exists: compiling can take long, and a collective would time out meanwhile.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.base import Base
from trainer.config import Config
from trainer.data.compile import Progress, compile_dataset, fingerprint, hash_tokenizer
from trainer.data.dataset import open_dataset
from trainer.data.sources import SourceFile, expand
from trainer.errors import NotFound
from trainer.store import Store


@dataclass(frozen=True)
class Datasets:
    """Fingerprints of a run's compiled data, which any rank can open from the store."""

    train: str
    eval: str | None


def prepare(
    config: Config, base: Base, store: Store, progress: Callable[[str, Progress], None] = lambda what, now: None
) -> Datasets:
    """Compile the run's training and evaluation data unless the store has them; `progress` gets "train" or "eval" too.

    Raises:
        DataError: a source is missing, unreadable, or holds nothing to learn from.
    """
    found = _sources(config)
    keys = locate(config, base, found)
    for what, key in keys.items():
        try:
            open_dataset(store, key)
        except NotFound:
            from transformers import AutoTokenizer  # seconds of imports, needed only to compile

            tokenizer = AutoTokenizer.from_pretrained(base.directory)

            def report(now: Progress, what: str = what) -> None:
                progress(what, now)

            compile_dataset(config.data, found[what], tokenizer, store, key, report)
    return Datasets(keys["train"], keys.get("eval"))


def locate(config: Config, base: Base, found: dict[str, list[SourceFile]] | None = None) -> dict[str, str]:
    """The fingerprints of "train" and, where there is any, "eval": known before anything is compiled."""
    tokenizer = hash_tokenizer(base.directory)
    return {what: fingerprint(config.data, files, tokenizer) for what, files in (found or _sources(config)).items()}


def _sources(config: Config) -> dict[str, list[SourceFile]]:
    sources = {"train": config.data.train, "eval": config.data.eval}
    return {what: expand(given, f"data.{what}") for what, given in sources.items() if given}
