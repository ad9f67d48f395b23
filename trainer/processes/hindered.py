"""Finds what slows this process down, as its machine tells: the clock of its GPU, its quota of CPU time, other
programs.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import SubprocessError
from typing import NamedTuple

import torch

from trainer.processes import children

_DRIVER_SECONDS = 10
_CGROUPS = Path("/sys/fs/cgroup")
_OFTEN = 0.1
"""From this share of the time on, what slows the process down is worth a word."""
_SLOW_CLOCK = 0.95
# NVML's bits for why a GPU does not run faster, that are no matter of course.
_CLOCK_REASONS = {0x04: "power cap", 0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power brake"}


class Quota(NamedTuple):
    """The system's counts so far of this process's quota of CPU time: its periods, those in which it was used
    up, and the seconds in which the process had to wait for the next one.
    """

    periods: int = 0
    used_up: int = 0
    seconds: float = 0.0


class _Counters(NamedTuple):
    """The system's counts of this process so far: seconds on the clock, seconds that its threads were ready and
    had no core, and its quota.
    """

    now: float
    without_core: float
    quota: Quota


class CoreWaits:
    """The seconds that the thread which makes this was ready to compute and had no core, because something else used it
    or because its quota was used up. Linux counts them; elsewhere they are 0.
    """

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = None

    def __call__(self) -> float:
        return 0.0 if self._file is None else int(os.pread(self._file, 99, 0).split()[1]) / 1e9

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class Hindrance:
    """Finds what slows this process down from now on. `device` is the one that it computes on."""

    def __init__(self, device: torch.device) -> None:
        self._before = _counters()
        self._of_gpu = ""
        self._asking: threading.Thread | None = None
        if device.type == "cuda" and shutil.which("nvidia-smi") is not None:
            gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._asking = threading.Thread(target=self._ask, args=(gpu,), name="gpu-clock", daemon=True)
            self._asking.start()

    def found(self) -> str:
        """Return the causes found, as clauses; empty if the machine tells nothing. Wait some seconds at most."""
        if self._asking is not None:
            self._asking.join(_DRIVER_SECONDS)
        return "; ".join([*filter(None, [self._of_gpu]), *_since(self._before, _counters())])

    def _ask(self, gpu: str) -> None:
        query = "clocks.sm,clocks.max.sm,temperature.gpu,clocks_throttle_reasons.active"
        command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        with suppress(OSError, SubprocessError, ValueError):
            told = children.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True).stdout
            self._of_gpu = of_clock(told)


def of_clock(told: str) -> str:
    """Return why a GPU runs slower than it could, by nvidia-smi; empty if it does not.

    `told` has its clock and the fastest one in MHz, its temperature in °C, and NVML's bits for why. Raises `ValueError`
    if the GPU does not report them.
    """
    clock, fastest, celsius, bits = (part.strip() for part in told.split(","))
    reasons = dict.fromkeys(name for bit, name in _CLOCK_REASONS.items() if int(bits, 16) & bit)
    if int(clock) >= _SLOW_CLOCK * int(fastest) and not reasons:
        return ""
    because = f", {' and '.join(reasons)}" if reasons else ""
    return f"its GPU runs at {int(clock):,} of {int(fastest):,} MHz ({celsius} °C{because})"


def _since(before: _Counters, now: _Counters) -> Iterator[str]:
    passed = max(now.now - before.now, 1e-9)
    periods, used_up, _ = (b - a for a, b in zip(before.quota, now.quota, strict=True))
    if periods and used_up >= _OFTEN * periods:
        yield f"its CPU quota (cgroup) was used up in {used_up / periods:.0%} of the quota's periods"
    elif now.without_core - before.without_core >= _OFTEN * passed:
        waited = (now.without_core - before.without_core) / passed
        yield f"its threads waited {waited:.2g} s each second for a core that something else used"


def _counters() -> _Counters:
    waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread that has ended
            waited += int(thread.read_text().split()[1])
    return _Counters(time.monotonic(), waited / 1e9, quota())


def quota() -> Quota:
    """The quota of CPU time so far; zeros without one. Any group of processes (cgroup) that this one is in may have
    one.
    """
    found = [
        Quota(
            counts.get("nr_periods", 0),
            counts.get("nr_throttled", 0),
            counts.get("throttled_usec", 0) / 1e6 + counts.get("throttled_time", 0) / 1e9,
        )
        for counts in _cpu_stats()
    ]
    return max(found, key=lambda one: one.seconds, default=Quota())


def _cpu_stats() -> Iterator[dict[str, int]]:
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            place = Path(path)
            for group in (place, *place.parents):
                with suppress(OSError, ValueError):
                    text = (_CGROUPS / controllers / str(group).lstrip("/") / "cpu.stat").read_text()
                    yield {name: int(count) for name, count in map(str.split, text.splitlines())}
