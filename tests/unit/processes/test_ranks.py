"""What ranks tell each other decides the same on all of them."""

import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.errors import CapstanError, ConfigError
from trainer.processes import ranks
from trainer.processes.ranks import World


@dataclass(frozen=True)
class _Second(World):
    """Rank 1 of three. `others` are the failures of ranks 0 and 2, and `nodes` what every rank says of its node."""

    rank: int = 1
    world_size: int = 3
    ranks_per_node: int = 2
    local_rank: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    others: tuple[Any, Any] = (None, None)
    nodes: list[list[float]] = field(default_factory=list)

    def gather(self, *values: float, sums: Tensor | None = None) -> list[list[float]]:
        if self.nodes:
            return self.nodes
        return [[float(self.others[0] is not None), 5.0], list(values), [float(self.others[1] is not None), 7.0]]

    def gather_objects(self, value: Any) -> list[Any]:
        return [self.others[0], value, self.others[1]]


def test_ranks_that_all_succeed_have_the_values_of_all() -> None:
    assert _Second().agree(None, 6.0) == [[5.0], [6.0], [7.0]]


@pytest.mark.parametrize(
    ("mine", "others", "kind", "said"),
    [
        (None, (None, ConfigError("wrong")), ConfigError, "wrong"),
        (ConfigError("mine"), (None, ConfigError("wrong")), ConfigError, "mine"),
        (ConfigError("mine"), (ConfigError("first"), None), ConfigError, "first"),
        (None, (None, "KeyError: 'a'"), CapstanError, "rank 2 failed: KeyError: 'a'"),
        (ConfigError("mine"), ("KeyError: 'a'", None), CapstanError, "rank 0 failed: KeyError: 'a'"),
        (KeyError("mine"), (ConfigError("first"), None), KeyError, "'mine'"),
    ],
)
def test_the_first_failure_is_raised_on_all_ranks_and_a_bug_where_it_happened(
    mine: Exception | None, others: tuple[Any, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as found:
        _failing(_Second(others=others), mine)
    assert type(found.value) is kind
    assert str(found.value) == said


def _failing(rank: World, failure: Exception | None) -> None:
    with rank.agreeing():
        if failure is not None:
            raise failure


@pytest.mark.parametrize(
    ("nodes", "even"),
    [
        ([[2, 0], [2, 1], [2, 0], [2, 1]], True),
        ([[2, 0], [2, 1], [1, 0]], False),
        ([[2, 1], [2, 0]], False),
        ([[3, 0], [3, 1], [3, 2]], False),
    ],
)
def test_nodes_are_even_if_each_has_as_many_ranks_in_a_row(nodes: list[list[float]], even: bool) -> None:
    assert _Second(nodes=nodes).have_even_nodes() is even


@dataclass(frozen=True)
class _Alone(_Second):
    """A rank whose tensors are those of all ranks. It is in the groups that it is told the members of."""

    gather = World.gather

    def gather_tensor(self, mine: Tensor) -> Tensor:
        return torch.stack([mine, -mine])

    def _group(self, size: int, members: range) -> Any:
        return size, list(members)


def test_values_of_the_host_and_of_the_device_are_gathered_in_their_order() -> None:
    sums = torch.tensor([4.0, 5.0], dtype=torch.float64)
    begun = _Alone().begin_gather(1.0, torch.tensor(2.5), 3.0, torch.tensor(0.5), sums=sums)
    assert begun() == [[1.0, 2.5, 3.0, 0.5, 4.0, 5.0], [-1.0, -2.5, -3.0, -0.5, -4.0, -5.0]]
    assert _Alone().gather(7.0) == [[7.0], [-7.0]]


def test_a_total_leaves_the_ranks_own_counts_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda counts, group: counts.add_(10))
    mine = torch.tensor([1, 2])
    assert _Second().total(mine).tolist() == [11, 12]
    assert mine.tolist() == [1, 2]


@pytest.mark.parametrize(("rank", "beside", "across"), [(0, [0, 1, 2], [0, 3, 6]), (5, [3, 4, 5], [2, 5, 8])])
def test_ranks_are_in_groups_of_consecutive_ones_and_with_those_of_their_number_in_each(
    rank: int, beside: list[int], across: list[int]
) -> None:
    world = _Alone(rank=rank, world_size=9)
    assert (world.group_of(3), world.group_across(3)) == ((3, beside), (3, across))


class _Store:
    """A store of a meeting to which nobody comes any more, and the time that waits for what is not there take."""

    def __init__(self, *here: int) -> None:
        self.values, self.now = {f"attempt-0/here-{rank}": b"" for rank in here}, 0.0

    def list_keys(self) -> list[str]:
        return list(self.values)

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def wait(self, keys: list[str], limit: timedelta) -> None:
        if any(key not in self.values for key in keys):
            self.now += limit.total_seconds()
            raise ranks.dist.DistStoreError


def test_a_meeting_ends_as_soon_as_one_of_the_missing_ranks_is_gone_and_names_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store: Any = _Store(0, 2)
    monkeypatch.setattr(ranks.time, "monotonic", lambda: store.now)
    limit = timedelta(seconds=100)
    assert ranks._waited_for(store, 4, limit, lambda rank: rank == 3) == [1, 3]
    assert store.now == 5, "it was looked for after the first attempt"
    assert ranks._waited_for(store, 4, limit, None) == [1, 3], "as whoever found it has said"
    store = _Store(0, 2)
    assert ranks._waited_for(store, 4, limit, None) == [1, 3]
    assert store.now == 100, "the time is up"


def test_a_cpu_has_no_memory_of_a_device_and_a_name() -> None:
    assert (_Second().device_name, _Second().least_device_memory()) == ("cpu", None)


def test_the_least_host_memory_is_that_of_the_rank_with_the_least() -> None:
    assert _Second(nodes=[[3.5], [2.0], [9.0]]).least_host_memory() == 2


def test_each_attempt_of_torchrun_meets_apart_from_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"ADDR": "127.0.0.1", "PORT": str(port)}.items():
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    store = ranks._meet(0, 1, timedelta(seconds=10), lambda _: False, looks=False)
    client = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
    assert client.check(["attempt-3/here-0"])
    assert store.check(["here-0"])


def test_a_part_of_a_groups_variables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK is set .*, but not MASTER_ADDR or MASTER_PORT"):
        ranks.join()
