"""Linear layers of one module that read one tensor, such as those of queries, keys and values, found by use: a small
model of the same kinds computes once."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from trainer.base.describe.trial.weight_readers import Place, place_of
from trainer.model.parts import is_layer


def read_together(model: nn.Module, compute: Callable[[], Any]) -> set[tuple[Place, ...]]:
    """The places of linear layers that are called with the very same tensor, in the order of their calls, in all
    modules of a class that call any when `model` computes."""
    calls = dict[nn.Module, list[tuple[Place, Tensor, int]]]()

    def note(around: nn.Module, name: str, _child: nn.Module, given: tuple[Tensor, ...]) -> None:
        for x in given[:1]:  # none where it is given by its name
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
    """The paths in `model` of the linear layers that are at such places, within the layers that ZeRO-3 gathers whole
    (trainer/state/zero/gather.py).
    """
    for path, layer in model.named_modules():
        for inner, around in layer.named_modules(prefix=path) if is_layer(layer) else ():
            there = {place_of(around, name) for name, _ in around.named_children()}
            yield from (
                tuple(f"{inner}.{name}" for _, name in places)
                for places in sorted(together)
                if there.issuperset(places)
            )
