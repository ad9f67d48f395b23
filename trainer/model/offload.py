"""Inputs of layers in pinned memory of the host between forward and backward, carried by a stream of their own while the device computes.

    compute | layer 3      | layer 4      | ... | layer 4, backward | layer 3, backward
    copies  | input of 3 > | input of 4 > |     | < input of 3      | < input of 2

An input leaves while its layer and the next one compute. It comes back one layer early, so two are on the device at a time. Memory of the device
is given and taken by the stream that computes alone, which waits for the copies: so the host may run ahead of both by any number of layers
without a need for more.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from trainer.model.documents import recomputed

_LEAVING = 2  # inputs that are on the device though they are saved on the host


class _Input:
    """An input of a layer, `there` on the host and, until it has gone and again once it was called back, `here`; `copied` marks the end of the
    last copy between the two. `before` is the one that was saved before it, as long as its backward pass is to come."""

    def __init__(self, here: Tensor, there: Tensor, before: "Callable[[], _Input | None]") -> None:
        self.here: Tensor | None = here
        self.there, self.before = there, before
        self.copied = torch.Event(here.device)


def _nothing() -> None:
    return None


class Offload:
    """Activation checkpointing whose saved inputs wait on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.Stream(device)
        self._leaving: deque[_Input] = deque()
        self._newest: Callable[[], _Input | None] = _nothing  # what was saved last and is still needed

    def checkpoint(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """As torch.utils.checkpoint, for transformers' layers."""
        with saved_tensors_hooks(self._send, self._receive):
            return checkpoint(layer, *inputs, use_reentrant=False, context_fn=recomputed)

    def _send(self, here: Tensor) -> _Input:
        sent = _Input(here, torch.empty_like(here, device="cpu", pin_memory=True), self._newest)
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
