"""Other ways to compute a layer's products than the ones that are taken, timed beside them."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

from card.figures import Figure, device, seconds_of, shape

RANK = 16


def ways(given: argparse.Namespace) -> Iterator[Figure]:
    """Products in FP8 with what it takes to convert both factors; and LoRA on gate and up, each by itself and added to its result, or of both at
    once and within the product."""
    import torch

    from trainer.errors import ConfigError
    from trainer.model.kernels import fp8

    sizes = shape(given.layers, pretend=given.pretend)
    hidden, wide, tokens = sizes["hidden_size"], sizes["intermediate_size"], given.length
    some = partial(torch.randn, dtype=torch.bfloat16, device=device())
    rows, weights = some(tokens, hidden), [some(wide, hidden) for _ in range(2)]
    try:
        fp8.check(torch.device(device()))
        left, right = torch.randn(256, 512).bfloat16(), torch.randn(128, 512).bfloat16()
        there, here = fp8.product(left.to(device()), right.to(device())).cpu().float(), fp8.product(left, right).float()
        off = float((there - here).norm() / here.norm())
        yield Figure("product in FP8 beside a CPU's", f"{off:.1e} off", "below 5e-3", off < 5e-3)
        for name, inputs, weight in (("gate", rows, weights[0]), ("gate, backward", some(tokens, wide), weights[0].T)):
            plain = seconds_of(lambda inputs=inputs, weight=weight: inputs @ weight.T)
            ours = seconds_of(partial(fp8.product, inputs, weight))
            yield Figure(f"product {name} in FP8", f"{1e3 * ours:.2f} ms, {plain / ours:.2f} x as fast")
    except ConfigError as error:
        yield Figure("products in FP8", str(error))
    downs, ups = [some(RANK, hidden) for _ in range(2)], [some(wide, RANK) for _ in range(2)]

    def apart() -> None:
        for weight, down, up in zip(weights, downs, ups, strict=True):
            torch.nn.functional.linear(rows, weight).addmm_(rows @ down.T, up.T)

    def shared() -> None:
        both = rows @ torch.cat(downs).T
        for number, (weight, up) in enumerate(zip(weights, ups, strict=True)):
            torch.nn.functional.linear(rows, weight).addmm_(both[:, number * RANK : (number + 1) * RANK], up.T)

    def within() -> None:
        both = torch.cat([rows, rows @ torch.cat(downs).T], 1)
        for number, (weight, up) in enumerate(zip(weights, ups, strict=True)):
            beside = [up if place == number else torch.zeros_like(up) for place in range(2)]
            torch.nn.functional.linear(both, torch.cat([weight, *beside], 1))

    others: dict[str, Callable[[], None]] = {"shared": shared, "shared, within the product": within}
    taken = seconds_of(apart)
    yield Figure("gate and up with LoRA", f"{1e3 * taken:.2f} ms")
    for name, way in others.items():
        seconds = seconds_of(way)
        yield Figure(f"the same, {name}", f"{1e3 * seconds:.2f} ms, {taken / seconds:.2f} x as fast")
