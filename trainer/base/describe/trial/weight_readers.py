"""Finds linear layers whose weights a family's own code reads, and those that read the same tensor.

A small model of the same kinds of layers computes once, and the place of each read is recorded. A layer whose weight is
read must stay as it is stored: code that multiplies with `layer.weight`, clamps it or asks for its type cannot do so
with packed bytes. Layers of one module that read the same tensor are such as those of queries, keys and values.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.documents import convolves
from trainer.model.parts import decoder_layers, is_layer

WeightPlace = tuple[str, str]
"""The name of the class of the module around a linear layer, and the layer's name in it: layers of one kind are alike
in all of a model.
"""


def places_read(model: PreTrainedModel) -> set[WeightPlace]:
    """The places of linear layers in decoder layers whose weight is read by code other than their forward pass.

    Layers that compute something other than a product also count."""
    found = set[WeightPlace]()
    tokens = torch.arange(3, 12).remainder(model.config.get_text_config().vocab_size)[None]
    with _watched(model, found), torch.no_grad(), torch.random.fork_rng(devices=[]):
        # Some families clamp weights only in training, others scale them only in evaluation.
        for training in (False, True):
            model.train(training)
            # A convolution passes its weights to a fused kernel in training, but not when trainer/model/documents.py
            # calls it.
            for module in model.modules():
                module.training = training and not convolves(module)
            model(input_ids=tokens, use_cache=False)
    return found


def weight_place(around: nn.Module, name: str) -> WeightPlace:
    return type(around).__name__, name


@contextmanager
def _watched(model: PreTrainedModel, found: set[WeightPlace]) -> Iterator[None]:
    """A context that adds the place of each linear layer of the decoder layers to `found` if code reads its weight."""
    layers, classes = decoder_layers(model), dict[nn.Module, type[nn.Module]]()
    for around in layers.modules() if layers is not None else ():
        for name, child in around.named_children():
            if isinstance(child, nn.Linear) and child not in classes:
                classes[child] = type(child)
                child.__class__ = _watching(type(child), weight_place(around, name), found)
    try:
        yield
    finally:
        for module, before in classes.items():
            module.__class__ = before


def _watching(kind: type[nn.Linear], place: WeightPlace, found: set[WeightPlace]) -> type[nn.Linear]:
    """A subclass of `kind` that adds its place to `found` if its weight is read outside its own forward pass."""

    def weight(self: Any) -> Tensor:
        if not vars(self).get("computes"):
            found.add(place)
        return self._parameters["weight"]

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        vars(self)["computes"] = True
        try:
            result = kind.forward(self, *given, **named)
            if kind.forward is not nn.Linear.forward and not _is_product(self, given, named, result):
                found.add(place)
            return result
        finally:
            vars(self).pop("computes")

    return type(kind.__name__, (kind,), {"weight": property(weight), "forward": forward})


def _is_product(linear: nn.Linear, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> bool:
    """Whether a linear layer with its own forward pass gives the result of a plain linear layer."""
    if len(given) != 1 or named or not isinstance(result, Tensor):
        return False
    plain = nn.functional.linear(given[0], linear.weight, linear.bias)
    return plain.shape == result.shape and torch.allclose(plain, result, rtol=1e-4, atol=1e-5)


def read_together(model: nn.Module, compute: Callable[[], Any]) -> set[tuple[WeightPlace, ...]]:
    """Groups of places of linear layers that are called with the same tensor, in the order of the calls.

    The layers of a group are called together in every module of the class that calls any of them when `model`
    computes."""
    calls = dict[nn.Module, list[tuple[WeightPlace, Tensor, int]]]()

    def note(around: nn.Module, name: str, _child: nn.Module, given: tuple[Tensor, ...]) -> None:
        for x in given[:1]:  # empty if the tensor is a keyword argument
            calls.setdefault(around, []).append((weight_place(around, name), x, x._version))

    with ExitStack() as hooks:
        for around in model.modules():
            for name, child in around.named_children():
                if isinstance(child, nn.Linear):
                    hooks.enter_context(child.register_forward_pre_hook(partial(note, around, name)))
        compute()
    of_classes = dict[type[nn.Module], list[set[tuple[WeightPlace, ...]]]]()
    for around, made in calls.items():
        of_classes.setdefault(type(around), []).append(_of_one_tensor(made))
    return {group for found in of_classes.values() for group in set.intersection(*found)}


def _of_one_tensor(calls: list[tuple[WeightPlace, Tensor, int]]) -> set[tuple[WeightPlace, ...]]:
    found = dict[tuple[int, int], dict[WeightPlace, None]]()
    for place, given, version in calls:
        found.setdefault((id(given), version), {})[place] = None
    return {tuple(places) for places in found.values() if len(places) > 1}


def paths_together(model: nn.Module, together: Collection[tuple[WeightPlace, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield groups of paths in `model` of linear layers at such places.

    The paths lie within the layers that ZeRO-3 gathers whole (trainer/state/zero/gather.py).
    """
    for path, layer in model.named_modules():
        for inner, around in layer.named_modules(prefix=path) if is_layer(layer) else ():
            there = {weight_place(around, name) for name, _ in around.named_children()}
            yield from (
                tuple(f"{inner}.{name}" for _, name in places)
                for places in sorted(together)
                if there.issuperset(places)
            )
