"""The bins of a run's epochs, which are counted once and kept beside the data, and the optimizer's steps that they make."""

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import Any

from trainer.data.dataset.manifest import Count, Record, unsealed
from trainer.data.order.settings import Order
from trainer.errors import Damaged, NotFound
from trainer.run import layout
from trainer.store import Store


class Bins(Record):
    """Bins of each epoch of a data set in an order."""

    order: dict[str, Any]
    bins: list[Count]


def kept_bins(store: Store, fingerprint: str, order: Order) -> list[int]:
    """Bins of each of the first epochs, as far as an earlier start has counted them."""
    folder, key = store.sub(layout.dataset(fingerprint)), _bins_key(order)
    try:
        return unsealed(Bins, folder.get(key), f"{folder.uri}/{key}").bins
    except (NotFound, Damaged):  # what is damaged is counted again
        return []


def keep_bins(store: Store, fingerprint: str, order: Order, bins: list[int]) -> None:
    """Keep the bins of the first epochs for `kept_bins`."""
    folder = store.sub(layout.dataset(fingerprint))
    folder.put(_bins_key(order), Bins(order=order.to_json(), bins=bins).sealed())


def _bins_key(order: Order) -> str:
    settings = json.dumps(order.to_json(), sort_keys=True)
    return f"bins-{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"


def steps_of_epochs(epoch_bins: Sequence[int], epochs: Fraction, global_batch: int) -> int:
    """Optimizer steps of `epochs`: of the last one, where only a part of it is asked for, its first steps, rounded up to whole ones.

    `epochs` is the very number that was given: 2.1 epochs of 30 steps are 63 steps, and would be 64 by the nearest binary numbers.
    """
    whole = [-(-bins // global_batch) for bins in epoch_bins]
    return sum(ceil(steps * min(Fraction(1), epochs - epoch)) for epoch, steps in enumerate(whole))
