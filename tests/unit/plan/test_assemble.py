"""What is decided for a run's ranks before they join each other."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

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


@dataclass(frozen=True)
class _Resolved:
    config: Any
    base: Any


@pytest.mark.parametrize("gpu", [80, None])
def test_what_depends_on_memory_is_decided_by_that_of_a_gpu_or_else_of_the_host_and_said(
    monkeypatch: pytest.MonkeyPatch, gpu: int | None
) -> None:
    asked, said = list[Any](), list[str]()
    given = parse_config(RUN)
    decided = parse_config(RUN, ["train.activation_checkpointing=20"])
    monkeypatch.setattr(assemble, "settled", lambda *sizes: asked.append(sizes) or decided)
    monkeypatch.setattr(assemble, "idle_settings", lambda *configs: ["a setting has no effect"] * (configs[0] is given))
    ranks: Any = SimpleNamespace(
        world_size=4,
        ranks_per_node=2,
        least_device_memory=lambda: gpu and gpu * 2**30,
        least_host_memory=lambda: 7 * 2**30,
        broadcast=lambda value: value,
    )
    base = SimpleNamespace(layers=32)
    found = assemble.settle(cast(Any, _Resolved(given, SimpleNamespace(architecture=base))), ranks, said.append)
    assert found.config is decided
    assert asked == [(given, base, 4, 2, (gpu or 7) * 2**30)]
    assert said == [
        f"activation checkpointing: 12 of 32 layers (auto, for {gpu or 7}.0 GiB a rank)",
        "a setting has no effect",
    ]
    said.clear()
    assemble.settle(cast(Any, _Resolved(decided, SimpleNamespace(architecture=base))), ranks, said.append)
    assert said == ["activation checkpointing: 12 of 32 layers (as set: 20)"]


@pytest.mark.parametrize(("kept", "again"), [("3", True), ("none", False)])
def test_a_model_is_put_together_of_what_its_settings_name(
    monkeypatch: pytest.MonkeyPatch, kept: str, again: bool
) -> None:
    class Stack(nn.Module):
        at_once = 0

    class Lending(nn.Module):
        """What of the tower learns."""

    loaded, learnt, front = list[Any](), list[Any](), SimpleNamespace()
    model, lending, stack = nn.Module(), Lending(), Stack()
    model.add_module("experts", stack)
    front.learn = lambda lender, again: learnt.append((lender, again))
    config = parse_config(RUN, (f"train.activation_checkpointing={kept}", "run.seed=7", "model.dtype=bf16"))

    def attach(into: nn.Module, architecture: Any, dtype: torch.dtype, seed: int) -> None:
        assert (into, architecture, dtype, seed) == (model, base.architecture, torch.bfloat16, 7)
        model.add_module("seeing", lending)

    method = SimpleNamespace(attach=attach, groups=lambda *given: given, virtual=SimpleNamespace(reserved=2))
    base = SimpleNamespace(architecture=SimpleNamespace(layers=4, padding=5, isolates_documents=False))
    resolved: Any = SimpleNamespace(config=config, base=base, method=method, objective=SimpleNamespace(loss="a loss"))
    ranks: Any = SimpleNamespace(world="world", device="cpu")
    monkeypatch.setattr(assemble, "HeldStack", Stack)
    monkeypatch.setattr(assemble, "Lender", Lending)
    monkeypatch.setattr(assemble, "load_model", lambda *given: loaded.append(given) or (model, "a report"))
    monkeypatch.setattr(assemble, "_front_of", lambda *_: front)
    monkeypatch.setattr(assemble, "PackedModel", lambda *given, **named: (given, named))
    monkeypatch.setattr(assemble, "Engine", lambda *given: given)
    sharding, attention, shares = (
        assemble.ShardingPlan({"stage": 3}, "node", 9),
        cast(Any, "attention"),
        cast(Any, "kept"),
    )
    engine, report = assemble.assemble(resolved, ranks, attention, sharding, print, shares)
    assert report == cast(Any, "a report")
    assert loaded == [(base, config, {"stage": 3}, "world", "attention", "node", print, "kept")]
    assert stack.at_once == 9
    packed = (model, "attention", 2, None), {"padding": 5, "isolates": False, "front": front, "lender": lending}
    assert cast(Any, engine) == (packed, "a loss", (model, config.optim), config.optim, {"stage": 3}, ranks)
    assert learnt == [(lending, again)]


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
