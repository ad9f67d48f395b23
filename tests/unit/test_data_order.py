import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from trainer.data.order import EpochPlan, permutation, splitmix64
from trainer.data.pack import best_fit_decreasing


def lengths_of(count: int, seed: int = 0, longest: int = 2048) -> np.ndarray:
    """Log-normal lengths, as documents have."""
    uniform = (splitmix64(np.arange(12 * count, dtype=np.uint64) + np.uint64(seed)) >> np.uint64(32)) * 2.0**-32
    normal = uniform.reshape(count, 12).sum(axis=1) - 6
    return np.clip(np.round(2.0 ** (7.5 + 1.25 * normal)), 8, longest).astype(np.int32)


def plan(lengths: np.ndarray, sources: tuple[int, ...] | None = None, **options: Any) -> EpochPlan:
    """`sources` are the numbers of documents of each source."""
    borders, owners, first = [], [], 0
    for source, count in enumerate(sources or (len(lengths),)):
        starts = range(first, first + count, 256)
        borders += starts
        owners += [source] * len(starts)
        first += count
    defaults: dict[str, Any] = {"weights": (1.0,) * (max(owners) + 1), "sequence_length": 2048}
    defaults |= {"seed": 7, "epoch": 0, "packing": True}
    return EpochPlan(
        lengths=lengths,
        blocks=np.array([*borders, first], np.int64),
        block_sources=np.array(owners, np.int32),
        **(defaults | options),
    )


def order(plan: EpochPlan) -> list[list[int]]:
    return [plan.bin(k).tolist() for k in range(plan.num_bins)]


def visits(plan: EpochPlan) -> Counter[int]:
    return Counter(document for members in order(plan) for document in members)


def test_splitmix64_gives_the_published_sequence() -> None:
    """First outputs for the seed 1234567, as in the reference implementation's test vectors."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + gamma * np.arange(3, dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_permutation_holds_everything_once() -> None:
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))
    assert permutation(1000, 1, 2).tolist() != permutation(1000, 2, 1).tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_is_visited_once_and_every_bin_fits(packing: bool) -> None:
    lengths = lengths_of(20_000)
    epoch = plan(lengths, packing=packing)
    assert epoch.num_windows > 1
    assert visits(epoch) == Counter(range(20_000))
    assert all(lengths[members].sum() <= 2048 for members in order(epoch))
    assert packing or epoch.num_bins == 20_000


def test_packing_fills_rows() -> None:
    lengths = lengths_of(16_384)
    epoch = plan(lengths)
    assert lengths.sum() / (epoch.num_bins * 2048) >= 0.99


def test_the_order_is_golden() -> None:
    """A resumed run must find the order it left: a change of this hash breaks every run that is under way."""
    lengths = (8 + splitmix64(np.arange(20_000, dtype=np.uint64)) % np.uint64(1000)).astype(np.int32)
    text = repr(order(plan(lengths, sources=(15_000, 5_000), weights=(1.0, 1.5), epoch=3)))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "e5969027913324435697d10a456634e0986a81e3dbc0665048037fd11acb07b5"
    )


def test_seed_and_epoch_move_the_order_and_nothing_else_does() -> None:
    lengths = lengths_of(3_000)
    first = order(plan(lengths))
    assert order(plan(lengths)) == first
    assert order(plan(lengths, seed=8)) != first
    assert order(plan(lengths, epoch=1)) != first


def test_blocks_stay_in_their_source() -> None:
    epoch = plan(lengths_of(1_000), sources=(300, 700), weights=(1.0, 2.0))
    assert visits(epoch) == Counter({d: 1 if d < 300 else 2 for d in range(1_000)})


@pytest.mark.parametrize("weight", [0.5, 0.3, 1.25, 2.7])
def test_a_fraction_of_a_weight_is_due_over_the_epochs(weight: float) -> None:
    total: Counter[int] = Counter()
    for epoch in range(8):
        seen = visits(plan(lengths_of(2_000), weights=(weight,), epoch=epoch))
        assert abs(sum(seen.values()) / 2_000 - weight) < 0.05
        total += seen
    assert all(abs(total[document] - 8 * weight) < 1 for document in range(2_000))


def test_half_a_weight_takes_the_other_half_next() -> None:
    first, second = (set(visits(plan(lengths_of(2_000), weights=(0.5,), epoch=epoch))) for epoch in (0, 1))
    assert not first & second
    assert len(first | second) == 2_000


def test_bins_before_finds_every_bin() -> None:
    epoch = plan(lengths_of(20_000))
    counts = [len(epoch.window(index).bins) for index in range(epoch.num_windows)]
    assert [epoch.locate(k) for k in range(epoch.num_bins)] == [(w, k) for w, n in enumerate(counts) for k in range(n)]


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    assert best_fit_decreasing([3, 7, 5, 3, 2], capacity=10) == [[1, 0], [2, 3, 4]]
    assert best_fit_decreasing([4, 4, 4], capacity=4) == [[0], [1], [2]]
    assert best_fit_decreasing([], capacity=4) == []
