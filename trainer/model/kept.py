"""Measures the bytes that autograd saves for the backward pass of a tower."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trainer.model.front import Front


class KeptBytes:
    """`bytes` are saved in all, `layer` of them in the layer that saves most, and `largest` are those of one tensor.

    Memory that several tensors share counts once, and the weights of the class count not at all.
    """

    def __init__(self, weights: Iterator[Tensor]) -> None:
        self._known = {_place(tensor) for tensor in weights}
        self._held = list[torch.UntypedStorage]()  # so that no other memory gets the same place
        self.bytes = self.layer = self.largest = 0
        self._before = 0

    def save(self, value: Tensor) -> Tensor:
        if _place(value) not in self._known:
            storage = value.untyped_storage()
            self._known.add(_place(value))
            self._held.append(storage)
            self.bytes += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return value

    def begin_layer(self, *_given: Any) -> None:
        self._before = self.bytes

    def end_layer(self, *_given: Any) -> None:
        self.layer = max(self.layer, self.bytes - self._before)


def _place(value: Tensor) -> int:
    return value.untyped_storage()._cdata


@contextmanager
def kept_of(front: Front) -> Iterator[KeptBytes]:
    """Inside, what is saved is measured."""
    whole: nn.Module = front.whole
    kept = KeptBytes(iter([*whole.parameters(), *whole.buffers()]))
    with ExitStack() as stack:
        for layer in front.layers:
            for handle in (
                layer.register_forward_pre_hook(kept.begin_layer),
                layer.register_forward_hook(kept.end_layer),
            ):
                stack.callback(handle.remove)
        stack.enter_context(saved_tensors_hooks(kept.save, lambda value: value))
        yield kept
