"""What is decided for a run's ranks before they join each other."""

import os
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.plan import assemble

RUN = "run: {name: demo}\nmodel: {base: b}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"


class _Joined(Exception):
    pass


@pytest.mark.parametrize(
    ("environment", "overrides", "expected"),
    [(None, (), "1"), ("0", (), "0"), (None, (f"cluster.nccl.{ORDER}=0",), "0")],
)
def test_collectives_of_several_communicators_keep_one_order_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, overrides: tuple[str, ...], expected: str
) -> None:
    def joined(*_: object) -> None:
        raise _Joined

    monkeypatch.setattr(assemble, "join", joined)
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop(ORDER, None)
    if environment is not None:
        os.environ[ORDER] = environment
    with pytest.raises(_Joined):
        assemble.join_run(parse_config(RUN, ("cluster.gpus_per_worker=0", *overrides)))
    assert os.environ[ORDER] == expected


@pytest.mark.parametrize(
    ("overrides", "per_node", "threads"),
    [((), 2, 4), ((), 20, 1), (("cluster.threads_per_worker=3",), 2, 3)],
)
def test_ranks_share_the_cores_of_their_machine_unless_somebody_says_otherwise_and_wait_longer_than_any_limit(
    monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], per_node: int, threads: int
) -> None:
    asked, given = list[Any](), list[int]()

    def joined(*arguments: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(world_size=4, ranks_per_node=per_node)

    def gone(rank: int) -> bool:
        return False

    monkeypatch.setattr(assemble, "join", joined)
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(9)))
    monkeypatch.setattr(os, "environ", {**os.environ})
    config = parse_config(RUN, ("cluster.gpus_per_worker=0", "timeouts={step: 4000, meet: 50}", *overrides))
    assemble.join_run(config, gone)
    assert asked == [(timedelta(seconds=4120), timedelta(seconds=50), gone)]
    assert given == [threads]
    with pytest.raises(ConfigError, match="4 ranks are no multiple of 3"):
        assemble.join_run(parse_config(RUN, ("cluster.gpus_per_worker=0", "sharding.sequence_parallel=3")), gone)


@pytest.mark.parametrize(("even", "memory"), [(True, 80), (False, None)])
def test_a_sharding_is_chosen_by_the_least_memory_of_gpus_where_machines_are_alike(
    monkeypatch: pytest.MonkeyPatch, even: bool, memory: int | None
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(assemble, "most_whole", lambda *_: 7)
    monkeypatch.setattr(assemble, "is_accelerator", lambda device: device == "gpu")
    monkeypatch.setattr(assemble, "build_deepspeed_config", lambda config, **given: given)
    monkeypatch.setattr(assemble, "choose_scope", lambda *given: asked.append(given) or "node")
    monkeypatch.setattr(assemble, "choose_experts_at_once", lambda *given: asked.append(given) or 9)
    world = SimpleNamespace(
        world_size=16, ranks_per_node=8, have_even_nodes=lambda: even, least_device_memory=lambda: 80
    )
    resolved: Any = SimpleNamespace(config="config", base=SimpleNamespace(architecture="base"))
    ranks: Any = SimpleNamespace(world=world, device="gpu")
    given = {"world_size": 16, "accumulation": 3, "on_gpu": True, "whole": 7}
    assert assemble.choose_sharding(resolved, ranks, 3) == assemble.ShardingPlan(given, "node", 9)
    sizes = "config", "base", 16, 8
    assert asked == [(*sizes, memory), (*sizes, "node", memory)]


class _Told:
    """A rank of several machines, which each say something of their copy of the base."""

    def __init__(self, local_rank: int, *others: tuple[str, dict[str, str] | None]) -> None:
        self.local_rank, self._others = local_rank, list(others)
        self.mine: Any = None

    def together(self, action: Callable[[], Any]) -> list[Any]:
        self.mine = action()
        return [*self._others, self.mine]


def test_copies_of_a_base_with_other_weights_are_refused_and_one_in_a_bucket_has_none() -> None:
    def checked(name: str, rank: Any) -> None:
        base: Any = SimpleNamespace(name=name, samples={"a": "1"})
        assemble.check_same_base(base, rank)

    same, other = ("node1", {"a": "1"}), ("node1", {"a": "2"})
    checked("/bases/one", first := _Told(0, same))
    assert first.mine[1] == {"a": "1"}
    checked("/bases/one", second := _Told(1, other, ("node2", None)))
    assert second.mine[1] is None, "the first rank of a machine speaks for its copy"
    with pytest.raises(ConfigError, match=r"^model.base: /bases/one has other weights on .* than on node1\."):
        checked("/bases/one", _Told(0, other))
    checked("s3://bases/one", _Told(0, other))
