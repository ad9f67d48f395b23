"""Something measured, and the clock of a device."""

import time
from collections.abc import Callable
from typing import NamedTuple


class Figure(NamedTuple):
    """Something measured, and what it must be; `right` is None for what is only told."""

    what: str
    found: str
    wanted: str = ""
    right: bool | None = None


def seconds_of(action: Callable[[], object], times: int = 20) -> float:
    """The device's time for `action`, or on a CPU the host's: the mean of `times` calls after one that is not
    counted.
    """
    import torch

    action()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(times):
            action()
        return (time.perf_counter() - began) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        action()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / times


def moved_in(seconds: float, moved: int) -> str:
    """How fast so many bytes were read and written, and of the card's bandwidth by its data sheet the share."""
    import torch

    from trainer.plan.gpus import find_gpu

    rate = moved / seconds
    gpu = find_gpu(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    share = f", {rate / gpu.bandwidth:.0%} of the card's" if gpu and gpu.bandwidth else ""
    return f"{1e3 * seconds:.2f} ms, {rate / 1e12:.2f} TB/s{share}"


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


EIGHT_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256,
}  # fmt: skip
"""The shape of Llama 3.1 8B."""
TINY = {
    **EIGHT_B,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def shape(layers: int, *, pretend: bool) -> dict[str, int]:
    """The large base's, with so many layers."""
    return {**(TINY if pretend else EIGHT_B), "num_hidden_layers": layers}
