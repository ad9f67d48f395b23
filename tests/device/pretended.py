"""A rank on the pretended device of pretended.cpp, as PyTorch, DeepSpeed and torch.distributed see it."""

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import backend_registration

NAME = "pretended"
_OPERATIONS = torch.library.Library("aten", "IMPL")
_SOURCE = Path(__file__).with_name("pretended.cpp")

told: list[str] = []
"""The devices that process groups were told of as this rank's."""
waits: list[str] = []
"""Where the host has waited for what the device had not come to, one after the other: the innermost place in our code
or DeepSpeed's.
"""


def build(folder: Path) -> Path:
    """The device's library in `folder`, compiled by this machine's C++ compiler against the torch that is installed,
    unless it is there.
    """
    torch_folder = Path(torch.__file__).parent
    digest = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"{NAME}-{digest}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    include, unfinished = torch_folder / "include", library.with_suffix(f".{os.getpid()}")
    command = ["c++", "-O0", "-std=c++20", "-shared", "-fPIC", "-w", "-DUSE_C10D", "-DUSE_C10D_GLOO"]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", str(_SOURCE), "-o", str(unfinished)]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return unfinished.rename(library)


class _Module:
    """`torch.pretended`, as far as torch asks for it."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(_device: Any) -> None:
        pass

    @staticmethod
    def device(_device: Any) -> Any:
        return contextlib.nullcontext()

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(_seed: int) -> None:
        """Random numbers are the host's."""

    @staticmethod
    def get_rng_state(_device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def is_bf16_supported() -> bool:
        return True


def install(library: Path) -> None:
    """Give this process the device, before DeepSpeed is imported and ranks join."""
    torch.ops.load_library(str(library))
    ctypes.CDLL(str(library)).pretended_tell_of_waits(_note_wait)
    backend_registration.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module())
    backend_registration.generate_methods_for_privateuse1_backend()
    dist.Backend.default_device_backend_map[NAME] = "gloo"
    dist.Backend.backend_capability["gloo"].append(NAME)
    dist.init_process_group = _without_device(dist.init_process_group)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.accelerator

    deepspeed.accelerator.set_accelerator(_accelerator())


def peak() -> int:
    """The most bytes of the device that were taken at one time since the last call."""
    return torch.ops.pretended.peak()[0]


def peak_from_here() -> int:
    """Let the peak start again from the bytes that are taken now."""
    peak()
    return peak()


def take_memory_as_cards_do() -> None:
    """Have attention keep no matrix of scores, and SiLU's gradient come out of one operation, as on CPUs and cards: for
    a kind of device that it does not know, PyTorch takes formulas of several operations."""

    def attend(*states: Any, is_causal: bool = False, scale: float | None = None, **_: Any) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states, is_causal=is_causal, scale=scale)[0]

    def silu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=torch.empty_like(x))

    torch.nn.functional.scaled_dot_product_attention = attend
    _OPERATIONS.impl("silu_backward", silu_backward, "PrivateUse1")


def _without_device(plain: Any) -> Any:
    """gloo, which is behind the device, knows no device, and makes no groups of a group that does."""

    def init(*arguments: Any, device_id: Any = None, **given: Any) -> None:
        told.append(str(device_id))
        plain(*arguments, **given)

    return init


@ctypes.CFUNCTYPE(None)
def _note_wait() -> None:
    frame = sys._getframe()
    while frame := frame.f_back:
        for package in ("trainer", "deepspeed"):
            if f"/{package}/" in (file := frame.f_code.co_filename):
                waits.append(f"{package}/{file.rpartition(f'/{package}/')[2]}: {frame.f_code.co_name}")
                return
    waits.append("elsewhere")


def _accelerator() -> Any:
    """DeepSpeed's view of the device: what it is for CUDA."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    first = torch.accelerator.current_stream()
    plain: Any = CPU_Accelerator  # whose annotations say that it never computes beside the host

    class Accelerator(plain):
        def __init__(self) -> None:
            super().__init__()
            self._name = NAME

        def is_synchronized_device(self) -> bool:
            return False

        def use_host_timers(self) -> bool:
            return False

        def resolves_data_dependency(self) -> bool:
            return False

        def handles_memory_backpressure(self) -> bool:
            return False

        def device_name(self, device_index: Any = None) -> str:
            return NAME if device_index is None else f"{NAME}:0"

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{NAME}:0"

        def device_count(self) -> int:
            return 1

        def synchronize(self, device_index: Any = None) -> None:
            torch.accelerator.synchronize()

        @property
        def Stream(self) -> Any:
            return lambda *_: torch.Stream(torch.device(NAME, 0))

        @property
        def Event(self) -> Any:
            return lambda **given: torch.Event(NAME, **given)

        def stream(self, stream: Any) -> Any:
            return contextlib.nullcontext() if stream is None else stream

        def current_stream(self, device_index: Any = None) -> Any:
            return torch.accelerator.current_stream()

        def default_stream(self, device_index: Any = None) -> Any:
            return first

        def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
            return tensor.pin_memory()

        def is_pinned(self, tensor: torch.Tensor) -> bool:
            return tensor.is_pinned()

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == NAME

        def is_available(self) -> bool:
            return True

    return Accelerator()
