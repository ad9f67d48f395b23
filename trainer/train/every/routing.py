"""Where a mixture's routers send the tokens: counted on the device by each experts' module, exchanged once a step.

An expert's share is that of the tokens of its layer that it sees; the shares of a layer add up to the experts that a
token visits. Padding is counted, and the recomputation of activations, which is alike in all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.train.every import Action, ActionKind, Actions, Moment, Stage

if TYPE_CHECKING:
    from trainer.train.loop import Training
    from trainer.train.start import Start


class Layer(NamedTuple):
    """The visits to each expert of a layer on all ranks, where each token visits `each` experts."""

    visits: list[int]
    each: int

    @property
    def shares(self) -> list[float]:
        return [self.each * visits / max(1, sum(self.visits)) for visits in self.visits]

    @property
    def load(self) -> float:
        """The visits to the busiest expert divided by the mean: 1 if all are alike."""
        return max(self.visits) * len(self.visits) / max(1, sum(self.visits))


class Routing(Action):
    """The counts of a mixture's experts, by the paths of their modules. Each save writes the shares since the previous
    save.
    """

    stage = Stage.REPORT

    def __init__(self, modules: Mapping[str, Any], start: Start) -> None:
        self._modules, self._ranks, self._metrics = modules, start.ranks, start.metrics
        self._since: dict[str, Layer] = {}

    def stepped(self, step: int) -> Mapping[str, float]:
        """The largest `load` of all layers, and the experts that saw no token."""
        layers = self._taken()
        self._since = {path: Layer(_added(self._since.get(path), layer), layer.each) for path, layer in layers.items()}
        return _measures(layers)

    def is_due(self, now: Moment) -> bool:
        return now.saved

    def act(self, now: Moment) -> None:
        self._write(now.step, "train", self._since)
        self._since = {}

    def evaluated(self, step: int, of: str) -> Mapping[str, float]:
        layers = self._taken()
        self._write(step, of, layers)
        return _measures(layers)

    def _write(self, step: int, of: str, layers: Mapping[str, Layer]) -> None:
        shares = {path: [round(share, 4) for share in layer.shares] for path, layer in layers.items()}
        self._metrics.write("experts", step=step, of=of, shares=shares)

    def _taken(self) -> dict[str, Layer]:
        """The counts since they were last taken."""
        import torch

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
    unused = sum(layer.visits.count(0) for layer in layers.values())
    return {"expert_load": round(max(layer.load for layer in layers.values()), 4), "experts_unused": unused}


def _open(run: Training, _: Actions) -> Routing | None:
    from trainer.model.parts import is_experts

    modules = {path: part for path, part in run.engine.model.named_modules() if is_experts(part)}
    return Routing(modules, run.start) if modules else None


ACTIONS = {"routing": ActionKind(_open)}
