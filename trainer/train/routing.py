"""Where a mixture's routers send the tokens: counted on the device by each experts' module, exchanged once a step.

An expert's share is that of the tokens of its layer that it sees; the shares of a layer add up to the experts that a
token visits. Padding is counted, and the recomputation of activations, which is alike in all layers.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from trainer.model.parts import is_experts
from trainer.processes.ranks import Ranks
from trainer.run.metrics import Metrics


class Layer(NamedTuple):
    """The visits to each expert of a layer on all ranks, where a token visits `each`."""

    visits: list[int]
    each: int

    @property
    def shares(self) -> list[float]:
        return [self.each * visits / max(1, sum(self.visits)) for visits in self.visits]

    @property
    def load(self) -> float:
        """The visits to the busiest expert over their mean: 1 where all are alike."""
        return max(self.visits) * len(self.visits) / max(1, sum(self.visits))


class Routing:
    """The counts of a model's experts; of a base that is no mixture there are none, and nothing is written."""

    def __init__(self, model: nn.Module, ranks: Ranks, metrics: Metrics) -> None:
        self._modules: dict[str, Any] = {path: part for path, part in model.named_modules() if is_experts(part)}
        self._ranks, self._metrics = ranks, metrics
        self._since: dict[str, Layer] = {}

    def measured(self) -> dict[str, float]:
        """The measures of a step that has passed: the largest `load` of all layers, and the experts that saw no token.
        Collective.
        """
        layers = self._taken()
        self._since = {path: Layer(_added(self._since.get(path), layer), layer.each) for path, layer in layers.items()}
        return _measures(layers)

    def report(self, step: int) -> None:
        """Write the shares of the steps since the last report."""
        self._write(step, "train", self._since)
        self._since = {}

    def evaluated(self, step: int, of: str = "eval") -> dict[str, float]:
        """The measures of an evaluation that has passed, `of` some data, whose shares are written. Collective."""
        layers = self._taken()
        self._write(step, of, layers)
        return _measures(layers)

    def _write(self, step: int, of: str, layers: Mapping[str, Layer]) -> None:
        if layers:
            shares = {path: [round(share, 4) for share in layer.shares] for path, layer in layers.items()}
            self._metrics.write("experts", step=step, of=of, shares=shares)

    def _taken(self) -> dict[str, Layer]:
        """The counts since they were last taken."""
        if not self._modules:
            return {}
        counts = self._ranks.total(torch.cat([module.visits for module in self._modules.values()])).tolist()
        layers: dict[str, Layer] = {}
        for path, module in self._modules.items():
            size = len(module.visits)
            layers[path], counts = Layer(counts[:size], module.each), counts[size:]
            module.visits = 0
        return layers


def _added(before: Layer | None, layer: Layer) -> list[int]:
    return [sum(pair) for pair in zip(before.visits, layer.visits, strict=True)] if before else layer.visits


def _measures(layers: Mapping[str, Layer]) -> dict[str, float]:
    if not layers:
        return {}
    unused = sum(layer.visits.count(0) for layer in layers.values())
    return {"expert_load": round(max(layer.load for layer in layers.values()), 4), "experts_unused": unused}
