"""Whether kernels in Triton can run here. PyTorch's builds for CUDA bring Triton; its builds for CPUs do not."""

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


@cache
def can_launch(device_type: str) -> bool:
    """Return whether a kernel in Triton can be launched on a device of this type.

    This takes a GPU that Triton supports, Triton, and a C compiler with Python's headers. With these Triton compiles
    each kernel's launcher on the machine itself (triton/runtime/build.py).
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    return device_type == "cuda" and find_spec("triton") is not None and compiler is not None and headers


@cache
def lacks_grouped_products(device: torch.device) -> bool:
    """Return whether a kernel can be launched on this GPU, and PyTorch has no fast grouped products in 16 bits for it.

    torch.nn.functional.grouped_mm is one kernel only on compute capability 9 and 10 (pytorch/pytorch#186620).
    """
    if not can_launch(device.type) or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] not in (9, 10)
