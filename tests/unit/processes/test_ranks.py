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
