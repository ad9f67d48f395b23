"""The experts of a mixture: one forward pass for every class that lets transformers choose one, over 4-bit stacks or
16-bit.

It is registered as `capstan` with transformers' ExpertsInterface, and reads from a module what its class says of
itself: has_gate, has_bias, is_transposed, has_post_expert_norm, and its own `_apply_gate`. Tokens' rows are sorted by
expert (trainer/model/kernels/grouped.py) and multiplied in groups. A 4-bit stack is dequantized `at_once` bytes at a
time, and again in the backward pass; one that fits costs no host synchronisation where a kernel multiplies all groups,
a larger one costs one a pass for both of its products.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from trainer.config.training import FP8_ROWS_EACH
from trainer.model.held import Moves
from trainer.model.held.layers import held_by
from trainer.model.kernels.grouped import Groups
from trainer.model.kernels.launch import can_launch
from trainer.model.parts import is_experts

IMPLEMENTATION = "capstan"
_DOWN = "down_proj"
_SILUS = (nn.SiLU, SiLUActivation)


def prepare_experts(model: nn.Module) -> None:
    """Prepare the experts of a model that transformers built with `IMPLEMENTATION`, including classes without the
    interface, for that forward pass and for adapters. A token visits `each` experts. The attribute `visits` counts the
    rows of each expert, (count,) on the device; it is 0 before the first pass.
    """
    for module in list(model.modules()):
        if type(module).__name__ in _WITHOUT_INTERFACE:
            _WITHOUT_INTERFACE[type(module).__name__](module)
    for module in list(model.modules()):
        if is_experts(module):
            module.adapters = nn.ModuleDict()
            counted: Any = module
            counted.visits, counted.each = 0, 0


def experts_forward(self: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """hidden (T, D), each token's experts (T, k) int64 and their weights (T, k) -> (T, D)."""
    groups = _grouped(self, experts)
    if can_launch(hidden.device.type) and not self.has_post_expert_norm:
        sorted_weights = groups.sort(weights.reshape(-1))
        return groups.combine(_through_weighted(self, groups.dispatch(hidden), groups, sorted_weights)).to(hidden.dtype)
    rows = groups.restore(_through_experts(self, groups.dispatch(hidden), groups))
    return (rows * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def _through_experts(self: Any, rows: Tensor, groups: Groups) -> Tensor:
    """Rows (S, D), sorted by expert, through their experts -> (S, D)."""
    if self.has_gate:
        rows = self._apply_gate(_linear(self, "gate_up_proj", rows, groups))
    else:
        rows = self.act_fn(_linear(self, "up_proj", rows, groups))
    rows = _linear(self, _DOWN, rows, groups)
    return self.post_expert_norm(rows) if self.has_post_expert_norm else rows


def _through_weighted(self: Any, rows: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """The same times the rows' routing weights (S,). The weights are applied before the down-projection, so their
    gradients do not need its result (trainer/model/kernels/mixture.py). This rounds differently from transformers.
    """
    if self.has_gate and _is_plain_gate(self):
        from trainer.model.kernels.mixture import gated

        rows = gated(_linear(self, "gate_up_proj", rows, groups), weights)
    else:
        name = "gate_up_proj" if self.has_gate else "up_proj"
        activate = self._apply_gate if self.has_gate else self.act_fn
        rows = (activate(_linear(self, name, rows, groups)) * weights.unsqueeze(-1)).to(rows.dtype)
    return _linear(self, _DOWN, rows, groups, weights)


def _is_plain_gate(self: Any) -> bool:
    """Whether the gate is transformers' own with SiLU: silu(gate) * up, the two halves of a row."""
    return getattr(type(self), "_apply_gate", None) is _default_apply_gate and isinstance(self.act_fn, _SILUS)


def _linear(self: Any, name: str, rows: Tensor, groups: Groups, weights: Tensor | None = None) -> Tensor:
    """Rows (S, in) by a stack, its adapter and its bias -> (S, out); a bias is multiplied by the `weights` (S,)."""
    stack = getattr(self, name)
    learning = None if held_by(stack).packs else stack
    adapter = self.adapters[name] if name in self.adapters and self.adapters[name].active else None
    result: Any
    if adapter is not None and adapter.moves is not None:
        result = adapter.through(rows, groups, stack, self.is_transposed)
    else:
        begun = None if adapter is None else adapter.begin(rows, groups)
        rows = rows if begun is None else begun.rows
        result = _GroupedLinear.apply(rows, learning, self, name, groups)
        if adapter is not None:
            result = result + adapter.finish(begun, groups)
    if self.has_bias:
        bias = getattr(self, f"{name}_bias")[groups.experts]
        result = result + (bias if weights is None else (bias * weights.unsqueeze(-1)).to(result.dtype))
    return result


class _GroupedLinear(Function):
    """Rows (S, in), sorted by expert, by the experts' matrices -> (S, out).

    As in trainer/model/held/layers.py the function keeps the module, never a gathered weight. `weight` is the stack of
    a base in 16 bits, and serves only its gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor | None, module: Any, name: str, groups: Groups) -> Tensor:
        ctx.module, ctx.name, ctx.groups = module, name, groups
        if weight is not None and weight.requires_grad:
            ctx.save_for_backward(rows)
        return grouped_product(rows, getattr(module, name), groups, module.is_transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        module, groups, grad = ctx.module, ctx.groups, grad.contiguous()
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            of_rows = grouped_product(grad, getattr(module, ctx.name), groups, not module.is_transposed)
        if ctx.needs_input_grad[1]:
            (rows,) = ctx.saved_tensors
            of_weight = groups.outer(rows, grad) if module.is_transposed else groups.outer(grad, rows)
        return of_rows, of_weight, None, None, None


def grouped_product(rows: Tensor, stack: Any, groups: Groups, transposed: bool, by: Moves | None = None) -> Tensor:
    """Rows (S, in) by a stack (count, out, in), or (count, in, out) where `transposed` -> (S, out).

    With `by` the codes of the stack are moved first.
    """
    if not held_by(stack).packs:
        return groups.product(rows, stack.data if transposed else stack.data.mT)
    count, columns = stack.slices, stack.slice_shape[transposed]
    in_fp8 = stack.in_fp8 and len(rows) >= FP8_ROWS_EACH * count
    portion = max(1, stack.at_once // (stack.numel * stack.dtype.itemsize))
    if portion >= count:
        matrices = stack.matrices(0, count, by)
        return groups.product(rows, matrices if transposed else matrices.mT, in_fp8=in_fp8)
    result = rows.new_empty(len(rows), columns)
    for first in range(0, count, portion):
        last = min(first + portion, count)
        begin, end = groups.ends[first], groups.ends[last]
        if begin < end:  # no token visits the others, so they are not dequantized
            matrices = stack.matrices(first, last, by)
            matrices = matrices if transposed else matrices.mT
            result[begin:end] = groups.product(rows, matrices, first, in_fp8=in_fp8)
            del matrices  # before the next ones are made
    return result


def _grouped(self: Any, experts: Tensor) -> Groups:
    """Each token's experts (T, k) as groups, counted in the module's `visits`."""
    stack = getattr(self, _DOWN)
    groups = Groups(experts, stack.slices if held_by(stack).packs else len(stack))
    self.visits, self.each = groups.sizes.long() + self.visits, groups.each
    return groups


def _weighted_inputs_forward(self: nn.Module, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Like `experts_forward`, for families that weight the experts' inputs."""
    groups = _grouped(self, experts)
    rows = groups.dispatch(hidden) * groups.sort(weights.reshape(-1)).unsqueeze(-1)
    return groups.combine(_through_experts(self, rows, groups))


def _llama4(mixture: Any) -> None:
    """Replaces transformers' pass, which multiplies every token by every expert, nearly all of them as zeros."""

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)  # (T, count), 0 for experts that a token does not visit
        weights, experts = scores.topk(self.top_k, dim=1)
        return self.shared_expert(hidden) + self.experts(hidden, experts, weights), logits

    mixture.forward = MethodType(forward, mixture)
    experts = mixture.experts
    experts.has_gate, experts.is_transposed, experts.has_bias, experts.has_post_expert_norm = True, True, False, False
    experts._apply_gate = MethodType(_gated, experts)
    experts.forward = MethodType(_weighted_inputs_forward, experts)


def _gated(self: Any, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return self.act_fn(gate) * up


# The mixtures whose experts are in `EXPERTS_WITHOUT_INTERFACE`, and the function that gives them a forward pass.
_WITHOUT_INTERFACE = {"Llama4TextMoe": _llama4}

ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
