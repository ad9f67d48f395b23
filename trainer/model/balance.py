"""The balancing loss of a mixture's routers, which keeps them from sending all tokens to a few experts.

For one layer with E experts of which each token visits k, let f be the visits to an expert divided by the tokens (the
f of all experts add up to k), and P the mean of its share in softmax(router's logits). Tokens are those of one row,
without its padding. The loss of the row is, by `of`:

    model     E * sum over experts of mean(f) mean(P), with means over the layers; k where all is even. transformers has
              it (load_balancing_loss_func; Switch Transformers, arXiv:2101.03961, equations 4 to 6)
    layers    sum over layers of E / k * sum over experts of f P; 1 for each layer where all is even. Megatron has it

f has no gradient. The gradient of P goes through the router's logits into the hidden states, also where the router
itself is frozen.

A router's module returns weights that the experts need, and the gradient is added where the backward pass comes through
these: a layer whose activations are recomputed needs nothing that was kept of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel

from trainer.errors import ConfigError
from trainer.model.micro_batch import MicroBatch, ModelInput
from trainer.model.packed import PackedModel

SETTING = "objective.router_loss"
UNKNOWN_ROUTERS = "transformers does not say which modules of this base route tokens to experts"
Loss = Callable[[PackedModel, MicroBatch], Tensor]
Of = Literal["model", "layers"]


class _Layer(NamedTuple):
    """The work of a router in the pass, in fp32: `visits` (E,) by the tokens, f above, and `shares` (E,), P above."""

    visits: Tensor
    shares: Tensor


def routers(model: nn.Module) -> dict[nn.Module, int]:
    """The modules that route tokens, and which of a module's results are its logits, by what transformers records."""
    found = dict[nn.Module, int]()
    for part in model.modules():
        recorded: Any = (type(part)._can_record_outputs or {}) if isinstance(part, PreTrainedModel) else {}
        if (kind := recorded.get("router_logits")) is not None:
            found |= {module: kind.index for module in part.modules() if isinstance(module, kind.target_class)}
    return found


def places_of_choice(results: Any, index: int) -> list[int]:
    """Return which of a router's results are the numbers of chosen experts. Its result `index` is its logits."""
    return [place for place, value in enumerate(results) if _is_chosen(value, results[index])]


def without_choice(router: nn.Module) -> str:
    """Return, as a clause, what is wrong with a router that does not return the numbers of chosen experts."""
    return f"{type(router).__name__} of this base does not return which experts it chose"


def balanced(loss: Loss, weight_of: Callable[[MicroBatch], int], model: nn.Module, weight: float, of: Of) -> Loss:
    """`loss` with `weight` times the balancing loss of a row, times what the row weighs itself (`weight_of`).

    Only training adds it; an evaluation measures `loss` alone. Raises `ConfigError` for a base whose routers
    transformers does not record.
    """
    found = routers(model)
    if not found:
        raise ConfigError(f"{SETTING}: {UNKNOWN_ROUTERS}. Remove it.")
    balance = _Balance(of)
    for module, index in found.items():
        module.register_forward_hook(balance.hook(index))

    def with_balance(packed: PackedModel, batch: MicroBatch) -> Tensor:
        scale = weight * weight_of(batch)
        if not packed.head.training or not scale:
            return loss(packed, batch)
        balance.begin(scale, _documents(batch.input))
        plain = loss(packed, batch)
        value = scale * balance.end()
        return _Added.apply(plain, value, balance)  # type: ignore[return-value]

    return with_balance


def _documents(row: ModelInput) -> Tensor | None:
    """1 for a token of a document, 0 for one of padding, (T,) fp32; None if there is no padding."""
    if not row.segments.padding:
        return None
    kept = torch.ones(row.input_ids.shape[1], device=row.input_ids.device)
    for begin, end in row.segments.padding:
        kept[max(0, begin - row.first) : max(0, end - row.first)] = 0
    return kept


class _Balance:
    """The routers' part in the pass of one row: `begin`, the pass, `end`, and then its backward pass."""

    def __init__(self, of: Of) -> None:
        self._of = of
        self._open, self._kept = False, None
        self._layers: list[_Layer] = []
        self.scale: float = 0.0
        self.arrived: Tensor | None = None  # the gradient of the row's loss, which the backward pass begins with

    def begin(self, scale: float, kept: Tensor | None) -> None:
        self._open, self._kept, self._layers, self.scale, self.arrived = True, kept, [], scale, None

    def end(self) -> Tensor:
        """The row's balancing loss, () fp32, without a graph."""
        self._open = False
        if not self._layers:
            return torch.zeros(())
        if self._of == "layers":
            return torch.stack([_even(layer) * (layer.visits @ layer.shares) for layer in self._layers]).sum()
        visits, shares = self._means()
        return len(visits) * (visits @ shares)

    def _means(self) -> _Layer:
        return _Layer(*(torch.stack(values).mean(0) for values in zip(*self._layers, strict=True)))

    def slope(self, visits: Tensor) -> Tensor:
        """d loss / d P of a layer with these visits, (E,) fp32."""
        assert self.arrived is not None, "a router's backward pass came before that of the loss"
        if self._of == "layers":
            found = _even(_Layer(visits, visits)) * visits
        else:
            found = len(visits) * self._means().visits / len(self._layers)
        return self.arrived * self.scale * found

    def hook(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def look(module: nn.Module, _given: Any, results: Any) -> Any:
            if not torch.is_grad_enabled() or not self.scale or not module.training:
                return results
            return self._looked_at(module, results, index)

        return look

    def _looked_at(self, module: nn.Module, results: Any, index: int) -> Any:
        chosen = places_of_choice(results, index)
        weights = [place for place, value in enumerate(results) if place != index and _learns(value)]
        if not chosen:
            raise ConfigError(f"{SETTING}: {without_choice(module)}. Remove it.")
        layer = self._layer(results[index], results[chosen[0]])
        if self._open:
            self._layers.append(_Layer(layer.visits, layer.shares.detach()))
        if not weights:
            return results  # nothing before this router learns
        found = list(results)
        found[weights[0]] = _Balanced.apply(found[weights[0]], layer.shares, layer.visits, self)
        return tuple(found)

    def _layer(self, logits: Tensor, chosen: Tensor) -> _Layer:
        shares = logits.float().softmax(-1)  # (T, E)
        kept = shares.new_ones(len(shares)) if self._kept is None else self._kept
        total = kept.sum().clamp(min=1)
        visits = shares.new_zeros(shares.shape[1])
        visits.index_add_(0, chosen.flatten(), kept.repeat_interleave(chosen.shape[1]))
        return _Layer(visits / total, (shares * (kept / total)[:, None]).sum(0))


def _even(layer: _Layer) -> Tensor:
    """E / k."""
    return len(layer.visits) / layer.visits.sum().clamp(min=1)


def _is_chosen(value: Any, logits: Tensor) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.shape[:-1] == logits.shape[:-1]


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad


class _Balanced(Function):
    """A router's weights, whose backward pass also begins that of its `shares`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, shares: Tensor, visits: Tensor, balance: _Balance) -> Tensor:
        ctx.visits, ctx.balance = visits, balance
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        return grad, ctx.balance.slope(ctx.visits), None, None


class _Added(Function):
    """The sums of a row, with `value` added to the first. The backward pass notes the gradient that arrives there."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, value: Tensor, balance: _Balance) -> Tensor:
        ctx.balance = balance
        found = sums.clone()
        found.view(-1)[0] += value.to(found.device)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ctx.balance.arrived = grad.reshape(-1)[0].float()
        return grad, None, None
