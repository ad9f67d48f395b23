"""Copies from the host to a device."""

import torch
from torch import Tensor

from trainer.processes.accelerator import is_accelerator


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. The host does not wait for a copy to a GPU, which needs pinned memory for that."""
    return tensor.pin_memory().to(device, non_blocking=True) if is_accelerator(device) else tensor.to(device)
