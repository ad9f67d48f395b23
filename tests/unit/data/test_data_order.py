from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order.order import EpochPlan, best_fit_decreasing, permutation, splitmix64, turns
from trainer.data.order.settings import REPEATING_VERSION, VERSION, Order, Position, bins_before

GOLDEN = Path(__file__).parents[2] / "golden/order.txt"


def lengths_of(count: int, longest: int = 2048, median: float = 181) -> np.ndarray:
    """Log-normal lengths, as documents have."""
    uniform = (splitmix64(np.arange(12 * count, dtype=np.uint64)) >> np.uint64(32)) * 2.0**-32
    normal = uniform.reshape(count, 12).sum(axis=1) - 6
    return np.clip(np.round(median * 2.0 ** (1.25 * normal)), 8, longest).astype(np.int64)


def plan(
    lengths: np.ndarray,
    sources: tuple[int, ...] | None = None,
    epoch: int = 0,
    block_documents: int = 256,
    **options: Any,
) -> EpochPlan:
    """`sources` are the numbers of documents of each source."""
    borders, owners, first = [], [], 0
    for source, count in enumerate(sources or (len(lengths),)):
        starts = range(first, first + count, block_documents)
        borders += starts
        owners += [source] * len(starts)
        first += count
    defaults: dict[str, Any] = {"weights": (1.0,) * (max(owners) + 1), "sequence_length": 2048}
    defaults |= {"seed": 7, "packing": True}
    return EpochPlan(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        blocks=np.array([*borders, first], np.int64),
        block_sources=np.array(owners, np.int32),
        order=Order(**(defaults | options)),
        epoch=epoch,
    )


def bins(plan: EpochPlan) -> list[list[int]]:
    windows = (plan.window(index) for index in range(plan.num_windows))
    return [window.bin(k).tolist() for window in windows for k in range(window.num_bins)]


def visits(plan: EpochPlan) -> Counter[int]:
    return Counter(document for members in bins(plan) for document in members)


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
    assert all(lengths[members].sum() <= 2048 for members in bins(epoch))
    assert sum(epoch.count_bins()) == len(bins(epoch))
    assert packing or sum(epoch.count_bins()) == 20_000


def test_packing_fills_rows() -> None:
    """Lengths of a median of 250 tokens into rows of 8,192."""
    lengths = lengths_of(16_384, longest=8192, median=250)
    epoch = plan(lengths, sequence_length=8192)
    assert lengths.sum() / (sum(epoch.count_bins()) * 8192) >= 0.99


