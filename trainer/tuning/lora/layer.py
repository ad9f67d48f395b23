"""The linear layers of LoRA and of DoRA.

LoRA's (arXiv:2106.09685) is one function of autograd: W x + scaling * B (A x). PEFT's layer is seven functions: it
scales and adds tensors of the size of the result, and of its gradient. Here the scaling is applied to the `rank` values
of each token, and the second product is added to the first in place.

On a GPU, layers that read the same input are one function: the forward and the backward pass read the input once for
all A, and the input's gradient is one sum.

    q_proj(x)   computes x [A_q; A_k; A_v]^T and the results of all three
    k_proj(x)   returns its result, which is there

DoRA's (arXiv:2402.09353) scales each row of W + scaling * B @ A to a learnt length. Every forward pass computes the
lengths of the rows again. The backward pass takes them as constants (section 4.3), as in PEFT. They need the whole W, A
and B at once, so ZeRO-3 must gather the base layer's parameters with this module's.

`STARTS` are the starts of the two matrices, by their names in `tuning.init`, which are those of PEFT's
`init_lora_weights`. All of them leave the base unchanged.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear
from torch import Generator, Tensor, nn

from trainer.model.activations import Saved, save_before
from trainer.model.held.layers import multiply, multiply_back, multiply_moved, multiply_moved_back, weight_of
from trainer.processes.accelerator import is_accelerator
from trainer.tuning.linear_adapters import LowRankUpdate
from trainer.tuning.method import Moved

# Avoids a division by zero for a row of zeros in DoRA.
_TINY = torch.finfo(torch.float32).tiny


class AdaptedLinear(NamedTuple):
    """A frozen layer and its adapter: A (rank, inputs), B (outputs, rank), and the dropout of the adapter's input."""

    base: nn.Linear
    down: nn.Parameter
    up: nn.Parameter
    scaling: float
    dropout: nn.Dropout | None


class _Made(NamedTuple):
    """A layer's result, with the input that it was computed from and the version that the input had then."""

    x: Tensor
    version: int
    result: Tensor

    def is_of(self, x: Tensor) -> bool:
        """Whether `x` is that input and nobody has changed it since.

        `x` may be a view of the whole input, because ZeRO-3's hooks pass such views to layers.
        """
        same = x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape and x.stride() == self.x.stride()
        return same and x._version == self.version


class LoraLinear(Linear):
    """PEFT's layer with another forward pass, for one adapter on a frozen layer.

    The layers `beside` it are called after it with the same input. ZeRO-3 gathers their parameters with its own."""

    computed_at_once = True  # see trainer/model/parts.py
    beside: "tuple[LoraLinear, ...]" = ()
    _made: _Made | None = None  # by the call of another layer
    through: str | None = None  # the weight's name, if the layer computes by moved codes: through.py

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        made = vars(self).pop("_made", None)  # torch's own way to an attribute takes longer than a small product
        own = self._as_one_function(x)
        if own is None:
            assert self.through is None or self.disable_adapters, "an adapter beside codes is another model"
            return super().forward(x, *args, **kwargs)
        if self.through is not None:
            return multiply_through(x, own, self.through)
        if made is not None and made.is_of(x):
            return made.result
        dropped = None if own.dropout is None else own.dropout(x)
        if not self.beside or dropped is not None or not _is_rounded_once(x):
            return multiply_adapted(x, dropped, [own])[0]
        others = [(layer, layer._as_one_function(x)) for layer in self.beside]
        together = [(self, own), *((layer, other) for layer, other in others if other and other.dropout is None)]
        results = multiply_adapted(x, None, [layer for _, layer in together])
        for (layer, _), result in zip(together[1:], results[1:], strict=True):
            layer._made = _Made(x, x._version, result)
        return results[0]

    def _as_one_function(self, x: Tensor) -> AdaptedLinear | None:
        base: Any = self.base_layer
        (name,) = self.active_adapters
        down: Any = self.lora_A[name].weight
        up: Any = self.lora_B[name].weight
        dropout = self.lora_dropout[name]
        if self.disable_adapters or self.merged or base.weight.requires_grad or x.dtype != down.dtype:
            return None
        drops = dropout if isinstance(dropout, nn.Dropout) and self.training else None
        return AdaptedLinear(base, down, up, self.scaling[name], drops)


