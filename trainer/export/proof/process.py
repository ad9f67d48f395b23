"""One side of a proof, in a process of its own.

DeepSpeed, PEFT and transformers keep much of a model alive that nobody uses any more, and no garbage collector finds
it. A process that has ended holds nothing, neither on the host nor on its GPU.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from multiprocessing import get_context
from typing import Any, Literal, TypeVar

from trainer.errors import DoesNotFit
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
            process.shutdown(wait=False, cancel_futures=True)


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
            raise _no_memory("the process of one side was killed, as Linux does where memory runs out") from error


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
