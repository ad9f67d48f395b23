"""The order of collectives under NCCL's rules (tests/dist/collectives.py): it comes to an end, and mixed orders do
not.
"""

from pathlib import Path

import pytest

from tests.dist import collectives
from tests.dist.collectives import READS, Begun, Order, stuck

A, B = (Begun(name, (0, 1), "allreduce", 8) for name in "ab")


def test_two_groups_in_two_orders_end_where_a_device_has_a_place_for_both_and_never_where_it_has_one() -> None:
    same: list[Order] = [[A, B, READS], [A, B, READS]]
    other: list[Order] = [[A, B, READS], [B, A, READS]]
    assert stuck(same, 1) is None
    assert stuck(other, 2) is None
    assert stuck(other, 1) == "rank 0 waits in a; rank 1 waits in b"
    assert stuck([[A, READS, B], [B, READS, A]], 2) == "rank 0 waits in a; rank 1 waits in b"
    # Where nothing orders the streams, a card may take either first, whatever its host began first.
    assert stuck(same, 1, reverse=[1]) == "rank 0 waits in a; rank 1 waits in b"
    assert stuck([[A, READS, B], [A, READS, B]], 1, reverse=[1]) is None
    found = stuck([[A], [A._replace(size=4)]], 1)
    assert (
        found
        == "collective 0 of a is another one on every rank: allreduce of 8 bytes by rank 0, allreduce of 4 bytes by"
        " rank 1"
    )


@pytest.mark.long
def test_a_step_of_each_kind_of_group_comes_to_an_end(tmp_path: Path) -> None:
    """python -m tests.dist.collectives has the others."""
    found = collectives.verdicts(tmp_path, ("node, divided adapters, shared rows", "node, divided adapters, experts"))
    assert len(found) == 2
    for name, verdict in found.items():
        assert verdict.is_well, (name, verdict)
        assert verdict.has_neighbours
