"""Other ways to compute a layer's products than the ones that are taken: counted for the shape of 8B, and timed beside them."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from card.figures import EIGHT_B, Figure, device, seconds_of, shape
from trainer.errors import ConfigError
from trainer.model.kernels import fp8
from trainer.tuning.lora import layer as lora

RANK, SCALING, TOKENS = 16, 2.0, 8192
_FREE = {"view", "_unsafe_view", "t", "transpose", "slice", "split", "split_with_sizes", "detach", "expand", "new_empty", "empty"}  # fmt: skip


def ways(given: argparse.Namespace) -> Iterator[Figure]:
    """Products in FP8 with what it takes to convert both factors; and LoRA on layers that read the same rows, each by itself and added to its result,
    or of all at once, or within the product."""
    sizes = shape(given.layers, pretend=given.pretend)
    yield from _in_fp8(sizes["hidden_size"], sizes["intermediate_size"], given.length)
    with patch.object(
        lora, "_is_rounded_once", lambda total: True
    ):  # what is counted on a CPU is what a GPU is asked for
        for name in ("q, k, v", "gate, up"):
            yield from _with_lora(
                name, _layers(name, EIGHT_B, TOKENS, "meta"), _layers(name, sizes, given.length, device())
            )


class Layers(NamedTuple):
    """Linear layers that read the same rows (T, in): weights (out, in), and LoRA's matrices (RANK, in) and (out, RANK)."""

    rows: Tensor
    weights: list[Tensor]
    downs: list[Tensor]
    ups: list[Tensor]


def _layers(name: str, sizes: dict[str, int], tokens: int, where: str) -> Layers:
    some = partial(torch.randn, dtype=torch.bfloat16, device=where)
    hidden = sizes["hidden_size"]
    heads = hidden * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    outputs = [hidden, heads, heads] if name == "q, k, v" else 2 * [sizes["intermediate_size"]]
    learning = partial(some, requires_grad=True)
    return Layers(
        learning(tokens, hidden),
        [some(size, hidden) for size in outputs],
        [learning(RANK, hidden) for _ in outputs],
        [learning(size, RANK) for size in outputs],
    )


def _with_lora(name: str, counted: Layers, timed: Layers) -> Iterator[Figure]:
    ways: dict[str, Callable[[Layers], Any]] = {
        "each by itself": _apart,
        "shared": partial(_together, within=False),
        "shared, within the product": partial(_together, within=True),
    }
    taken, launched, seconds = 0.0, 0, 0.0
    for way, action in ways.items():
        with _Counted() as found:
            _step(action, counted)
        took = seconds_of(partial(_step, action, timed), times=5)
        if not taken:
            taken, launched, seconds = found.bytes, found.launches, took
        yield Figure(
            f"{name} with LoRA, {way}, there and back",
            f"{found.launches} kernels ({found.launches - launched:+d}) and {found.bytes / 1e9:.2f} GB ({(found.bytes - taken) / 1e9:+.2f}) a layer of 8B at "
            f"{TOKENS:,} tokens; {1e3 * took:.3f} ms here, {seconds / took:.2f} x as fast",
        )


def _step(action: Callable[[Layers], list[Tensor]], layers: Layers) -> None:
    results = action(layers)
    torch.autograd.grad(results, [layers.rows, *layers.downs, *layers.ups], [result.detach() for result in results])


def _apart(layers: Layers) -> list[Tensor]:
    """The way that is taken: the product's own function."""
    return [
        lora._AdaptedMatmul.apply(layers.rows, None, down, up, None, SimpleNamespace(weight=weight), SCALING)
        for weight, down, up in zip(*layers[1:], strict=True)
    ]


def _together(layers: Layers, within: bool) -> list[Tensor]:
    return list(_Together.apply(layers.rows, layers.weights, within, *layers.downs, *layers.ups))  # type: ignore[arg-type]


class _Together(torch.autograd.Function):
    """All layers at once: their rows are read once for all A, and the gradient of the rows is one sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: list[Tensor], within: bool, *matrices: Tensor) -> tuple[Tensor, ...]:
        downs, ups = torch.cat(matrices[: len(weights)]), matrices[len(weights) :]
        low = rows @ downs.t()
        ctx.save_for_backward(rows, low)
        ctx.weights, ctx.downs, ctx.ups = weights, downs, ups
        if not within:
            parts = zip(weights, ups, low.split(RANK, 1), strict=True)
            return tuple((rows @ weight.t()).addmm_(part, up.t(), alpha=SCALING) for weight, up, part in parts)
        both, results = torch.cat([rows, low], 1), []
        for number, (weight, up) in enumerate(zip(weights, ups, strict=True)):
            beside = up.new_zeros(len(up), low.shape[1])
            beside[:, number * RANK : (number + 1) * RANK] = up * SCALING
            results.append(both @ torch.cat([weight, beside], 1).t())
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, low = ctx.saved_tensors
        low_grad = torch.cat([grad @ up for grad, up in zip(grads, ctx.ups, strict=True)], 1).mul_(SCALING)
        rows_grad = grads[0] @ ctx.weights[0]
        for grad, weight in zip(grads[1:], ctx.weights[1:], strict=True):
            rows_grad.addmm_(grad, weight)
        rows_grad.addmm_(low_grad, ctx.downs)
        downs = (low_grad.t() @ rows).split(RANK)
        scaled = low * SCALING
        ups = [grad.t() @ part for grad, part in zip(grads, scaled.split(RANK, 1), strict=True)]
        return rows_grad, None, None, *downs, *ups


class _Counted(TorchDispatchMode):
    """The kernels that a device would be asked for, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in _FREE:
            given = [one for value in args for one in (value if isinstance(value, list) else [value])]
            touched = [one for one in [*given, result] if isinstance(one, Tensor)]
            self.launches, self.bytes = self.launches + 1, self.bytes + sum(one.nbytes for one in touched)
        return result


def _in_fp8(hidden: int, wide: int, tokens: int) -> Iterator[Figure]:
    some = partial(torch.randn, dtype=torch.bfloat16, device=device())
    weight = some(wide, hidden)
    try:
        fp8.check(torch.device(device()))
    except ConfigError as error:
        yield Figure("products in FP8", str(error))
        return
    left, right = torch.randn(256, 512).bfloat16(), torch.randn(128, 512).bfloat16()
    there, here = fp8.product(left.to(device()), right.to(device())).cpu().float(), fp8.product(left, right).float()
    off = float((there - here).norm() / here.norm())
    yield Figure("product in FP8 beside a CPU's", f"{off:.1e} off", "below 5e-3", off < 5e-3)
    for name, inputs, factor in (
        ("gate", some(tokens, hidden), weight),
        ("gate, backward", some(tokens, wide), weight.T),
    ):
        plain = seconds_of(lambda inputs=inputs, factor=factor: inputs @ factor.T)
        ours = seconds_of(partial(fp8.product, inputs, factor))
        yield Figure(f"product {name} in FP8", f"{1e3 * ours:.2f} ms, {plain / ours:.2f} x as fast")
