"""Finds linear layers of one module that read the same tensor, such as those of queries, keys and values.

A small model of the same kinds of layers computes once, and shows them."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from trainer.base.describe.trial.weight_readers import Place, place_of
from trainer.model.parts import is_layer


def read_together(model: nn.Module, compute: Callable[[], Any]) -> set[tuple[Place, ...]]:
    """Groups of places of linear layers that are called with the same tensor, in the order of the calls.

    The layers of a group are called together in every module of the class that calls any of them when `model`
    computes."""
    calls = dict[nn.Module, list[tuple[Place, Tensor, int]]]()

    def note(around: nn.Module, name: str, _child: nn.Module, given: tuple[Tensor, ...]) -> None:
        for x in given[:1]:  # empty if the tensor is a keyword argument
            calls.setdefault(around, []).append((place_of(around, name), x, x._version))

    with ExitStack() as hooks:
        for around in model.modules():
            for name, child in around.named_children():
                if isinstance(child, nn.Linear):
                    hooks.enter_context(child.register_forward_pre_hook(partial(note, around, name)))
        compute()
    of_classes = dict[type[nn.Module], list[set[tuple[Place, ...]]]]()
    for around, made in calls.items():
        of_classes.setdefault(type(around), []).append(_of_one_tensor(made))
    return {group for found in of_classes.values() for group in set.intersection(*found)}


def _of_one_tensor(calls: list[tuple[Place, Tensor, int]]) -> set[tuple[Place, ...]]:
    found = dict[tuple[int, int], dict[Place, None]]()
    for place, given, version in calls:
        found.setdefault((id(given), version), {})[place] = None
    return {tuple(places) for places in found.values() if len(places) > 1}


def paths_together(model: nn.Module, together: Collection[tuple[Place, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield groups of paths in `model` of linear layers at such places.

    The paths lie within the layers that ZeRO-3 gathers whole (trainer/state/zero/gather.py).
    """
    for path, layer in model.named_modules():
        for inner, around in layer.named_modules(prefix=path) if is_layer(layer) else ():
            there = {place_of(around, name) for name, _ in around.named_children()}
            yield from (
                tuple(f"{inner}.{name}" for _, name in places)
                for places in sorted(together)
                if there.issuperset(places)
            )