def multiply_adapted(x: Tensor, dropped: Tensor | None, layers: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """x (..., inputs) -> (..., outputs) of each layer. All parameters must be gathered.

    The adapters read `dropped` instead of x if it is given.
    """
    inputs = x if dropped is None else dropped
    with torch.no_grad():
        low = nn.functional.linear(inputs, _downs(layers))
    x, kept = save_before(x, inputs, low)  # The last product of a layer need not be computed again.
    return _AdaptedMatmul.apply(
        x, dropped, low, kept, layers, *(part for one in layers for part in (one.down, one.up, one.base.bias))
    )  # type: ignore[return-value]


class _AdaptedMatmul(torch.autograd.Function):
    """Has the adapters' input and A x, `low`, for their gradients. Like `_FrozenMatmul` it never keeps a gathered
    weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        low: Tensor,
        kept: Saved | None,
        layers: Sequence[AdaptedLinear],
        *_parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """As `multiply_adapted`. Autograd needs each layer's parameters, A, B and bias, as arguments."""
        results = tuple(multiply(x, layer.base, layer.base.bias) for layer in layers)
        if kept is None:
            ctx.save_for_backward(x if dropped is None else dropped, low)
        ctx.kept, ctx.layers, ctx.drops = kept, layers, dropped is not None
        for result, layer, part in zip(results, layers, _parts(low, layers), strict=True):
            if _folds(layer.scaling, result):
                _add_product(result, part, layer.up.t(), layer.scaling)
            else:
                result += nn.functional.linear(part, layer.up).mul_(layer.scaling)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers: Sequence[AdaptedLinear] = ctx.layers
        saved = ctx.saved_tensors if ctx.kept is None else ctx.kept.tensors
        inputs, low = (one.flatten(0, -2) for one in saved)
        downs, low_grads, of_ups, of_biases = _downs(layers), list[Tensor](), list[Tensor](), list[Tensor | None]()
        flats = [grad.flatten(0, -2) for grad in grads]
        for place, (flat, layer, part) in enumerate(zip(flats, layers, _parts(low, layers), strict=True)):
            scaled, factor = (flat, layer.scaling) if _folds(layer.scaling, flat) else (flat * layer.scaling, 1.0)
            low_grads.append(_product(scaled, layer.up.detach(), factor))
            of_ups.append(_product(scaled.t(), part, factor))
            of_biases.append(flat.sum(0) if ctx.needs_input_grad[3 * place + 7] else None)
        low_grad, of_x = _joined(low_grads, 1), None
        if ctx.needs_input_grad[0]:  # the last one's is first, as where each is a function of its own
            of_x = multiply_back(grads[-1], layers[-1].base)
            for flat, layer in list(zip(flats, layers, strict=True))[-2::-1]:
                of_x = multiply_back(flat, layer.base, of_x)
        if of_x is not None and not ctx.drops:
            _add_product(of_x, low_grad, downs)
        of_dropped = (low_grad @ downs).view(*grads[0].shape[:-1], -1) if ctx.drops else None
        of_downs = (low_grad.t() @ inputs).split([len(layer.down) for layer in layers])
        learnt = zip(of_downs, of_ups, of_biases, strict=True)
        return of_x, of_dropped, None, None, None, *(of_one for of_layer in learnt for of_one in of_layer)


def _downs(layers: Sequence[AdaptedLinear]) -> Tensor:
    """All matrices A, one below the other."""
    return _joined([layer.down.detach() for layer in layers], 0)


def _joined(parts: Sequence[Tensor], along: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), along)


def _parts(low: Tensor, layers: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """Split the result of all A into that of each layer, (..., its rank)."""
    return (low,) if len(layers) == 1 else low.split([len(layer.down) for layer in layers], -1)


def _folds(scaling: float, result: Tensor) -> bool:
    """Whether the scaling may move to another factor of the product.

    A power of two may always move, because it changes no rounding. Other values may move where sums are rounded only
    once, which is more exact than rounding in between."""
    return _is_rounded_once(result) or math.frexp(scaling)[0] == 0.5


def _is_rounded_once(total: Tensor) -> bool:
    """Whether the kernel adds products before it rounds them. A GPU's does.

    On a CPU products are rounded first, so that results equal those of PEFT's layer and of earlier versions to the
    bit."""
    return is_accelerator(total.device)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """total (..., m) += factor * left (..., k) @ right (k, m); `total` is contiguous."""
    rows, total_rows = left.flatten(0, -2), total.flatten(0, -2)
    if _is_rounded_once(total):
        total_rows.addmm_(rows, right, alpha=factor)
    else:
        total_rows.add_(rows @ right, alpha=factor)


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor * left (n, k) @ right (k, m)."""
    if _is_rounded_once(left):
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=factor)
    return left @ right if factor == 1 else (left @ right).mul_(factor)


class DoraLinear(nn.Module):
    """`y = lora_magnitude_vector / norm * (W + scaling * B @ A) x + bias`, norm the row lengths of W + scaling * B @ A.

    Parameters: lora_A (rank, inputs), lora_B (outputs, rank), lora_magnitude_vector (outputs,). It starts as the base
    layer: B is zero and the magnitude is the norm. Dropout is on the inputs of the whole change to the base layer, as
        in PEFT, which costs a second product with W.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float, dropout: float, dtype: torch.dtype) -> None:
        """`base_layer`'s parameters must be whole. A is drawn from the CPU's generator, as PEFT draws it."""
        super().__init__()
        device, outputs = base_layer.weight.device, base_layer.out_features
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, dropout
        self.active = True
        down = nn.init.kaiming_uniform_(torch.empty(rank, base_layer.in_features), a=math.sqrt(5))
        self.lora_A = nn.Parameter(down.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=device, dtype=dtype))
        self.lora_magnitude_vector = nn.Parameter(self._row_norms())

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        result = self.base_layer(x)
        if not self.active:
            return result
        dropping, bias = self.training and self.dropout > 0, self.base_layer.bias
        if dropping:
            x = nn.functional.dropout(x, self.dropout)
        base = self.base_layer(x) if dropping else result
        if bias is not None:
            base = base - bias
        low_rank = nn.functional.linear(self.scaling * nn.functional.linear(x, self.lora_A), self.lora_B)
        adapted = self.lora_magnitude_vector / self._row_norms() * (base + low_rank)
        if dropping:
            return adapted + (result - base)
        return adapted if bias is None else adapted + bias

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """(outputs,), rounded to the magnitude's type, so that their quotient is exactly 1 at the start.

        |W + sBA|^2 = |W|^2 + 2s <W A^T, B> + s^2 <B (A A^T), B>, row by row, so no other tensor of W's size is made.
        """
        weight = weight_of(self.base_layer)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        down, up = self.lora_A.float(), self.lora_B.float()
        crossed = (weight @ self.lora_A.T).float()  # (outputs, rank)
        squares += self.scaling * ((2 * crossed + self.scaling * up @ (down @ down.T)) * up).sum(1)
        return squares.clamp_min_(_TINY).sqrt_().to(self.lora_A.dtype)


