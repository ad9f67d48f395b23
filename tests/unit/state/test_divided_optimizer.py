"""What the engine adds to a step and to a pass: tensors that DeepSpeed moves, and gradients of some parameters."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainer.config import Optim
from trainer.state.optimizer import FlatPart
from trainer.state.zero.engine import DividedOptimizer, Engine


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

    engine: Any = SimpleNamespace(
        model=model,
        ranks=SimpleNamespace(device="here"),
        _engine=SimpleNamespace(module=loss),
        _gathers=SimpleNamespace(begin=done.append, finish=lambda: done.append("finished")),
    )
    row: Any = SimpleNamespace(to=lambda device: f"row {device}")
    found = Engine.gradients(engine, row, limit)
    if limit == 36:  # what the loss does not depend on has none
        chosen = ["a", "d"]
    assert {name: one.tolist() for name, one in found.items()} == {name: [4.0] * model[name].numel() for name in chosen}
    assert done == ["loss", "row here", "finished"]
    assert model["a"].grad.tolist() == [1, 1, 1], "those of the step stay"
