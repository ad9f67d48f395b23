"""Data that is compiled whole, for tests whose processes need no torch."""

from collections.abc import Sequence
from typing import Any

from trainer.config import Data
from trainer.data.compile.compile import compile_chapters
from trainer.data.dataset.dataset import Dataset, open_dataset
from trainer.data.source.files import SourceFile
from trainer.store.store import Store


def compile_dataset(
    data: Data, files: Sequence[SourceFile], tokenizer: Any, store: Store, key: str, *more: Any, **options: Any
) -> Dataset:
    """All chapters of `compile_chapters`, and the result opened."""
    for _ in compile_chapters(data, files, tokenizer, store, key, *more, **options):
        pass
    return open_dataset(store, key)
