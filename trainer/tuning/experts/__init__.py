"""Low-rank adapters on the matrices of a mixture's experts, beside those on linear layers: `tuning.experts: true`.

Each expert's matrix has its own A (rank, inputs) and B (outputs, rank). PEFT stores them stacked, as adapters of whole
parameters (`target_parameters`). In its files A is (E * rank, inputs), one expert after the other, and B is
(outputs, rank * E), where the experts alternate. PEFT names the last stack of a module by the module's path, and each
earlier one by one more `base_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.tuning.linear_adapters import LowRank, with_peft_files
from trainer.tuning.method import Around, ExportedFiles, Method, exact_product

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture, Parameter
    from trainer.config import Config, Optim
    from trainer.state.checkpoint.learnt_weights import LearntWeights


SETTING = "tuning.experts"


class _Names(NamedTuple):
    """The two parameters of a stack's adapter in the model."""

    a: str
    b: str


@dataclass(frozen=True)
class StackUpdate:
    """scaling * up @ down of each expert, summed in fp32; up (E, rows, rank), down (E, rank, columns), in the type of
    the training."""

    up: Tensor
    down: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.up), self.up.shape[1], self.down.shape[2]

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[-1])
        begin = 0
        for up, down in self._factors(first, len(rows)):
            of_expert = rows[begin : begin + len(up)]
            of_expert.copy_((up.float() @ down.float()).mul_(self.scaling).add_(of_expert))
            begin += len(up)

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        import torch

        (begin, within), (end, beyond) = divmod(first, self.shape[1]), divmod(first + rows, self.shape[1])
        if not within and not beyond:  # whole experts: one product on a GPU
            return exact_product(self.up[begin:end], self.down[begin:end, :, columns], self.scaling).flatten(0, 1)
        factors = self._factors(first, rows)
        return torch.cat([exact_product(up, down[:, columns], self.scaling) for up, down in factors])

    def _factors(self, first: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the two matrices of each expert that has some of these rows, the first one with these rows alone."""
        last = first + rows
        while first < last:
            expert, row = divmod(first, self.shape[1])
            count = min(last - first, self.shape[1] - row)
            yield self.up[expert, row : row + count], self.down[expert]
            first += count


@dataclass(frozen=True)
class WithExperts(Around):
    """LoRA over a frozen base, with adapters of `rank` on the stacks of its experts."""

    method: LowRank
    rank: int

    @property
    def identity(self) -> dict[str, Any]:
        """Leaves the experts' rank out if it equals that of the other adapters, whether or not it was set."""
        given = self.method.identity
        return {key: value for key, value in given.items() if (key, value) != ("experts_rank", self.method.tuning.rank)}

    def mismatches(self, architecture: Architecture) -> list[str]:
        found = self.method.mismatches(architecture)
        if not architecture.stacks():
            found.append(f"{SETTING}: the base is no mixture of experts. Remove it.")
        if self.method.tuning.dropout:
            found.append(
                f"tuning.dropout: {self.method.tuning.dropout} cannot be had with {SETTING}, as PEFT's adapters of"
                " experts have none. Set it to 0."
            )
        return found

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for stack in architecture.stacks().values():
            experts, rows, columns = stack.shape
            inputs, outputs = (rows, columns) if stack.transposed else (columns, rows)
            names = _names(stack)
            shapes[names.a], shapes[names.b] = (experts, self.rank, inputs), (experts, outputs, self.rank)
        return shapes

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """A starts as in PEFT, uniform within 1 / sqrt(inputs), and B starts at 0.

        Each adapter is divided over the ranks as soon as it is made.
        """
        import torch

        from trainer.model.held.layers import held_by
        from trainer.state.zero.engine import divide_now
        from trainer.tuning.experts.layer import ExpertLora

        self.method.attach(model, architecture, dtype, seed)
        generator, shapes = torch.Generator().manual_seed(seed), self.own(architecture)
        for name, stack in architecture.stacks().items():
            path, _, leaf = name.rpartition(".")
            experts: Any = model.get_submodule(path)
            names = _names(stack)
            bound = 1 / math.sqrt(shapes[names.a][-1])
            a = torch.empty(shapes[names.a]).uniform_(-bound, bound, generator=generator).to(dtype)
            b = torch.zeros(shapes[names.b], dtype=dtype)
            swapped = experts.is_transposed != stack.transposed
            adapter = ExpertLora(a, b, self.method.scaling_of(self.rank), swapped=swapped)
            if self.method.through and held_by(getattr(experts, leaf)).moves:
                adapter.compute_through(name, transposed=stack.transposed)
            divide_now(adapter, beside=experts)
            experts.adapters[leaf] = adapter

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """LoRA's groups, and the same two for the experts."""
        from trainer.tuning.experts.layer import ExpertLora

        adapters = [module for module in model.modules() if isinstance(module, ExpertLora)]
        ours = {
            "experts_A": (1.0, [adapter.lora_A for adapter in adapters]),
            "experts_B": (optim.lora_plus_ratio, [adapter.lora_B for adapter in adapters]),
        }
        return [
            *self.method.groups(model, optim),
            *({"name": name, "lr_ratio": ratio, "params": params} for name, (ratio, params) in ours.items()),
        ]

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """Adds the experts' adapters."""
        named: dict[str, Tensor] = {}
        for name, saved in saved_as(architecture).items():
            a, b = (ours[part] for part in _names(architecture.stacks()[name]))
            named[f"{saved.a}.weight"] = a.flatten(0, 1)
            named[f"{saved.b}.weight"] = b.permute(1, 2, 0).flatten(1)
        return with_peft_files(theirs, named, **self.described(architecture))

    def described(self, architecture: Architecture) -> dict[str, Any]:
        """PEFT's settings of the adapters. `r` is the experts' rank, and a pattern gives the linear layers theirs.

        PEFT would warn about a pattern for the experts' parameters, although it obeys one."""
        ends = sorted({".".join(name.split(".")[-2:]) for name in architecture.stacks()})
        described: dict[str, Any] = {"target_parameters": ends}
        if self.rank != self.method.tuning.rank:
            no_stack = "".join(rf"(?<!\.{end.partition('.')[0]}\.)" for end in ends)
            described |= {"r": self.rank, "rank_pattern": {rf"{no_stack}[^.]+": self.method.tuning.rank}}
        return described

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, StackUpdate]:
        updates: dict[str, StackUpdate] = {}
        for name, stack in architecture.stacks().items():
            a, b = (weights[part] for part in _names(stack))
            up, down = (a.mT, b.mT) if stack.transposed else (b, a)
            updates[name] = StackUpdate(up, down, self.method.scaling_of(self.rank))
        return updates


def _names(stack: Parameter) -> _Names:
    path, _, leaf = stack.name.rpartition(".")
    return _Names(f"{path}.adapters.{leaf}.lora_A", f"{path}.adapters.{leaf}.lora_B")


def saved_as(architecture: Architecture) -> dict[str, _Names]:
    """Each stack -> its adapter's names in PEFT's files, without `.weight`. PEFT nests the wrappers of a module."""
    modules: dict[str, list[str]] = {}
    for name in architecture.stacks():
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    found: dict[str, _Names] = {}
    for path, stacks in modules.items():
        for after, name in enumerate(reversed(stacks)):
            saved = f"{path}.{'base_layer.' * after}"
            found[name] = _Names(f"{saved}lora_A", f"{saved}lora_B")
    return found


def with_experts(method: Method, config: Config) -> Method:
    tuning = config.tuning
    if not tuning.experts:
        return method
    assert isinstance(method, LowRank), "no other method reads the setting"
    return WithExperts(method, tuning.experts_rank or tuning.rank)


AROUND: dict[str, Callable[[Method, Config], Method]] = {SETTING: with_experts}
