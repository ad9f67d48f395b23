"""A start asks a bucket for each byte once, by few requests, however many ranks there are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.starts import BASES, CountedBase, Start, groups, meeting
from trainer.base.find import locate
from trainer.base.partitions import filling
from trainer.processes.ranks import World


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], CountedBase]:
    """A base of benchmarks/scale.py with some of its layers."""

    def make(name: str, layers: int) -> CountedBase:
        monkeypatch.setattr(locate, "open_store", locate.open_store)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        hub_id, files = BASES[name]
        return CountedBase(name, hub_id, min(files, 2 * layers), tmp_path, layers)

    return make


def broken(starts: list[Start]) -> list[str]:
    return [sentence for start in starts for sentence in start.broken() if "metadata requests" not in sentence]


@pytest.mark.parametrize(("name", "layers"), [("405B", 1), ("1T mixture", 2)])
def test_a_thousand_ranks_read_a_base_once_by_few_requests(
    counted: Callable[[str, int], CountedBase], name: str, layers: int
) -> None:
    """And those of two nodes, from its files and from the cache of it."""
    base = counted(name, layers)
    starts = [
        base.start(ranks, scope, cached=cached)
        for ranks, scope in ((16, "world"), (16, "node"), (1024, "world"), (1024, "node"))
        for cached in (False, True)
    ]
    assert broken(starts) == []
    for start in starts:
        assert start.bytes <= start.read
        assert start.most_of_a_rank <= 3 + 2 * start.gets / start.ranks, "others wait for one rank"


def test_the_bound_is_broken_if_each_rank_asks_for_its_own_bytes(
    counted: Callable[[str, int], CountedBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = counted("405B", 1)
    monkeypatch.setattr(filling, "sharing_ranks", lambda size, readers: 1)
    assert any("GETs are" in sentence for sentence in broken([base.start(1024, "world", cached=False)]))


@pytest.mark.long
def test_ranks_meet_by_a_few_requests_each() -> None:
    found = meeting(64, 12)
    assert found.requests <= 6 * found.ranks


def test_a_rank_asks_four_times_at_most_for_a_group_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    found = groups(256)
    assert (found.most_of_a_rank, found.broken()) == (4, [])
    assert found.requests <= 6.5 * found.ranks

    def all_groups(self: World, size: int) -> object:
        """As if every rank took part in the making of each."""
        made = [self._group(size, range(first, first + size)) for first in range(0, self.world_size, size)]
        return made[0]

    monkeypatch.setattr(World, "_group", lambda self, size, members: dist.new_group(list(members)))
    monkeypatch.setattr(World, "group_of", all_groups)
    assert groups(256).broken() == ["256 ranks: a rank asks 96 times for a group, allowed 4"]
