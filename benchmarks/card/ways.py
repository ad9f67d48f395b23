"""Other ways to compute a layer's products than the ones that are taken: counted for the shape of 8B, and timed beside
them.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
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
_FREE = {"alias", "view", "_unsafe_view", "t", "transpose", "slice", "split", "split_with_sizes", "detach", "expand", "new_empty", "empty"}  # fmt: skip


def ways(given: argparse.Namespace) -> Iterator[Figure]:
    """Products in FP8 with what it takes to convert both factors; and LoRA on layers that read the same rows, each by
    itself and added to its result, or of all at once, or within the product."""
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
    """Linear layers that read the same rows (T, in): weights (out, in), and LoRA's matrices (RANK, in) and (out,
    RANK).
    """

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
    ways: dict[str, tuple[Callable[[Layers], Sequence[Tensor]], Layers, Layers]] = {
        "each by itself": (_apart, counted, timed),
        "shared": (_together, counted, timed),
        "shared, within the product": (_within, counted, timed),
        "the same, of weights made with room for B": (_within_room, _with_room(counted), _with_room(timed)),
    }
    taken, launched, seconds = 0.0, 0, 0.0
    for way, (action, counted, timed) in ways.items():
        with _Counted() as found:
            _step(action, counted)
        took = seconds_of(partial(_step, action, timed), times=5)
        if not taken:
            taken, launched, seconds = found.bytes, found.launches, took
        yield Figure(
            f"{name} with LoRA, {way}, there and back",
            f"{found.launches} kernels ({found.launches - launched:+d}) and {found.bytes / 1e9:.2f} GB"
            f" ({(found.bytes - taken) / 1e9:+.2f}) a layer of 8B at {TOKENS:,} tokens; {1e3 * took:.3f} ms here,"
            f" {seconds / took:.2f} x as fast",
        )


def _step(action: Callable[[Layers], Sequence[Tensor]], layers: Layers) -> None:
    results = action(layers)
    torch.autograd.grad(results, [layers.rows, *layers.downs, *layers.ups], [result.detach() for result in results])


def _adapted(layers: Layers, columns: int | None = None) -> list[lora.AdaptedLinear]:
    parts = zip(layers.weights, layers.downs, layers.ups, strict=True)
    return [
        lora.AdaptedLinear(SimpleNamespace(weight=weight[:, :columns], bias=None), down, up, SCALING, None)  # type: ignore[arg-type]
        for weight, down, up in parts
    ]


def _apart(layers: Layers) -> list[Tensor]:
    return [lora.multiply_adapted(layers.rows, None, [one])[0] for one in _adapted(layers)]


def _together(layers: Layers) -> Sequence[Tensor]:
    """The way that is taken on a GPU: the product's own function."""
    return lora.multiply_adapted(layers.rows, None, _adapted(layers))


def _within(layers: Layers) -> Sequence[Tensor]:
    """[x, low] [W, sB]^T, for which x and W are copied."""
    return _within_room(_with_room(layers))


def _within_room(layers: Layers) -> Sequence[Tensor]:
    """The same, where x alone is copied."""
    return _Within.apply(layers.rows, None, _adapted(layers, layers.rows.shape[1]), layers, *layers.downs, *layers.ups)  # type: ignore[return-value]


class _Within(torch.autograd.Function):
    """The low-rank part within the product of the forward pass; the backward pass is that of the product's own
    function.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, _dropped: None, adapted: Any, layers: Layers, *_matrices: Tensor
    ) -> tuple[Tensor, ...]:
        low = rows @ torch.cat(layers.downs).t()
        ctx.save_for_backward(rows, low)
        ctx.layers, ctx.drops = adapted, False
        both = torch.cat([rows, low], 1)
        for number, (weight, up) in enumerate(zip(layers.weights, layers.ups, strict=True)):
            beside = weight[:, rows.shape[1] :].zero_()
            torch.mul(up.detach(), SCALING, out=beside[:, number * RANK : (number + 1) * RANK])
        return tuple(both @ weight.t() for weight in layers.weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        taken = SimpleNamespace(
            saved_tensors=ctx.saved_tensors,
            kept=None,
            layers=ctx.layers,
            drops=False,
            needs_input_grad=[True] + 99 * [False],
        )
        of_rows, _, _, _, _, *learnt = lora._AdaptedMatmul.backward(taken, *grads)
        return of_rows, None, None, None, *learnt[0::3], *learnt[1::3]


def _with_room(layers: Layers) -> Layers:
    """The same with weights (out, in + all ranks)."""
    room = RANK * len(layers.ups)
    return layers._replace(weights=[torch.cat([one, one.new_empty(len(one), room)], 1) for one in layers.weights])


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
    yield from _experts_in_fp8(hidden, wide // 8, tokens)


def _experts_in_fp8(hidden: int, wide: int, tokens: int) -> Iterator[Figure]:
    """Eight experts, which have as many rows as there are tokens."""
    experts, some = 8, partial(torch.randn, dtype=torch.bfloat16, device=device())
    if not fp8.multiplies_groups(torch.device(device())):
        yield Figure("experts in FP8", "PyTorch has no kernel of such groups for this GPU")
        return
    rows, matrices = some(experts * tokens, hidden), some(experts, wide, hidden).mT
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=device()) * tokens
    first, last = fp8.product(rows[:tokens], matrices[0].mT), fp8.product(rows[-tokens:], matrices[-1].mT)
    found, expected = fp8.product_of_groups(rows, matrices, offsets), torch.cat([first, last]).float()
    ends = torch.cat([found[:tokens], found[-tokens:]]).float()
    off = float((ends - expected).norm() / expected.norm())
    plain = seconds_of(lambda: torch.nn.functional.grouped_mm(rows, matrices, offs=offsets))
    ours = seconds_of(lambda: fp8.product_of_groups(rows, matrices, offsets))
    said = f"{1e3 * ours:.2f} ms, {plain / ours:.2f} x as fast with {tokens} rows each, {off:.1e} off"
    yield Figure("experts in FP8 beside products of each", said, "below 5e-3", off < 5e-3)
