"""The floating point operations that a step asks for, and the share of the device's peak that they come to (MFU).

A product of a (T, inputs) and an (inputs, outputs) matrix is 2 T inputs outputs operations. Only what learning from
these documents needs is counted: no padding, and of a causal attention the half that it computes. Where activations are
recomputed, that is counted too, so that figures with and without it compare.

    per token of a document        forward   backward: of inputs, of weights   again, where recomputed
    frozen weight                     2              2            -                     2    but a layer's last product
    weight that learns                2              2            2                     2
    pair of tokens, width w          4 w            8 w           -                    4 w    and the one that it sees
    weight of the head, a target      2              2     2, and 2 for its logits      -

Norms, rotary embeddings, activation functions and dequantizing are left out, as their time is the memory's; so are
embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from trainer.base.architecture import Architecture, Parameter
from trainer.config import Config
from trainer.plan.gpus import find_gpu
from trainer.plan.resolve import reference_of
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

if TYPE_CHECKING:
    from trainer.model.micro_batch import MicroBatch


@dataclass(frozen=True)
class AttentionWork:
    """The attention of one decoder layer.

    It has the operations of a forward pass for a pair of tokens, and the most tokens that one token sees.
    """

    pair: float
    window: int | None

    def pairs(self, length: int) -> int:
        """Return the number of pairs of a token and one that it sees, itself included, in a document."""
        seen = min(length, self.window or length)
        return seen * (seen + 1) // 2 + (length - seen) * seen


@dataclass(frozen=True)
class StepWork:
    """The operations of all passes of a step: for a token of a document, for a target, and for pairs of tokens.

    Those for pairs are of `passes` forward passes. `experts` is the part of `token` that are products with a mixture's
    experts: `products` forward passes of them. `peak` is the device's operations a second, if it is known.
    """

    token: float = 0.0
    target: float = 0.0
    attention: tuple[AttentionWork, ...] = ()
    passes: float = 0.0
    peak: float | None = None
    experts: float = 0.0
    products: float = 0.0

    def of(self, batches: Iterable[MicroBatch]) -> float:
        """Return the operations of a step's micro-batches.

        Ranks that share a row have its pairs by heads, and equally many each.
        """
        found = 0.0
        for batch in batches:
            pairs = sum(layer.pair * layer.pairs(length) for length in _documents(batch) for layer in self.attention)
            found += batch.tokens * self.token + batch.targets * self.target + self.passes * pairs / batch.input.parts
        return found

    def of_row(self, tokens: int) -> float:
        """Return the operations of a row that one document of so many tokens fills, each of them a target.

        No row can ask for more.
        """
        return tokens * (self.token + self.target) + self.passes * sum(
            layer.pair * layer.pairs(tokens) for layer in self.attention
        )

    def measured(self, operations: float, seconds: float) -> dict[str, float]:
        """Return TFLOP/s of a rank, and MFU, of a step of so many operations and seconds, summed over the ranks."""
        if not operations:
            return {}
        rate = operations / seconds
        return {"teraflops": float(f"{rate / 1e12:.4g}")} | ({"mfu": round(rate / self.peak, 4)} if self.peak else {})


UNKNOWN_WORK = StepWork()
"""No operation is counted, and so nothing is said of them."""


def _documents(batch: MicroBatch) -> Iterator[int]:
    """Yield the tokens of each segment of the row, without padding."""
    from trainer.model.micro_batch import Role

    segments = batch.input.segments
    for length, role in zip(segments.lengths, segments.roles, strict=True):
        if role != Role.PADDING:
            yield length


def work_of(config: Config, model: Architecture, recomputed: float, device_name: str) -> StepWork:
    """Return the work of a run whose backward passes repeat the forward passes of this share of the decoder layers."""
    method, gpu = method_of(config), find_gpu(device_name)
    objective = find_objective(config, method)
    survey, reference = objective.survey, reference_of(config, objective, method)
    learning, products = method.shapes(model), _products(model)
    base = {parameter.name for parameter in model.parameters}
    visits = max((parameter.visits for parameter in model.parameters if parameter.kind == "experts"), default=1.0)
    learnt = sum(size for name, size in products.items() if name in learning)
    frozen = sum(products.values()) - learnt
    if not method.virtual.count:  # virtual tokens cost as much as any token
        # A vector is no product.
        added = [shape for name, shape in learning.items() if name not in base and len(shape) > 1]
        learnt += sum(prod(shape) * (visits if len(shape) == 3 else 1) for shape in added)
    head = model.vocabulary * model.hidden
    head_learns = model.head in learning or (model.head_is_embedding and model.embedding in learning)
    # Some forward passes have no backward pass: those through the reference, without what was added, and those of a
    # survey.
    surveyed, referred = (survey.share if survey else 0.0), float(reference == "adapter_off")
    experts = {part.name: products[part.name] for part in model.parameters if part.kind == "experts"}
    # Forward passes' worth of products with frozen weights; the gradients of weights are another one.
    of_frozen = (1 - surveyed) * (2 + recomputed) + surveyed + referred
    of_learnt = of_frozen + (1 - surveyed) - referred
    again = frozen + learnt - sum(size for name, size in _last_products(model).items() if name not in learning)
    every_pass = 2 * (frozen + learnt) + recomputed * 2 * again + 2 * frozen + 4 * learnt
    return StepWork(
        token=(1 - surveyed) * every_pass + surveyed * 2 * (frozen + learnt) + referred * 2 * frozen,
        target=head * ((1 - surveyed) * (8 if head_learns else 4) + 2 * (surveyed + referred)),
        attention=tuple(_attention(model)),
        # A backward pass has twice as many products as a forward pass: both inputs of each have gradients.
        passes=(1 - surveyed) * (3 + recomputed) + surveyed + referred,
        peak=gpu.flops if gpu and config.model.dtype == "bf16" else None,
        experts=sum(2 * size * (of_learnt if name in learning else of_frozen) for name, size in experts.items()),
        products=of_frozen,
    )


def _products(model: Architecture) -> dict[str, float]:
    """Return the weights that a token is multiplied with, by parameter.

    Of experts these are the ones that it visits.
    """
    return {part.name: part.numel * part.visits for part in model.parameters if part.kind in ("linear", "experts")}


def _last_products(model: Architecture) -> dict[str, int]:
    """Return the weights of the last product of each layer without experts, by parameter.

    No gradient needs its result while its weights are frozen, so the backward pass does not repeat it
    (trainer/model/activations.py). Some families have a norm behind it. There it is repeated, and the count leaves that
    out.
    """
    last, mixtures = dict[int | None, Parameter](), {part.layer for part in model.parameters if part.kind == "experts"}
    for part in model.parameters:
        if part.kind == "linear" and part.layer not in mixtures and part.shape[0] == model.width:
            last[part.layer] = part
    return {part.name: part.numel for layer, part in last.items() if layer is not None}


def _attention(model: Architecture) -> Iterator[AttentionWork]:
    """Yield the attention of each layer.

    The width of the values, which enter attention's last linear layer, stands for the width of queries and keys as
    well.
    """
    for layer in model.attention:
        widths = [
            part.shape[1]
            for part in model.in_layer(layer.layer)
            if part.kind == "linear" and part.name.startswith(f"{layer.path}.") and part.shape[0] == model.width
        ]
        if widths:
            yield AttentionWork(4.0 * widths[-1], layer.window)
