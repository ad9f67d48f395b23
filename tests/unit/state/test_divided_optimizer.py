"""What the engine adds to a step and to a pass: tensors that DeepSpeed moves, and gradients of some parameters; and how
ranks complete the partitions that they hold together.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainer.config import Optim
from trainer.state.optimizer import FlatPart
from trainer.state.zero import engine, partition
from trainer.state.zero.division import Division
from trainer.state.zero.engine import DividedOptimizer, Engine
from trainer.state.zero.partition import Partition, Partitioner


def test_a_step_updates_what_has_a_gradient_where_deepspeed_has_it_now() -> None:
    first, second = torch.ones(3), torch.ones(2)
    optim = Optim(lr=0.5, weight_decay=0.0, eps=1e-8)
    groups = [{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.25}]
    ranks: Any = None
    optimizer = DividedOptimizer(groups, optim, ranks)
    for values in (first, second):
        optimizer.divide(values, [FlatPart(tuple(values.shape), len(values), 0, len(values), 0)])
    before = first.data
    first.data = torch.full((3,), 2.0)
    first.grad = torch.tensor([1.0, -1.0, 4.0])
    optimizer.step()
    assert first.tolist() == pytest.approx([1.5, 2.5, 1.5]), "AdamW's first step is the learning rate, by the sign"
    assert (before.tolist(), second.tolist()) == ([1, 1, 1], [1, 1])
    second.grad = torch.ones(2)
    optimizer.step()
    assert second.tolist() == pytest.approx([0.75, 0.75]), "its own first step"
    assert [int(optimizer.state[values]["step"]) for values in (first, second)] == [2, 1]
    assert optimizer.whole(second)["exp_avg"].any()
    assert optimizer.parts(second)[0].states["exp_avg"].data_ptr() == optimizer.whole(second)["exp_avg"].data_ptr()


@pytest.mark.parametrize(("how", "wanted"), [("sum", [4.0, 6.0]), ("max", [3.0, 4.0])])
def test_what_lies_on_the_host_is_reduced_on_the_ranks_device_over_its_group(
    monkeypatch: pytest.MonkeyPatch, how: Any, wanted: list[float]
) -> None:
    asked = list[Any]()

    def all_reduce(values: torch.Tensor, operation: Any, group: str) -> None:
        asked.append((values.dtype, group))
        other = torch.tensor([3.0, 2.0]).to(values.dtype)
        values.copy_(values + other if operation == dist.ReduceOp.SUM else values.maximum(other))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    ranks: Any = SimpleNamespace(device=torch.float64, group="ours")  # a copy elsewhere, as on a GPU
    values = torch.tensor([1.0, 4.0])
    DividedOptimizer([{"params": [torch.ones(1)]}], Optim(), ranks)._reduce(values, how)
    assert (values.tolist(), asked) == (wanted, [(torch.float64, "ours")])


@pytest.mark.parametrize(("limit", "chosen"), [(0, ["a"]), (19, ["a"]), (20, ["a", "c"]), (36, ["a", "c", "d"])])
def test_gradients_of_a_row_are_of_the_first_parameters_that_fit_and_of_one_at_least(
    limit: int, chosen: list[str]
) -> None:
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.full((n,), 2.0)) for name, n in {"a": 3, "b": 9, "c": 2, "d": 4}.items()}
    )
    model["b"].requires_grad_(False)
    for parameter in model.values():
        parameter.ds_numel = parameter.numel()  # type: ignore[attr-defined]
    model["a"].grad = torch.ones(3)
    done = list[Any]()

    def loss(row: str) -> torch.Tensor:
        done.append(row)
        unused = ("c",) if limit == 36 else ()
        return torch.stack([sum(p.square().sum() for n, p in model.items() if n not in unused), torch.tensor(0.0)])  # type: ignore[list-item]

    made: Any = SimpleNamespace(
        model=model,
        ranks=SimpleNamespace(device="here"),
        _engine=SimpleNamespace(module=loss),
        _gathers=SimpleNamespace(begin=done.append, finish=lambda: done.append("finished")),
    )
    row: Any = SimpleNamespace(to=lambda device: f"row {device}")
    found = Engine.gradients(made, row, limit)
    if limit == 36:  # what the loss does not depend on has none
        chosen = ["a", "d"]
    assert {name: one.tolist() for name, one in found.items()} == {name: [4.0] * model[name].numel() for name in chosen}
    assert done == ["loss", "row here", "finished"]
    assert model["a"].grad.tolist() == [1, 1, 1], "those of the step stay"


def test_a_step_has_the_rate_of_each_group_and_gives_the_norm_before_what_stays_whole_is_used_again() -> None:
    done = list[str]()
    groups = [{"lr_ratio": 1.0}, {"lr_ratio": 4.0}]
    deepspeed = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=groups),
        step=lambda: done.append(f"updated at {groups[0]['lr']} and {groups[1]['lr']}"),
        get_global_grad_norm=lambda: torch.tensor(3.0),
    )
    made: Any = SimpleNamespace(
        clock=SimpleNamespace(enter=done.append),
        _engine=deepspeed,
        _gathers=SimpleNamespace(gather_whole=lambda: done.append("gathered")),
    )
    assert Engine.step(made, 0.25) == 3.0
    assert done == ["optimizer", "updated at 0.25 and 1.0", "gathered"]


@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_summed_over_the_ranks_and_the_last_pass_of_a_step_ends_it(last: bool) -> None:
    done = list[Any]()
    deepspeed = SimpleNamespace(
        set_gradient_accumulation_boundary=done.append,
        backward=lambda loss, *, scale_wrt_gas: done.append((float(loss), scale_wrt_gas)),
    )
    made: Any = SimpleNamespace(
        clock=SimpleNamespace(enter=done.append),
        ranks=SimpleNamespace(world_size=3),
        _engine=deepspeed,
        _gathers=SimpleNamespace(finish=lambda: done.append("finished")),
    )
    Engine.backward(made, torch.tensor(2.0), last=last)
    assert done == ["backward", last, (6.0, False), "finished"], "DeepSpeed divides by the ranks"


def test_logits_are_computed_without_dropout_and_without_a_graph() -> None:
    done = list[Any]()
    packed = SimpleNamespace(logits=lambda tokens: done.append(torch.is_grad_enabled()) or tokens + 1)
    made: Any = SimpleNamespace(
        _engine=SimpleNamespace(module=SimpleNamespace(packed=packed), train=lambda on: done.append(f"dropout {on}")),
        _gathers=SimpleNamespace(begin=done.append),
    )
    made.evaluating = lambda: Engine.evaluating(made)
    assert Engine.logits(made, torch.tensor([[1]])).tolist() == [[2]]
    assert done == ["logits", "dropout False", False, "dropout True"]


def test_the_work_of_a_tower_is_counted_where_there_is_one() -> None:
    count: Any = Engine.seeing_operations.fget
    for front, operations in ((None, 0), (SimpleNamespace(operations=SimpleNamespace(all=7)), 7)):
        packed = SimpleNamespace(front=front)
        assert count(SimpleNamespace(_engine=SimpleNamespace(module=SimpleNamespace(packed=packed)))) == operations


def test_deepspeed_is_told_the_number_of_the_ranks_device_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device, number in (("cuda:1", "1"), ("cpu", "0")):
        with pytest.raises(ValueError, match="no engine"), engine._own_device(torch.device(device)):  # noqa: PT012
            assert os.environ["LOCAL_RANK"] == number
            raise ValueError("no engine")
        assert os.environ["LOCAL_RANK"] == "3"


def test_modules_are_whole_while_they_compute_even_in_a_pass_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, most = set[str](), list[set[str]]()

    @contextmanager
    def gathered(module: Any) -> Iterator[None]:
        whole.add(module.name)
        yield
        whole.remove(module.name)

    class Layer(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: int) -> int:
            most.append({*whole})
            return 1 // x

    monkeypatch.setattr(engine, "gathered", gathered)
    first, second = Layer("first"), Layer("second")
    with engine.gathered_in_turn([first, second]):
        second(first(1))
        assert whole == set()
    with pytest.raises(ZeroDivisionError), engine.gathered_in_turn([first, second]):
        first(0)
    assert whole == set()
    first(1)
    assert most == [{"first"}, {"second"}, {"first"}, set()]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("numel", [0, 1, 2, 7, 9, 10])
def test_ranks_that_hold_the_same_partition_complete_it_with_what_each_has_read(
    monkeypatch: pytest.MonkeyPatch, numel: int, dtype: torch.dtype
) -> None:
    """Three of them, and room for a few bytes at a time."""
    monkeypatch.setattr(partition, "_GATHERED_BYTES", 9)
    values = torch.arange(1, numel + 1).to(dtype)
    nobody: Any = None
    readers = list[Any]()
    for place in range(3):
        made: Any = Partitioner.__new__(Partitioner)
        made.device, made.division, made.place, made.across = torch.device("cpu"), Division(1, 3), place, "group"
        readers.append(made)
    read = [reader.read_part(Partition(nobody, 0, numel, values)).local.view(torch.uint8) for reader in readers]
    for reader in readers:
        local, gathered = torch.zeros_like(values), 0
        own = reader.read_part(Partition(nobody, 0, numel, local))
        own.local.copy_(values[own.begin : own.end])

        def all_gather(every: torch.Tensor, mine: torch.Tensor, group: str) -> None:
            nonlocal gathered
            for part, out in zip(read, every.view(3, -1), strict=True):
                given = part[gathered : gathered + len(mine)]
                out.zero_()[: len(given)] = given
            gathered += len(mine)

        monkeypatch.setattr(dist, "all_gather_into_tensor", all_gather)
        reader.share_out(Partition(nobody, 0, numel, local))
        assert torch.equal(local, values)


def test_a_group_that_only_a_load_needs_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = list[str]()
    monkeypatch.setattr(dist, "destroy_process_group", gone.append)
    made: Any = Partitioner.__new__(Partitioner)
    made._ranks, made.size = SimpleNamespace(group_across=lambda size: f"across {size}"), 2
    for copies, groups in ((1, []), (3, ["across 2"])):
        made.division, made.across = Division(2, copies), None
        made.begin_reading()
        made.end_reading()
        made.end_reading()
        assert gone == groups
        assert made.across is None