Draw = Callable[[int, int, int, Generator], tuple[Tensor, Tensor]]
"""rank, inputs, outputs -> A (rank, inputs) and B (outputs, rank), fp32 on the CPU, so that every rank and every
machine has the same.
"""


def _gaussian(rank: int, inputs: int, outputs: int, drawn: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, inputs, generator=drawn) / rank, torch.zeros(outputs, rank)


def _orthogonal(rank: int, inputs: int, outputs: int, drawn: Generator) -> tuple[Tensor, Tensor]:
    """A takes one half of an orthogonal basis and B the other.

    So B @ A is zero, and both learn from the first step.
    """
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=drawn))
    down, up = (torch.randn(size, rank // 2, generator=drawn) / 10 for size in (inputs, outputs))
    return (down @ basis[0::2]).T.contiguous(), up @ basis[1::2]


STARTS: Mapping[str, Draw] = {"gaussian": _gaussian, "orthogonal": _orthogonal}


def multiply_through(x: Tensor, layer: AdaptedLinear, name: str) -> Tensor:
    """x (..., inputs) -> (..., outputs), by the weight `name` of a layer. All parameters must be gathered."""
    return _Through.apply(x, layer, name, layer.down, layer.up, layer.base.bias)  # type: ignore[return-value]


def _moved(layer: AdaptedLinear, name: str) -> Moved:
    up, down = layer.up.detach().double(), layer.down.detach().double()  # once for all rows
    return Moved(name, LowRankUpdate(up, down, layer.scaling))


class _Through(torch.autograd.Function):
    """The product through the quantizer: x times the codes that an export as stored writes (`tuning.through`).

    The forward pass multiplies by Q(W + scaling * B A), where Q moves the codes of W by trainer/model/held/dither.py
    and scales stay those of the base. Q is a staircase, so its own gradient is 0 nearly everywhere. The backward pass
    takes it as the identity (straight through): A and B get the gradients of the unquantized x (W + scaling * B A)^T,
    which are products of low rank, and x gets that of the codes. Neither pass keeps a weight; the backward pass makes
    the codes anew.

    It keeps the layer, x and A x. ZeRO-3 gathers the layer's parameters again before its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: AdaptedLinear, name: str, *_parameters: Tensor | None) -> Tensor:
        """As `multiply_through`. Autograd needs the layer's parameters as arguments."""
        ctx.save_for_backward(x, nn.functional.linear(x, layer.down.detach()))
        ctx.layer, ctx.name = layer, name
        return multiply_moved(x, layer.base, layer.base.bias, _moved(layer, name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layer: AdaptedLinear = ctx.layer
        x, low = (saved.flatten(0, -2) for saved in ctx.saved_tensors)
        of_x = multiply_moved_back(grad, layer.base, _moved(layer, ctx.name)) if ctx.needs_input_grad[0] else None
        flat = grad.flatten(0, -2)
        scaled, factor = (flat, layer.scaling) if _folds(layer.scaling, flat) else (flat * layer.scaling, 1.0)
        of_down = _product(scaled, layer.up.detach(), factor).t() @ x
        of_up = _product(scaled.t(), low, factor)
        of_bias = flat.sum(0) if ctx.needs_input_grad[5] else None
        return of_x, None, None, of_down, of_up, of_bias
