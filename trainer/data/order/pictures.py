"""Reads the pictures of the documents of a row, and makes what the class takes of them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.find.processor import Processor
from trainer.data.dataset.pictures import PICTURE, PictureFiles
from trainer.data.format.known.pictures.sources import decoded
from trainer.model.micro_batch import Seen
from trainer.store.store import Store

_READERS = 8


class PictureReader:
    """Reads the pictures of a compiled data set in `folder`, and gives them to the base's `processor`."""

    def __init__(self, folder: Store, processor: Processor) -> None:
        self._files, self._processor = PictureFiles(folder), processor
        self._pool = ThreadPoolExecutor(_READERS, "pictures")

    def read(
        self, counts: NDArray[Any], values: NDArray[Any], segments: Sequence[int], ids: Sequence[NDArray[np.int32]]
    ) -> tuple[Seen, ...]:
        """The pictures of a row's documents.

        `counts` (documents,) are the pictures of each, `values` (pictures, bytes) their places, and `segments` the
        numbers of the documents among the row's segments, whose tokens are in `ids`.

        Raises `StorageError` or `DataError` if a picture cannot be read, or is not what was compiled.
        """
        places = np.ascontiguousarray(values).view(PICTURE)[:, 0]
        borders = list(accumulate(counts.tolist(), initial=0))
        each = [(segment, places[begin:end]) for segment, (begin, end) in zip(segments, pairwise(borders), strict=True)]
        wanted = [(segment, own, ids[segment]) for segment, own in each if len(own)]
        return tuple(self._pool.map(self._seen, *zip(*wanted, strict=True))) if wanted else ()

    def _seen(self, segment: int, places: Iterable[Any], ids: NDArray[np.int32]) -> Seen:
        pictures = [decoded(self._files.read(place), (place["height"], place["width"])) for place in places]
        return Seen(segment, self._processor.inputs(pictures, ids.tolist()))