@pytest.mark.parametrize(("blocks", "whole"), [(63, False), (64, True)])
def test_blocks_of_a_source_that_fills_a_window_are_read_whole_or_not_at_all(blocks: int, whole: bool) -> None:
    seen = visits(plan(lengths_of(4 * blocks), weights=(0.5,), block_documents=4))
    read = Counter(document // 4 for document in seen)
    assert (set(read.values()) == {4}) == whole
    assert 0.4 < len(seen) / (4 * blocks) < 0.6


def written_order() -> str:
    """Two epochs of 700 documents as text, a line for each bin, so that a change of the order shows as a diff.

    In blocks of four documents: a source at weight 1, one whose documents take turns, and one whose blocks do.
    """
    lengths = (8 + splitmix64(np.arange(700, dtype=np.uint64)) % np.uint64(1000)).astype(np.int64)
    lines = [f"version {REPEATING_VERSION}"]
    for epoch in (0, 3):
        written = plan(lengths, sources=(300, 100, 300), weights=(1.0, 1.5, 0.4), epoch=epoch, block_documents=4)
        for number in range(written.num_windows):
            window = written.window(number)
            lines.append(f"epoch {epoch} window {number} of blocks {' '.join(map(str, window.blocks))}")
            lines += (" ".join(map(str, window.bin(k))) for k in range(window.num_bins))
    return "\n".join(lines) + "\n"


def test_the_order_is_golden() -> None:
    """A resumed run must find the order it left. A change to the golden file needs a new version too.

    `python -m tests.unit.data.test_data_order > tests/golden/order.txt` writes it.
    """
    assert written_order() == GOLDEN.read_text()


def test_orders_without_repeated_visits_are_as_they_ever_were() -> None:
    """The hash was computed before repeated visits were kept apart."""
    lengths = (8 + splitmix64(np.arange(700, dtype=np.uint64)) % np.uint64(1000)).astype(np.int64)
    given: dict[str, Any] = {"sources": (300, 100, 300), "weights": (1.0, 1.0, 0.4), "block_documents": 4}
    found = str([found for epoch in (0, 3) for found in bins(plan(lengths, epoch=epoch, **given))])
    assert sha256(found.encode()).hexdigest() == "07f9453c7dff6c2d0ca14f2c1fa2883903ba4b425a01c1ea378992ea4bfb9e66"
    order = plan(lengths, **given).order
    assert order.to_json()["version"] == VERSION
    assert replace(order, weights=(1.0, 1.5, 0.4)).to_json()["version"] == REPEATING_VERSION
    fractions = (None, None, 0.2)  # which may be several visits of a small source
    assert replace(order, fractions=fractions).to_json()["version"] == REPEATING_VERSION


@pytest.mark.parametrize("weight", [1.5, 2.0, 3.0])
def test_no_bin_holds_a_document_twice(weight: float) -> None:
    lengths = 8 + np.arange(60) * 9
    epoch = plan(lengths, sources=(40, 20), weights=(1.0, weight))
    found = bins(epoch)
    assert all(len(set(members)) == len(members) for members in found)
    assert all(lengths[members].sum() <= 2048 for members in found)
    assert abs(visits(epoch).total() - 40 - 20 * weight) <= 1
    assert len(found) <= -(-int(lengths[[d for b in found for d in b]].sum()) // 2048) + 2, "rows stay full"


def test_a_window_needs_no_other() -> None:
    lengths = lengths_of(40_000)
    whole, alone = plan(lengths), plan(lengths)
    for index in range(whole.num_windows):
        whole.window(index)
    assert bins(whole)[-1] == alone.window(2).bin(alone.window(2).num_bins - 1).tolist()


def test_seed_and_epoch_move_the_order_and_nothing_else_does() -> None:
    lengths = lengths_of(3_000)
    first = bins(plan(lengths))
    assert bins(plan(lengths)) == first
    assert bins(plan(lengths, seed=8)) != first
    assert bins(plan(lengths, epoch=1)) != first


def test_chapters_come_in_another_order_in_each_epoch_and_have_orders_of_their_own() -> None:
    """As they ever did: a resumed run must find them where it left them."""
    assert [turns(6, 1, epoch) for epoch in (0, 1, 2)] == [[0, 1, 2, 3, 4, 5], [1, 4, 2, 3, 5, 0], [0, 3, 5, 1, 4, 2]]
    assert turns(6, 2, 1) == [0, 4, 3, 5, 1, 2], "another seed"
    first = plan(lengths_of(3_000))
    second = bins(replace(first, turn=1))
    assert second != bins(first), "chapters of the same size"
    assert sha256(str(second).encode()).hexdigest().startswith("000754e04ed2b59b2db01502457673fe")


def test_blocks_stay_in_their_source() -> None:
    epoch = plan(lengths_of(1_000), sources=(300, 700), weights=(1.0, 2.0))
    assert visits(epoch) == Counter({d: 1 if d < 300 else 2 for d in range(1_000)})


@pytest.mark.parametrize("documents", [2_000, 20_000], ids=["documents take turns", "blocks take turns"])
@pytest.mark.parametrize("weight", [0.5, 0.3, 1.25, 2.7])
def test_a_fraction_of_a_weight_is_due_over_the_epochs(weight: float, documents: int) -> None:
    total = np.zeros(documents, np.int64)
    for epoch in range(8):
        seen = plan(lengths_of(documents), weights=(weight,), packing=False, epoch=epoch)
        visited = np.concatenate([seen.window(index).documents for index in range(seen.num_windows)])
        assert abs(len(visited) / documents - weight) < 0.05
        total += np.bincount(visited, minlength=documents)
    assert (abs(total - 8 * weight) < 1).all()


def test_half_a_weight_takes_the_other_half_next() -> None:
    first, second = (set(visits(plan(lengths_of(2_000), weights=(0.5,), epoch=epoch))) for epoch in (0, 1))
    assert not first & second
    assert len(first | second) == 2_000


def test_a_small_share_of_a_large_source_reads_few_blocks() -> None:
    epoch = plan(lengths_of(40_000), weights=(0.05,))
    assert epoch.num_windows == 1
    assert len(epoch.window(0).blocks) == 8  # of 157


@given(lengths=st.lists(st.integers(1, 50), max_size=200), capacity=st.integers(50, 120))
def test_best_fit_takes_the_fullest_bin_that_has_room(lengths: list[int], capacity: int) -> None:
    """Against the definition, one document at a time."""
    lengths.sort(reverse=True)
    rooms: list[int] = []
    for length, chosen in zip(lengths, best_fit_decreasing(np.array(lengths, int), capacity).tolist(), strict=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            assert rooms[chosen] == min(fitting)
        else:
            assert chosen == len(rooms)
            rooms.append(capacity)
        rooms[chosen] -= length


if __name__ == "__main__":
    print(written_order(), end="")


@pytest.mark.parametrize(
    ("position", "before"),
    [
        (Position(0), 0),
        (Position(0, 1, 2), 3 + 2),
        (Position(0, chapter=1), 7),
        (Position(0, 1, 2, 1), 7 + 5 + 2),
        (Position(0, 2, 0, 1), 18),
        (Position(0, chapter=2), 18),
    ],
    ids=str,
)
def test_the_bins_before_a_place_are_those_of_the_windows_and_chapters_before(position: Position, before: int) -> None:
    assert bins_before([[3, 4], [5, 6]], position) == before
