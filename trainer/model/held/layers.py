"""The modules that hold frozen weights as a format says, and products with what any linear layer holds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.config.training import EXPERTS_AT_ONCE
from trainer.model.held import HeldFormat, Moves
from trainer.model.held.formats.plain import Plain
from trainer.model.kernels import fp8
from trainer.model.kernels.launch import can_launch

_PLAIN = Plain()


class HeldWeights(nn.Module):
    """Holds `slices` matrices of `slice_shape` (rows, columns) in the format `form`, one after another, and computes
    with them in `dtype`. Their bytes are parameters, whose names and `sizes` the format gives. `unrounded`: products of
    codes and scales stay as they are, as in a run in fp32.
    """

    weight: Tensor
    absmax: nn.Parameter
    absmax_mean: Tensor
    form: HeldFormat
    dtype: torch.dtype
    unrounded: bool
    slices: int
    slice_shape: tuple[int, int]

    def _hold(self, shape: tuple[int, int], slices: int, form: HeldFormat, dtype: torch.dtype) -> None:
        self.form, self.dtype, self.slices, self.slice_shape = form, dtype, slices, shape
        self.unrounded = dtype == torch.float32
        if form.means:
            # The mean of each slice's scales, the same on every rank.
            self.absmax_mean = nn.Buffer(torch.zeros(slices, dtype=torch.float32), persistent=False)

    @property
    def numel(self) -> int:
        """Weights of a slice."""
        return math.prod(self.slice_shape)

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each parameter."""
        return {name: self.slices * size for name, size in self.form.sizes(*self.slice_shape).items()}

    def part(self, name: str) -> Tensor:
        """The bytes of a parameter, which must be gathered."""
        return getattr(self, name).data

    def matrices(self, first: int, last: int, by: Moves | None = None) -> Tensor:
        """Slices [first, last), (last - first, *slice_shape) in the compute dtype, with `by` those whose codes are
        moved. The parameters must be gathered.
        """
        found = self.form.by_kernel(self, first, last, by) if can_launch(self.part("weight").device.type) else None
        if found is not None:
            return found
        return self.form.matrices(self, first, last) if by is None else self.form.moved(self, first, last, by)


class HeldLinear(HeldWeights, nn.Linear):
    """`y = x W^T + b` with W in a format; x is (..., in_features). `in_fp8` says that it multiplies by
    trainer/model/kernels/fp8.py.
    """

    in_fp8 = False

    def __init__(self, in_features: int, out_features: int, form: HeldFormat, dtype: torch.dtype) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias=False, device="meta")
        self._hold((out_features, in_features), 1, form, dtype)

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features)."""
        if _made is None:
            return self.matrices(0, 1)[0]
        if self not in _made:
            _made[self] = self.matrices(0, 1)[0]
        return _made[self]

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenMatmul.apply(x, self, self.bias)


class HeldStack(HeldWeights):
    """Takes the place of a 3-D parameter in the module of a mixture's experts. That module's forward pass is that of
    trainer/model/experts.py, which makes `at_once` bytes of the matrices at a time. `in_fp8` says that it multiplies
    many rows by trainer/model/kernels/fp8.py. Nothing calls this module's forward, so the experts' module must be a
    leaf to ZeRO-3.
    """

    at_once = EXPERTS_AT_ONCE
    in_fp8 = False

    def __init__(self, shape: tuple[int, int, int], form: HeldFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self._hold((shape[1], shape[2]), shape[0], form, dtype)


def hold(model: nn.Module, name: str, parameter: Tensor, form: HeldFormat, dtype: torch.dtype) -> HeldWeights:
    """Put a module that holds the weight `name` in place of a linear layer or of a mixture's experts, and return it."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, nn.Linear):
        layer = HeldLinear(owner.in_features, owner.out_features, form, dtype)
        layer.bias = owner.bias  # a parameter of its own
        model.set_submodule(path, layer)
        return layer
    experts, rows, columns = parameter.shape
    stack = HeldStack((experts, rows, columns), form, dtype)
    delattr(owner, leaf)
    owner.add_module(leaf, stack)
    return stack


def held_by(module: Any) -> HeldFormat:
    """Return how a linear layer, or a mixture's stack, holds its weights."""
    return module.form if isinstance(module, HeldWeights) else _PLAIN


def multiply(x: Tensor, linear: nn.Linear, bias: Tensor | None) -> Tensor:
    """Multiply x (..., in_features) by the layer's frozen weight, and add its bias -> (..., out_features). The layer's
    parameters must be gathered.
    """
    form = held_by(linear)
    result = form.product(x, linear, bias)
    return _product(x, linear, form.weight(linear), bias) if result is None else result


