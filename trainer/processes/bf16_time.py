"""Measures in a tenth of a second how much longer a product in bf16 takes here than one in fp32.

python -m trainer.processes.bf16_time
"""

import time

import torch
from torch.nn.functional import linear

_ROWS, _INPUTS, _OUTPUTS = 128, 576, 1024  # a layer of a small base
_TRIES = 4


def slowdown() -> float:
    """Return the time of a product in bf16 as a multiple of that in fp32, on the GPU if there is one."""
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Return the time of the fastest of a few products. The first one, which may compile, does not count."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, weight = (torch.randn(count, _INPUTS, device=device, dtype=dtype) for count in (_ROWS, _OUTPUTS))
    tries = list[float]()
    for _ in range(_TRIES):
        began = time.perf_counter()
        float(linear(rows, weight)[0, 0])  # this waits for a GPU
        tries.append(time.perf_counter() - began)
    return min(tries[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(slowdown())
