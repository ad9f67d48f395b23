"""The activations that decoder layers need in their backward pass: kept from the forward pass, or computed again.

Kept inputs of layers may wait in pinned host memory between forward and backward, copied by a stream of their own while
the device computes:

    compute | layer 3      | layer 4      | ... | layer 4, backward | layer 3, backward
    copies  | input of 3 > | input of 4 > |     | < input of 3      | < input of 2

An input leaves while its layer and the next one compute. It comes back one layer early, so two are on the device at a
time. Memory of the device is given and taken by the stream that computes alone, which waits for the copies: so the host
may run ahead of both by any number of layers without a need for more.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.config.training import Train
from trainer.model.documents import recomputed
from trainer.model.parts import is_layer
from trainer.model.tiled import mlps, tile
from trainer.processes.accelerator import kind
from trainer.processes.devices import blocks, place_bytes


def arrange_activations(model: PreTrainedModel, settings: Train) -> None:
    """Make layers of `model` compute their activations again, keep their inputs on the host and tile their MLPs, as
    `settings` say.

    The last layers are the cheapest to keep: their backward passes come first, and when the others are computed again,
    theirs are gone.
    """
    layers: list[Any] = [module for module in model.modules() if is_layer(module)]
    again = len(layers) - settings.kept_layers(len(layers))
    if again:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
        model.disable_input_require_grads()  # only reentrant checkpointing needs a gradient of the embedding's output
    here = kind()
    offload = (
        Offload(torch.device(here), again) if here and settings.activation_offload else None
    )  # a CPU's are on the host
    for place, layer in enumerate(layers):
        layer.gradient_checkpointing = place < again  # transformers' flag
        if offload is not None:
            layer._gradient_checkpointing_func = offload.checkpoint
        if longest := settings.longest_mlp(recomputed=place < again):
            for mlp in mlps(layer):
                tile(mlp, longest)


_LEAVING = 2  # how many saved inputs may be on the device as well


class _Arena:
    """Pinned memory for `count` inputs of layers, in places as large as the largest. One stream makes all copies from
    and to it, in order, so a place may be reused as soon as its input has left.
    """

    def __init__(self, count: int) -> None:
        self._count, self._size = count, 0
        self._free, self._blocks = list[Tensor](), list[int]()

    def place_of(self, size: int) -> Tensor:
        """A free place for a tensor of so many bytes, as bytes."""
        if place_bytes(size) > self._size:
            self._size = place_bytes(size)
            self._free, self._blocks = [], blocks(self._size, self._count)
        if not self._free:
            places = self._blocks.pop() if self._blocks else 1
            self._free.extend(torch.empty(places, self._size, dtype=torch.uint8, pin_memory=True).unbind())
        return self._free.pop()

    def give_back(self, place: Tensor) -> None:
        if place.nbytes == self._size:
            self._free.append(place)


class _Input:
    """An input of a layer, `there` on the host and, until it has gone and again once it was called back, `here`;
    `copied` marks the end of the last copy between the two. `before` is the one that was saved before it, as long as
    its backward pass is to come."""

    def __init__(self, here: Tensor, there: Tensor, before: "Callable[[], _Input | None]") -> None:
        self.here: Tensor | None = here
        self.there, self.before = there, before
        self.copied = torch.Event(here.device)


class Offload:
    """Activation checkpointing of so many `layers`, whose saved inputs wait on the host."""

    def __init__(self, device: torch.device, layers: int) -> None:
        self._device, self._stream, self._arena = device, torch.Stream(device), _Arena(layers)
        self._leaving: deque[_Input] = deque()
        self._newest: Callable[[], _Input | None] = lambda: None  # the last saved input that is still needed

    def checkpoint(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """A replacement for torch.utils.checkpoint in transformers' layers."""
        with saved_tensors_hooks(self._send, self._receive):
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=recomputed)

    def _send(self, here: Tensor) -> _Input:
        place = self._arena.place_of(here.nbytes)
        sent = _Input(here, place[: here.nbytes].view(here.dtype).view(here.shape), self._newest)
        weakref.finalize(sent, self._arena.give_back, place)
        self._copy(sent, sent.there, here)
        self._newest = weakref.ref(sent)
        self._leaving.append(sent)
        if len(self._leaving) > _LEAVING:
            gone = self._leaving.popleft()
            self._wait_for(gone)
            gone.here = None
        return sent

    def _receive(self, wanted: _Input) -> Tensor:
        here = self._call_back(wanted)
        self._wait_for(wanted)
        wanted.here, self._newest = None, wanted.before
        if wanted in self._leaving:  # It would hold its place until the next forward pass.
            self._leaving.remove(wanted)
        if (following := wanted.before()) is not None:
            self._call_back(following)
        return here

    def _call_back(self, wanted: _Input) -> Tensor:
        if wanted.here is None:
            wanted.here = torch.empty_like(wanted.there, device=self._device)
            self._copy(wanted, wanted.here, wanted.there)
        return wanted.here

    def _copy(self, what: _Input, to: Tensor, of: Tensor) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            to.copy_(of, non_blocking=True)
            what.copied.record()

    def _wait_for(self, what: _Input) -> None:
        torch.accelerator.current_stream(self._device).wait_event(what.copied)