def multiply_moved(x: Tensor, linear: nn.Linear, bias: Tensor | None, by: Moves) -> Tensor:
    """As `multiply`, by the weight whose codes are moved. The layer's parameters must be gathered."""
    return _product(x, linear, _moved(linear, by), bias)


def multiply_moved_back(grad: Tensor, linear: nn.Linear, by: Moves) -> Tensor:
    """As `multiply_back`, by the same weight."""
    return _product_back(grad, linear, _moved(linear, by), None)


def _moved(linear: Any, by: Moves) -> Tensor:
    if _moved_once is None:
        return linear.matrices(0, 1, by)[0]
    if linear not in _moved_once:
        _moved_once[linear] = linear.matrices(0, 1, by)[0]
    return _moved_once[linear]


def multiply_back(grad: Tensor, linear: nn.Linear, total: Tensor | None = None) -> Tensor:
    """Multiply the gradient (..., out_features) by the same weight -> the inputs' gradient (..., in_features). If
    `total` is given, the result is added to it in place.
    """
    form = held_by(linear)
    result = form.product_back(grad, linear, total)
    return _product_back(grad, linear, form.weight(linear), total) if result is None else result


def weight_of(linear: nn.Linear) -> Tensor:
    """Return the weight of a linear layer, (out_features, in_features), in any format. The layer's parameters must be
    gathered.
    """
    return held_by(linear).weight(linear)


def _product(x: Tensor, linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return fp8.product(x, weight) if _is_in_fp8(linear) else nn.functional.linear(x, weight)
    result = fp8.product(x, weight).add_(bias) if _is_in_fp8(linear) else nn.functional.linear(x, weight, bias)
    # torch's sum is a view. Falcon's code changes it in place, which autograd refuses for a view that our function
    # returns.
    return torch.ops.aten._unsafe_view(result, result.shape)


def _product_back(grad: Tensor, linear: nn.Linear, weight: Tensor, total: Tensor | None) -> Tensor:
    if total is not None and not _is_in_fp8(linear):
        total.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
        return total
    result = fp8.product(grad, weight.t()) if _is_in_fp8(linear) else grad @ weight
    return result if total is None else total.add_(result.view_as(total))


def _is_in_fp8(linear: nn.Linear) -> bool:
    return isinstance(linear, HeldLinear) and linear.in_fp8


class InFp8(NamedTuple):
    """How many of the model's packed linear layers, and of its stacks of experts, multiply in FP8."""

    linear: int
    of_linear: int
    stacks: int = 0
    of_stacks: int = 0

    def __str__(self) -> str:
        stacks = f", {self.stacks} of {self.of_stacks} stacks of experts" if self.of_stacks else ""
        return f"{self.linear} of {self.of_linear} linear layers{stacks}"


def multiply_in_fp8(model: nn.Module, device: torch.device) -> InFp8:
    """Have the model's packed weights multiply in FP8 if their sizes allow it, and the device for those of experts.
    Raises `ConfigError` if the device cannot at all."""
    fp8.check(device)
    layers = [module for module in model.modules() if isinstance(module, HeldLinear)]
    stacks = [module for module in model.modules() if isinstance(module, HeldStack)]
    for module in [*layers, *(stacks if fp8.multiplies_groups(device) else ())]:
        module.in_fp8 = all(size % fp8.MULTIPLE == 0 for size in module.slice_shape)
    return InFp8(*(number for some in (layers, stacks) for number in (sum(one.in_fp8 for one in some), len(some))))


class _FrozenMatmul(torch.autograd.Function):
    """Keeps the module, never the gathered weight: a saved view would pin every gathered layer until backward.

    ZeRO-3 gathers the module's parameters again before its backward runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: HeldLinear, bias: Tensor | None) -> Tensor:
        ctx.module = module
        return multiply(x, module, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:  # type: ignore[override]
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return multiply_back(grad, ctx.module), None, bias


_made: dict[HeldLinear, Tensor] | None = None
_moved_once: dict[HeldLinear, Tensor] | None = None


@contextmanager
def dequantized_once() -> Iterator[None]:
    """Inside, each linear layer makes its weight once and keeps it until the end. The layers' parameters must stay
    gathered.
    """
    global _made, _moved_once
    outer, (_made, _moved_once) = (_made, _moved_once), ({}, {})
    try:
        yield
    finally:
        _made, _moved_once = outer
