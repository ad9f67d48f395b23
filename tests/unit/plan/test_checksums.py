"""The sums that show that nothing changed packed weights are taken without a copy of them in a wider type."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.plan.assemble import checksums


class Summed(TorchDispatchMode):
    """The bytes that were added up one by one, each of which torch copies as eight."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), given: Any = None) -> Any:
        if "sum" in function.name() and arguments[0].dtype == torch.uint8:
            self.bytes += arguments[0].numel()
        return function(*arguments, **(given or {}))


def model_of(part: torch.Tensor) -> torch.nn.Module:
    model, parameter = torch.nn.Module(), torch.nn.Parameter(part, requires_grad=False)
    parameter.ds_tensor = part  # type: ignore[attr-defined]
    model.weight = parameter
    return model


@pytest.mark.parametrize("size", [0, 5, 8, 4099])
def test_a_byte_changes_the_sum_and_none_is_copied(size: int) -> None:
    part = torch.randint(0, 256, (size,), dtype=torch.uint8)
    with Summed() as summed:
        before = checksums(model_of(part))
    assert summed.bytes == size % 8
    for place in {0, size // 2, size - 1} if size else ():
        changed = part.clone()
        changed[place] ^= 1
        assert checksums(model_of(changed)) != before
    assert checksums(model_of(part.clone())) == before


class OneAtATime(TorchDispatchMode):
    """Refuses what a GPU refuses where some of the tensors are on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), given: Any = None) -> Any:
        assert function.name() not in ("aten::stack", "aten::cat"), "tensors of several devices are put together"
        return function(*arguments, **(given or {}))


def test_partitions_may_be_on_the_gpu_and_on_the_host() -> None:
    """With offloaded parameters those that are small stay on the GPU."""
    model = torch.nn.ModuleList(model_of(torch.full((9,), value, dtype=torch.uint8)) for value in (1, 2))
    with OneAtATime():
        assert [value % 256 for value in checksums(model).values()] == [2, 4]
