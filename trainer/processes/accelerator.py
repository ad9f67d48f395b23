"""The device that computes beside the host, while the host goes on: a GPU, or another one that PyTorch has been told
of.

Whoever has to know whether there is one asks here, so that its kind is a value: tests/device runs the whole training on
a device that PyTorch's extension point makes.
"""

import torch
from torch import Tensor


def kind() -> str | None:
    """The type of this machine's accelerator, such as `cuda`; None without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


def is_accelerator(device: torch.device) -> bool:
    """Whether `device` computes beside the host, so that what it was asked for is over at some later time."""
    return device.type not in ("cpu", "meta")


def is_begun() -> bool:
    """Whether this process uses a GPU already, so that one that is forked from it cannot."""
    return torch.cuda.is_initialized()


def own_device(number: int) -> torch.device:
    """The accelerator of the rank with this number on its node, or the CPU.

    srun's --gpus-per-task and --gpu-bind show each rank its own GPUs alone, which it counts from 0 whatever its number
    is.
    """
    here = kind()
    return torch.device(here, number % torch.accelerator.device_count()) if here else torch.device("cpu")


def mark(device: torch.device) -> torch.Event:
    """A moment in the work of an accelerator's current stream: what it is asked for from now on comes later."""
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. The host does not wait for a copy to a GPU, which needs pinned memory for
    that.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if is_accelerator(device) else tensor.to(device)
