"""The activations that decoder layers need in their backward pass: kept from the forward pass, or computed again.

Kept inputs of layers may wait in pinned host memory between forward and backward, copied by a stream of their own while
the device computes:

    compute | layer 3      | layer 4      | ... | layer 4, backward | layer 3, backward
    copies  | input of 3 > | input of 4 > |     | < input of 3      | < input of 2

An input leaves while its layer and the next one compute. It comes back one layer early, so two are on the device at a
time. Only the stream that computes takes and frees the device's memory, and it waits for the copies. So the host may
run ahead of both by any number of layers without taking more.

MLPs over long rows compute a tile of tokens at a time, so that tensors wider than a hidden state exist for one tile
only. An MLP's output for a token depends on no other token (Arctic Long Sequence Training, arXiv:2506.13996, section
3.1, has sequence tiling). The backward pass of a tile computes the tile again, so a layer that is computed again in its
backward pass costs nothing more: its own recomputation ends where the MLP's input is there.

The recomputation of a layer (torch.utils.checkpoint) ends with the last tensor that was saved in the layer. A function
of autograd that saves its own inputs has been computed by then. `save_before` saves them in a node before the function,
and the recomputation ends there:

    down_proj saves its input        recomputed: ... gate, up, down
    a node before it saves that      recomputed: ... gate, up
"""

import inspect
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.config.training import MLP_TILE, Train
from trainer.model.documents import recomputed
from trainer.model.held.layers import dequantized_once
from trainer.model.parts import is_layer
from trainer.processes.accelerator import is_accelerator, kind
from trainer.processes.devices import place_bytes, places_in_blocks


class Saved:
    """The saved tensors, for the function that follows the node that has them."""

    node: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.node.saved_tensors


def save_before(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Saved | None]:
    """Save `tensors`, and return x, which the function then has to take. None if x has no gradient, because such a node
    would save nothing."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    kept = Saved()
    return _Keep.apply(x, kept, *tensors), kept  # type: ignore[return-value]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Saved, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.count = len(tensors)
        kept.node = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *(None,) * (1 + ctx.count)


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
        """Return a free place for a tensor of so many bytes, as bytes."""
        if place_bytes(size) > self._size:
            self._size = place_bytes(size)
            self._free, self._blocks = [], places_in_blocks(self._size, self._count)
        if not self._free:
            places = self._blocks.pop() if self._blocks else 1
            self._free.extend(torch.empty(places, self._size, dtype=torch.uint8, pin_memory=True).unbind())
        return self._free.pop()

    def give_back(self, place: Tensor) -> None:
        if place.nbytes == self._size:
            self._free.append(place)


class _Input:
    """An input of a layer: `there` on the host, and `here` on the device before it has left and after it was called
    back. `copied` marks the end of the last copy between the two. `before` is the input that was saved before it, until
    that one's backward pass."""

    def __init__(self, here: Tensor, there: Tensor, before: "Callable[[], _Input | None]") -> None:
        self.here: Tensor | None = here
        self.there, self.before = there, before
        self.copied = torch.Event(here.device)


class Offload:
    """Activation checkpointing of so many `layers`. Their saved inputs wait on the host."""

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


def mlps(layer: nn.Module) -> Iterator[nn.Module]:
    """Return the outermost modules inside a layer that treat each token by itself. They have several linear layers and
    nothing else that learns, and their forward pass takes only the tokens' values. Modules that mix tokens also take
    masks, positions or a cache."""
    for child in layer.children():
        if _is_mlp(child):
            yield child
        else:
            yield from mlps(child)


def _is_mlp(module: nn.Module) -> bool:
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    of_linears = {parameter for linear in linears for parameter in linear.parameters()}
    takes_values_alone = len(inspect.signature(module.forward).parameters) == 1
    return len(linears) > 1 and takes_values_alone and of_linears == set(module.parameters())


def tile(module: nn.Module, longest: int) -> None:
    """Make an MLP compute more than `longest` tokens a tile at a time. Its values and the gradient of its input stay
    the same. Gradients of its parameters are summed over the tiles in fp32.
    """
    whole = module.forward

    def forward(x: Tensor) -> Tensor:
        if x.numel() <= longest * x.shape[-1]:
            return whole(x)
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if learning and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # tensors without a gradient would not be saved
        x, kept = save_before(x, x)
        return _Tiled.apply(x, kept, whole, *learning)  # type: ignore[return-value]

    module.forward = forward


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Saved | None, whole: Callable[[Tensor], Tensor], *learning: nn.Parameter
    ) -> Tensor:
        """x (..., T, H) -> (..., T, H)."""
        ctx.kept, ctx.whole, ctx.learning = kept, whole, learning
        ctx.random = _random_states(x.device)
        with dequantized_once():
            return torch.cat([whole(part) for part in x.flatten(0, -2).split(MLP_TILE)]).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,) = ctx.kept.tensors
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in ctx.learning]
        x_grad = torch.empty_like(grad)
        parts = zip(*(tensor.flatten(0, -2).split(MLP_TILE) for tensor in (x, grad, x_grad)), strict=True)
        with _randomly_as(ctx.random, x.device), torch.enable_grad(), dequantized_once():
            for part, part_grad, destination in parts:
                part = part.detach().requires_grad_()
                # A bottleneck adapter is a module of the MLP that is computed after it.
                wanted = (part, *ctx.learning)
                found, *of_parameters = torch.autograd.grad(ctx.whole(part), wanted, part_grad, allow_unused=True)
                destination.copy_(found)
                for total, one in zip(sums, of_parameters, strict=True):
                    if one is not None:
                        total += one
        learnt = (total.to(parameter.dtype) for total, parameter in zip(sums, ctx.learning, strict=True))
        return x_grad, None, None, *learnt


def _random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators from which dropout draws: the CPU's, and a GPU's."""
    here = [torch.get_device_module(device).get_rng_state(device)] if is_accelerator(device) else []
    return [torch.get_rng_state(), *here]


@contextmanager
def _randomly_as(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, dropout draws what it drew from these states on. Outside, the generators are as before."""
    on_cpu, *on_gpu = states
    with torch.random.fork_rng([device] if on_gpu else [], device_type=device.type if on_gpu else "cuda"):
        torch.set_rng_state(on_cpu)
        for state in on_gpu:
            torch.get_device_module(device).set_rng_state(state, device)
        yield
