"""ZeRO-3's gathers: a decoder layer at a time, the next one while this one computes, in one order on every rank.

    compute   | layer 3 | layer 4 | layer 5 |   A gather begins when the host comes to the layer before, and not before
    gathers   | layer 4 | layer 5 | layer 6 |   the device has left the layer two before that: two ahead of it at most.
                                               Nor before there is room: no more is whole than three layers, or
                                               the head and a layer.

DeepSpeed gathers for each module by itself, which is some 140 of a layer with adapters, and a set of parameters decides
what it starts first, so that the order differs from rank to rank: where there are two process groups, NCCL may then
wait for ever. Here it gets no hooks, and only its parameters are used, with their partitions and the handles of their
gathers.

Gradients stay as DeepSpeed has them: each parameter's is reduced as soon as it is whole. Private names of DeepSpeed
0.19 are touched all over this file; tests/dist/test_gather.py fails when upstream changes them.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from trainer.model.parts import is_computed_at_once, is_layer
from trainer.state.zero.clock import Clock

_AHEAD = 2  # how many layers a gather may be ahead of what the device computes
# From this many bytes on a parameter is gathered by itself, in place. Smaller ones are copied from one buffer.
_ALONE = 2**28


@contextmanager
def without_hooks() -> Iterator[None]:
    """Inside, DeepSpeed makes an engine without its gathering hooks, of which each module would have four."""

    def no_hooks(self: Any) -> None:
        self.fwd_pre_hook = RemovableHandle(OrderedDict())  # which its `destroy` removes

    plain = DeepSpeedZeRoOffload.setup_zero_stage3_hooks
    DeepSpeedZeRoOffload.setup_zero_stage3_hooks = no_hooks
    try:
        yield
    finally:
        DeepSpeedZeRoOffload.setup_zero_stage3_hooks = plain


class _Unit:
    """Parameters that are gathered and freed together: those of a decoder layer, or of a module outside of all
    layers.
    """

    def __init__(self, parameters: list[Any]) -> None:
        self.parameters, self.holders = parameters, 0
        self.numel = sum(parameter.ds_numel for parameter in parameters)
        self.size = sum(map(_size, parameters))


class _Call:
    """One forward pass through a unit, whose backward pass is still to come. It ends with the gradients of its
    inputs.
    """

    def __init__(self, unit: _Unit, *, held: bool) -> None:
        self.unit, self.held, self.begun = unit, held, False
        self.hook: RemovableHandle | None = None


class Gathers:
    """Gathers the parameters of `model` for each pass through it, and frees them afterwards. Every method is
    collective. The engine was made `without_hooks`. Sizes are in bytes.

    `zero` is DeepSpeed's optimizer of stage 3. These keys of its `policy` count: `overlap_comm`;
    `stage3_prefetch_bucket_size`, where 0 means that no layer is gathered before it is needed;
    `stage3_max_live_parameters`, beyond which none is either; and `stage3_max_reuse_distance`: where a layer's backward
    pass is no more parameters away than that, it is kept until then. Where the policy leaves it out, the last one is
    kept. The `clock` is told of each wait for a gather.
    """

    def __init__(self, model: nn.Module, zero: Any, policy: dict[str, Any], clock: Clock) -> None:
        self._device: Any = get_accelerator()
        self._clock = clock
        self._stream: Any = None
        if not self._device.is_synchronized_device():
            self._stream = self._device.Stream() if policy.get("overlap_comm", True) else self._device.default_stream()
        parameters: list[Any] = list(model.parameters())
        self._whole = [parameter for parameter in parameters if parameter.ds_persist]
        zero.persistent_parameters = []  # DeepSpeed would gather them one by one after each update.
        zero._partition_all_parameters = self._part_what_learns
        for module in model.modules():
            if any(True for _ in module.parameters()) and not isinstance(module, nn.Linear | nn.Embedding):
                module.register_forward_pre_hook(_summed_apart)
        watched = [(module, unit) for module, own in _together(model) if (unit := self._watch(module, own))]
        self._units = [unit for _, unit in watched]
        self._prefetches = policy.get("stage3_prefetch_bucket_size", 1) > 0
        self._most = policy.get("stage3_max_live_parameters", math.inf)
        self._reuse = policy.get("stage3_max_reuse_distance", 2 * self._units[-1].numel + 1 if self._units else 0)
        layer = max((unit.size for module, unit in watched if is_layer(module)), default=0)
        kept = policy.get("stage3_max_reuse_distance", 0) // 2 * max((p.dtype.itemsize for p in parameters), default=0)
        self._room = kept + max((_AHEAD + 1) * layer, *(a.size + b.size for a, b in pairwise(self._units)), 0)
        self._live = 0  # elements that are gathered or in flight
        self._live_bytes = 0  # the same in bytes
        self._ahead: set[_Unit] = set()  # gathered units that no call holds
        self._handles: dict[Any, Any] = {}  # handles of parameters in flight
        # an event and the size of each freed unit that may still be in use
        self._computed: deque[tuple[Any, int]] = deque()
        self._traces: dict[Hashable, list[_Unit]] = {}  # the units that a pass used, in order
        self._before: list[_Unit] = []
        self._now: list[_Unit] = []
        # Groups of parameters that are looked at in turns: those of each unit, and those that stay whole.
        self._whole_turns = list(_groups(self._whole))
        self._turns = [*(unit.parameters for unit in self._units), *self._whole_turns]
        self._turn: list[Any] | None = None
        self._look: Callable[[Sequence[Any]], object] = len  # until something is to be looked at
        self._calls: list[_Call] = []  # the pass's calls, whose backward passes come in the opposite order
        self._open: list[_Call] = []
        self.gather_whole()

    @property
    def turns(self) -> int:
        """How many passes it takes to look at all parameters."""
        return len(self._turns)

    def look_at(self, turn: int, look: Callable[[Sequence[Any]], object]) -> None:
        """Show `look` the parameters of this turn in the next pass, as soon as they are gathered for it."""
        self._turn, self._look = self._turns[turn], look

    def gather_again(self) -> None:
        """Gather the parameters that stay whole anew from their partitions."""
        for parameter in self._whole:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition()
        self.gather_whole()

    def _looked(self, parameters: list[Any]) -> None:
        if parameters is self._turn:
            self._turn = None
            self._look(parameters)

    def gather_whole(self) -> None:
        """Gather the parameters that are small enough to stay whole on every rank. They are not whole after an update,
        after partitions were written, or after somebody has gathered them for a while.
        """
        missing = [parameter for parameter in self._whole if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather_coalesced(missing).wait()

    def _part_what_learns(self) -> None:
        """Partition what learns before an update or a change of partitions. DeepSpeed would partition everything that
        is whole, and frozen parameters would be gathered again although their partitions do not change.
        """
        self.finish()
        for parameter in self._whole:
            if parameter.requires_grad and parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition()

    def begin(self, kind: Hashable) -> None:
        """Begin a pass. Passes of one kind use units in the same order, so the second one knows what comes next."""
        self.finish()
        self.gather_whole()
        self._before, self._now = self._traces.get(kind, []), []
        self._traces[kind] = self._now
        if self._stream is not None:  # partitions may have been written just now
            self._stream.wait_stream(self._device.current_stream())
        for group in self._whole_turns:
            self._looked(group)

    def finish(self) -> None:
        """End a pass and its backward pass: free what is held by calls without a gradient to pass on, and what was
        never used.
        """
        for call in self._open:
            self._end(call)
        self._calls, self._open = [], []
        for unit in list(self._ahead):
            self._wait(unit)
            self._free(unit)

    def _watch(self, module: nn.Module, parameters: list[Any]) -> _Unit | None:
        unit = _Unit([parameter for parameter in parameters if not parameter.ds_persist])
        if not unit.parameters:
            return None

        def before(_module: nn.Module, _arguments: tuple[Any, ...], _given: dict[str, Any]) -> None:
            self._before_forward(unit)

        def after(_module: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            self._after_forward(unit, [*_tensors(arguments), *_tensors(given)], list(_tensors(output)))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)
        return unit

    def _before_forward(self, unit: _Unit) -> None:
        if _is_recomputed():  # within its backward pass, which holds it
            return
        self._hold(unit)
        self._looked(unit.parameters)
        place = len(self._now)
        self._now.append(unit)
        if self._before[place : place + 1] == [unit] and place + 1 < len(self._before):
            self._prefetch(self._before[place + 1])

    def _after_forward(self, unit: _Unit, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if _is_recomputed():
            return
        outputs = [tensor for tensor in outputs if tensor.requires_grad] if torch.is_grad_enabled() else []
        if not outputs:
            self._let_go(unit)
            return
        inputs = [tensor for tensor in inputs if tensor.requires_grad]
        call = _Call(unit, held=self._is_soon_used_again())
        self._calls.append(call)
        self._open.append(call)
        for tensor in outputs:
            tensor.register_hook(partial(self._before_backward, call))
        if inputs:  # only those count on which the loss depends
            call.hook = register_multi_grad_hook(inputs, lambda _gradients: self._end(call))
        if not call.held:
            self._let_go(unit)

    def _is_soon_used_again(self) -> bool:
        """Whether the backward pass of the ending call is near: the rest of the pass and the way back lie between."""
        place = len(self._now)
        known = self._before[:place] == self._now
        return known and 2 * sum(unit.numel for unit in self._before[place:]) < self._reuse

    def _before_backward(self, call: _Call, _gradient: Tensor) -> None:
        if call.begun:
            return
        call.begun = True
        if not call.held:
            self._hold(call.unit)
            call.held = True
        while self._calls and self._calls.pop() is not call:
            pass
        if self._calls:
            self._prefetch(self._calls[-1].unit)

    def _end(self, call: _Call) -> None:
        # A hook keeps nodes of the graph that keep the hook, a cycle that Python's collector hardly ever finds.
        if call.hook is not None:
            call.hook.remove()
            call.hook = None
        if call.held:
            call.held = False
            self._let_go(call.unit)

    def _hold(self, unit: _Unit) -> None:
        """Keep the unit's parameters whole from now on, until as many calls of `_let_go`."""
        unit.holders += 1
        for parameter in unit.parameters:
            parameter.ds_active_sub_modules.add(unit)
        self._fetch(unit)
        self._let_the_device_come_near(self._copied(unit))
        self._wait(unit)
        self._ahead.discard(unit)

    def _let_the_device_come_near(self, size: int) -> None:
        """Make the host wait until the device has one unit left to compute, or none if there is no room for `size` more
        bytes. The host runs ahead of the device and allocates memory for all that it gathers.
        """
        while self._computed and (len(self._computed) >= _AHEAD or self._taken() + size > self._room):
            self._computed.popleft()[0].synchronize()

    def _taken(self) -> int:
        """Bytes of parameters that are gathered or in flight, and of freed ones that the device may still
        compute with.
        """
        return self._live_bytes + sum(size for _, size in self._computed)

    def _copied(self, unit: _Unit) -> int:
        """Bytes that DeepSpeed will copy from one buffer: parameters that were gathered together."""
        together = [_size(p) for p in unit.parameters if p in self._handles and not _is_alone(p)]
        return sum(together) if len(together) > 1 else 0

    def _let_go(self, unit: _Unit) -> None:
        unit.holders -= 1
        if unit.holders:
            return
        for parameter in unit.parameters:
            parameter.ds_active_sub_modules.discard(unit)
        freed = self._free(unit)
        if self._stream is not None:
            event = self._device.Event()
            event.record()
            self._computed.append((event, freed))

    def _prefetch(self, unit: _Unit) -> None:
        has_room = self._live + unit.numel <= self._most and self._live_bytes + unit.size <= self._room
        if self._prefetches and not unit.holders and has_room:
            self._fetch(unit)
            self._ahead.add(unit)

    def _fetch(self, unit: _Unit) -> None:
        missing = [parameter for parameter in unit.parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if not missing:
            return
        size = sum(map(_size, missing))
        self._let_the_device_come_near(size)
        alone = [[parameter] for parameter in missing if _is_alone(parameter)]
        with self._device.stream(self._stream):
            for group in filter(None, [*alone, [parameter for parameter in missing if not _is_alone(parameter)]]):
                self._handles |= dict.fromkeys(group, group[0].all_gather_coalesced(group))
        self._live += sum(parameter.ds_numel for parameter in missing)
        self._live_bytes += size

    def _wait(self, unit: _Unit) -> None:
        """Make the device's current stream wait until the unit's parameters have arrived."""
        with self._clock.within("gather"):
            with self._device.stream(self._stream):
                for parameter in unit.parameters:
                    if (handle := self._handles.pop(parameter, None)) is not None:
                        handle.wait()
            if self._stream is not None:
                self._device.current_stream().wait_stream(self._stream)

    def _free(self, unit: _Unit) -> int:
        """Free the unit's parameters that no other unit shares and needs. Returns their bytes."""
        self._ahead.discard(unit)
        freed = 0
        for parameter in unit.parameters:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_active_sub_modules:
                free_param(parameter)
                self._live -= parameter.ds_numel
                freed += _size(parameter)
        self._live_bytes -= freed
        return freed


def _size(parameter: Any) -> int:
    return parameter.ds_numel * parameter.dtype.itemsize


def _groups(parameters: list[Any]) -> Iterator[list[Any]]:
    """The parameters in groups of about as many bytes as a gather of small ones has."""
    group, size = list[Any](), 0
    for parameter in parameters:
        group.append(parameter)
        size += _size(parameter)
        if size >= _ALONE // 4:
            yield group
            group, size = [], 0
    if group:
        yield group


def _is_alone(parameter: Any) -> bool:
    return _size(parameter) >= _ALONE


def _together(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules for whose calls parameters are gathered, in the order of the model, and those parameters."""
    own = list(module.parameters(recurse=False))
    if is_layer(module) or ((own or is_computed_at_once(module)) and not any(map(is_layer, module.modules()))):
        yield module, list(module.parameters())
        return
    if own:
        yield module, own
    for child in module.children():
        yield from _together(child)


def _summed_apart(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, whose gradients are summed over their uses inside a module before those outside of it are added.

    The order decides a sum's last bits. DeepSpeed's hooks made it this one, and so results stay those of earlier
    versions.
    """
    return tuple(
        value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value for value in arguments
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _is_recomputed() -> bool:
    """Whether a forward pass runs inside a backward pass, by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1
