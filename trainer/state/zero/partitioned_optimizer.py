"""An optimizer of the folder `trainer/state/optimizer` as torch's class, which DeepSpeed calls with one flat tensor at
a time.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import Optim
from trainer.processes.ranks import Team
from trainer.state.optimizer.optimizer import Flat, FlatPart, Optimizer, State, find_optimizer

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_DTYPES = {"F32": torch.float32, "U8": torch.uint8}


class DividedOptimizer(torch.optim.Optimizer):
    """Updates flat tensors, each with the parts of parameters that `divide` has named. Its step is collective."""

    def __init__(self, groups: list[dict[str, Any]], settings: Optim, ranks: Team) -> None:
        self.kind, self.ranks = find_optimizer(settings), ranks
        read = {name: getattr(settings, name) for name in ("lr", "weight_decay", *self.kind.settings)}
        self._flats: dict[Tensor, Flat] = {}
        super().__init__(groups, read)

    def divide(self, values: Tensor, parts: Sequence[FlatPart]) -> None:
        """Begin with the flat tensor `values` that consists of `parts`, before any update."""
        flat = self._flats[values] = begun(self.kind, values.data, parts)
        self.state[values] = {"step": torch.zeros(()), **flat.whole}

    def parts(self, values: Tensor) -> Sequence[FlatPart]:
        """The parts of a flat tensor, with their states as live views."""
        return self._flats[values].parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the tensors of all groups that have a gradient."""
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self.state[values]["step"] += 1
                    flat, step = self._flats[values], int(self.state[values]["step"])
                    flat.values = values.data  # DeepSpeed may have moved it
                    self.kind.update(flat, values.grad, group, step, self._reduce)

    def _reduce(self, values: Tensor, how: Literal["sum", "max"]) -> None:
        # Offloaded states lie on the host, where NCCL reduces nothing.
        there = values.to(self.ranks.device)
        dist.all_reduce(there, _OPERATIONS[how], group=self.ranks.group)
        values.copy_(there)


def begun(kind: Optimizer, values: Tensor, parts: Sequence[FlatPart]) -> Flat:
    """The flat tensor `values` before its first step, with all states of its `parts` as zeros on the same device.

    A state that has an fp32 value for each element of every part is one tensor, of which the parts have views, so that
    an optimizer may update all parts at once.
    """
    kept = [kind.states(part.shape) for part in parts]
    of_all = [state for state in kept[0] if state == State(state.name) and all(state in states for states in kept)]
    flat = Flat(values, parts, {state.name: torch.zeros_like(values) for state in of_all})
    for part, states in zip(parts, kept, strict=True):
        for state in states:
            begin, end = state.held(part.begin, part.end)
            part.states[state.name] = (
                part.of(flat.whole[state.name])
                if state in of_all
                else torch.zeros(end - begin, dtype=_DTYPES[state.dtype], device=values.device)
            )
    return flat
