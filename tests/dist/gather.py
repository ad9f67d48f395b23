"""ZeRO-3's gathers, watched: in which order they begin, how many there are, and what they wait for where a device
computes while the host goes on."""

import contextlib
import gc
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import deepspeed.runtime.zero.partition_parameters as deepspeed_parameters
import torch
from deepspeed.accelerator import get_accelerator

from tests.dist import traffic
from tests.dist.assembled import Assembled, assemble_run
from trainer.config import parse_config
from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
from trainer.processes.ranks import join
from trainer.state.zero import gather

TOKENS = 16


class GpuLike:
    """DeepSpeed's accelerator made like one of CUDA: streams and events, of which it counts what the host waits for."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.behind = 0  # units whose computation the host has asked for, and has not seen the end of
        self.furthest = 0  # the most of them at the beginning of a gather
        device = self

        class Stream:
            def __init__(self, name: str = "side") -> None:
                self.name = name

            def synchronize(self) -> None:
                device.waits[self.name] += 1

            def wait_stream(self, _other: Any) -> None:
                """The device waits, not the host."""

        class Event:
            def __init__(self) -> None:
                self.of_unit = sys._getframe(1).f_code.co_filename == gather.__file__

            def record(self, *_stream: Any) -> None:
                device.behind += self.of_unit

            def query(self) -> bool:
                return False

            def synchronize(self) -> None:
                device.behind -= self.of_unit
                device.waits["event"] += 1

        default = Stream("default")
        current = [default]

        @contextlib.contextmanager
        def stream(which: Any) -> Iterator[None]:
            current.append(which)
            yield
            current.pop()

        kind: Any = type(get_accelerator())
        for name in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
            setattr(kind, name, lambda self: False)
        kind.Stream, kind.Event = property(lambda self: Stream), property(lambda self: Event)
        kind.stream = lambda self, which: stream(which)
        kind.current_stream = lambda self, number=None: current[-1]
        kind.default_stream = lambda self, number=None: default
        kind.synchronize = lambda self, number=None: device.waits.update(["device"])
        torch.Tensor.record_stream = lambda self, which: None  # type: ignore[method-assign]

        plain = deepspeed_parameters._no_gather_coalesced

        def begin(parameters: Any) -> Any:
            device.furthest = max(device.furthest, device.behind)
            return plain(parameters)

        deepspeed_parameters._no_gather_coalesced = begin


def _pass(here: Assembled) -> None:
    """A micro-batch, forward and backward."""
    ids = torch.arange(3, 3 + TOKENS, dtype=torch.int32)[None]
    row = MicroBatch(ModelInput.of(ids, ids - 3, Segments.of_documents([TOKENS])), ids, TOKENS, TOKENS)
    here.engine.backward(here.engine.loss(row) / TOKENS, last=True)


def host_waits(config_text: str, throttled: bool = True, bounded: bool = True) -> dict[str, Any]:
    """What the host waits for in the third micro-batch of one rank, how far gathers were ahead, the most bytes that
    they took, and those that they may take."""
    if not throttled:
        gather._AHEAD = 10**6
    device, found = GpuLike(), {}
    here = assemble_run(parse_config(config_text))
    inside: Any = here.engine._gathers
    room, most, wait = inside._room, 0, inside._wait

    def watched(unit: Any) -> None:
        nonlocal most
        most = max(most, inside._taken() + inside._copied(unit))
        wait(unit)

    inside._wait = watched
    if not bounded:
        inside._room = math.inf
    for _ in range(3):
        device.waits.clear()
        device.behind = device.furthest = most = 0
        _pass(here)
        found = {**device.waits, "furthest": device.furthest, "most": most, "room": room}
        inside._computed.clear()
        here.engine.step(1e-4)
    return found


def starts(config_text: str, seeds: list[int]) -> dict[str, Any]:
    """For each seed the collectives of two steps in the order in which this rank begins them, where a set's order is
    another on every rank and with every seed; and such an order."""
    found: dict[str, Any] = {"orders": [], "set": []}
    log: list[tuple[int, str, int]] = []
    traffic._watch_collectives(
        lambda group, name, tensors: log.append((group.size(), name, sum(tensor.nbytes for tensor in tensors)))
    )
    for seed in seeds:
        rank = join().rank
        torch.Tensor.__hash__ = lambda self, salt=(seed, rank): hash((*salt, id(self)))  # type: ignore[method-assign]
        here = assemble_run(parse_config(config_text))
        parameters: list[Any] = list(here.engine.model.parameters())
        found["set"].append([parameter.ds_id - parameters[0].ds_id for parameter in set(parameters)])
        log.clear()
        for _ in range(2):
            _pass(here)
            here.engine.step(1e-4)
        found["orders"].append(list(log))
    return found


def gathers(config_text: str, alone: int = gather._ALONE, unused: bool = False, ends: bool = True) -> dict[str, Any]:
    """Of the third micro-batch: the all-gathers by dtype, the most parameters that were whole at one time, in layers,
    and whether the head's gather began before the last layer had been computed.

    Parameters from `alone` bytes on are gathered alone. With `unused`, layers have an input that wants a gradient and
    gets none. Unless it `ends`, no backward pass through a layer is noticed to be over.
    """
    gather._ALONE = alone
    if not ends:
        gather.register_multi_grad_hook = lambda tensors, call: None  # type: ignore[assignment]
    here = assemble_run(parse_config(config_text))
    inside: Any = here.engine._gathers
    layers: Any = here.engine.model.get_submodule("model.layers")
    largest, most, fetch, order = max(unit.numel for unit in inside._units), 0, inside._fetch, list[str]()

    def watched(unit: Any) -> None:
        nonlocal most
        fetch(unit)
        most = max(most, inside._live)
        if unit is inside._units[-1]:
            order.append("head")

    inside._fetch = watched
    layers[-1].register_forward_hook(lambda *_: order.append("last layer"))
    for layer in layers if unused else ():
        idle = {"idle": torch.ones(1, requires_grad=True)}
        layer.register_forward_pre_hook(lambda _, args, given, idle=idle: (args, given | idle), with_kwargs=True)
    counts: Counter[str] = Counter()
    for _ in range(2):
        _pass(here)
        here.engine.step(1e-4)
    traffic._watch_collectives(lambda group, name, tensors: counts.update([f"{name} {tensors[0].dtype}"]))
    most = 0
    order.clear()
    _pass(here)
    left = [p.ds_id for p in here.engine.model.parameters() if p.ds_status.name != "NOT_AVAILABLE" and not p.ds_persist]  # type: ignore[attr-defined]
    gc.collect()
    calls = sum(isinstance(found, gather._Call) for found in gc.get_objects())
    here.engine._engine.destroy()  # of DeepSpeed, which has no hooks to remove
    allocator = torch._C._accelerator_getAllocatorSettings()
    alone_in_layer = [gather._is_alone(parameter) for parameter in inside._units[-2].parameters]
    groups = sum(alone_in_layer) + (not all(alone_in_layer))
    found = {"counts": counts, "most": most / largest, "left": left, "groups": groups, "first": order[0]}
    return {**found, "allocator": allocator, "calls": calls}
