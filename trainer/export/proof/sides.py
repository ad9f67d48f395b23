"""The two sides of a proof: where each computes, decided by numbers before it is loaded, and the process of each.

DeepSpeed, PEFT and transformers keep much of a model alive that nobody uses any more, and no garbage collector finds
it. A process that has ended holds nothing, neither on the host nor on its GPU. No torch.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any, Literal, TypeVar

from trainer.base.architecture import Architecture, Parameter
from trainer.config import Quant
from trainer.errors import DoesNotFit
from trainer.plan.inputs import stored_bytes
from trainer.processes.children import OF_A_RANK, end_with_parent
from trainer.processes.devices import local_gpus, stay_on_cpu

T = TypeVar("T")
Device = Literal["gpu", "cpu"]


_READY: ContextVar[dict[Device, list[ProcessPoolExecutor]] | None] = ContextVar("ready", default=None)
"""The processes that wait for a later `aside`; None outside `getting_ready`."""


@contextmanager
def getting_ready() -> Iterator[None]:
    """Inside, `get_ready` may start processes. Those that nobody has used end with this context."""
    ready: dict[Device, list[ProcessPoolExecutor]] = {"gpu": [], "cpu": []}
    before = _READY.set(ready)
    try:
        yield
    finally:
        _READY.reset(before)
        for process in (*ready["gpu"], *ready["cpu"]):
            # Python waits for it at its own end at the latest, and may then wake a thread whose pipe has just closed.
            process.shutdown(cancel_futures=True)


def get_ready(module: str) -> None:
    """Start the process of a later `aside`.

    It imports `module` and what that needs while this process, or another side, works.
    """
    ready = _READY.get()
    if ready is not None:
        device: Device = "gpu" if local_gpus() else "cpu"
        process = _process(device)
        process.submit(_imported, module)
        ready[device].append(process)


def _imported(module: str) -> None:
    import_module(module)


def _process(device: Device) -> ProcessPoolExecutor:
    # The process is not forked: CUDA cannot be used in a child of a process that has used it.
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_alone, initargs=(device,))


def aside(device: Device, work: Callable[..., T], *arguments: Any) -> T:
    """Run `work(*arguments)` on the GPU if this machine has one, or on the CPU. Arguments and result travel as pickles.

    Raises:
        DoesNotFit: memory ran out. On the host Linux then kills the process.
        Exception: whatever `work` raises.
    """
    ready = _READY.get()
    with ready[device].pop(0) if ready and ready[device] else _process(device) as pool:
        try:
            return pickle.loads(pool.submit(_pickled, work, arguments).result())
        except BrokenProcessPool as error:
            raise _no_memory("the process of one side was killed, as Linux does when memory runs out") from error


def _no_memory(what: str) -> DoesNotFit:
    return DoesNotFit(f"--verify: {what}. Verify on a machine with more of it, or export without --verify.")


def _alone(device: Device) -> None:
    """Set up a group of one, whatever group this process was started in, with products in full fp32.

    There is no GPU if the CPU is meant.
    """
    end_with_parent()
    for name in OF_A_RANK:
        os.environ.pop(name, None)
    # NVIDIA's images of PyTorch allow fp32 products to be rounded to TF32, which differs more than a proof allows.
    os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    if device == "cpu":
        stay_on_cpu()


def _pickled(work: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """Pickle here: multiprocessing itself shares tensors in memory that ends with the process that made it."""
    import torch

    try:
        return pickle.dumps(work(*arguments))
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _no_memory("one side ran out of memory") from error


# This much comes on top of the weights: activations of a row, logits, and what libraries hold.
_MARGIN = 1.25


@dataclass(frozen=True)
class FreeMemory:
    """The free bytes of this machine: of one GPU (0 without one), and of the host."""

    gpu: int
    host: int


@dataclass(frozen=True)
class ProofPlace:
    """A device that a side may compute on, and the bytes that it then takes of the GPU and of the host.

    The side is there as a whole, or `streamed`, one decoder layer at a time.
    """

    device: Device
    gpu: int
    host: int
    streamed: bool = False

    def fits(self, room: FreeMemory) -> bool:
        return self.gpu <= room.gpu and self.host <= room.host


@dataclass(frozen=True)
class ProofSide:
    """A side by its name, and the places for it, the fastest first.

    `refused` says in a clause why no place is streamed.
    """

    name: str
    places: tuple[ProofPlace, ...]
    refused: str = ""

    def fits(self, room: FreeMemory) -> bool:
        return any(place.fits(room) for place in self.places)

    def place(self, room: FreeMemory) -> ProofPlace:
        """Return the first place with enough room, else the last one, which takes the least."""
        return next((place for place in self.places if place.fits(room)), self.places[-1])

    def sentence(self, room: FreeMemory) -> str:
        """Say for people where the side computes and why, and whether it fits."""
        place = self.place(room)
        taken = [f"{_gib(place.gpu)} of {_gib(room.gpu)} there"] if place.gpu else []
        taken.append(f"{_gib(place.host)} of {_gib(room.host)} of host memory")
        best = next(other for other in self.places if room.gpu or other.device == "cpu")
        lacking = f"{_gib(best.gpu)} of the GPU" if best.gpu > room.gpu else f"{_gib(best.host)} of the host"
        refused = f" and {self.refused}" if self.refused else ""
        why = "" if place is best else f", as all of it at once would take {lacking}{refused}"
        short = "" if place.fits(room) else ", which is more than this machine has free: Linux may end it"
        how = f"on the {place.device.upper()}{', a layer at a time' if place.streamed else ''}{why}"
        return f"the {self.name} side computes {how}; it takes {' and '.join(taken)}{short}"


def trained_side(model: Architecture, quant: Quant, learnt: int, bytes_each: int) -> ProofSide:
    """Return the side of the checkpoint in our own loader, as one rank.

    Weights that are not quantized take `bytes_each`. What learns also takes a master and room for a gradient; `learnt`
    is the number of its elements.
    """
    held = _stored(model.parameters, quant, bytes_each)
    layers = [model.in_layer(number) for number in range(model.layers)]
    layer = max(_stored(parts, quant, bytes_each) for parts in layers)
    # As in trainer/state/zero/gather.py: three layers, or one beside the embedding or the head. One matrix is decoded
    # from 4 bits besides.
    gathered = max(3 * layer, layer + bytes_each * model.largest("embedding", "head"))
    matrix = bytes_each * max(size for part in model.parameters for size in part.matrices)
    whole = _with_margin(held + 8 * learnt)
    turn = _with_margin(gathered + matrix + 8 * learnt)
    streamed = ProofPlace("gpu", turn, _with_margin(held), streamed=True)
    return ProofSide("trained", (ProofPlace("gpu", whole, 0), streamed, ProofPlace("cpu", 0, whole)))


def exported_side(model: Architecture, quant: Quant, bytes_each: int, *, packed: bool, refused: str = "") -> ProofSide:
    """Return the side of the export in transformers: whole, or also a layer at a time unless that is `refused`.

    The base is read in `bytes_each`, and quantized afterwards if it is to be `packed`.
    """
    whole = _with_margin(bytes_each * sum(part.numel for part in model.parameters))
    needed = _with_margin(_stored(model.parameters, quant, bytes_each)) if packed else whole
    on_gpu, on_cpu = ProofPlace("gpu", needed, whole), ProofPlace("cpu", 0, whole)
    if refused:
        return ProofSide("exported", (on_gpu, on_cpu), refused)
    layers = [model.in_layer(number) for number in range(model.layers)]
    layer = max(sum(part.numel for part in parts) for parts in layers)
    outside = bytes_each * sum(part.numel for part in model.parameters if part.layer is None)
    # These are in fp32 beside what the files hold: a layer at its turn, and the head at its own.
    turn = _with_margin(outside + 4 * model.largest("embedding", "head") + (bytes_each + 4) * layer)
    kept = sum(_stored(parts, quant, bytes_each) for parts in layers) if packed else 0
    host = _with_margin(kept + bytes_each * layer)
    streamed = (ProofPlace("gpu", turn, host, streamed=True), ProofPlace("cpu", 0, turn + host, streamed=True))
    return ProofSide("exported", (on_gpu, streamed[0], on_cpu, streamed[1]))


def _stored(parts: Iterable[Parameter], quant: Quant, bytes_each: int) -> int:
    return sum(stored_bytes(part, quant, bytes_each) or bytes_each * part.numel for part in parts)


def _with_margin(size: float) -> int:
    return int(_MARGIN * size)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
