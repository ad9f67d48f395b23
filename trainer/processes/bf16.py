"""Whether the processor or the GPUs of this machine multiply bf16 fast. A process of its own loads torch for that.

oneDNN, which multiplies for PyTorch on a CPU, has kernels for bf16 from AVX-512 on, and on ARM from the extension bf16
on. Below them a product in bf16 takes 4 to 65 times as long as one in fp32. NVIDIA's GPUs have bf16 from compute
capability 8.0 on.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from trainer.processes import children
from trainer.processes.devices import local_gpus, visible_capabilities
from trainer.processes.helper_thread import patiently

_FLAGS = {
    "x86_64": ("flags", {"avx512bw", "avx512vl", "avx512dq"}, "AVX-512"),
    "aarch64": ("Features", {"bf16"}, "ARM's extension bf16"),
}
"""Architecture -> the field of /proc/cpuinfo, the words in it without which bf16 is slow, and a name for these
words."""

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables by which oneDNN and PyTorch use fewer instructions than the processor has."""
_BELOW_AVX512 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "DEFAULT")
_FIRST_CAPABILITY = 8.0
_MEASURING_SECONDS = 60


def why_slow(gpus_per_worker: int | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return why ranks of this machine multiply bf16 slowly, as a clause; None if they do not.

    `gpus_per_worker` is the setting: 0 means the CPU.
    """
    if gpus_per_worker == 0 or not local_gpus(environment):
        return why_processor_is_slow(environment=environment)
    lowest = min(visible_capabilities(environment), default=_FIRST_CAPABILITY)
    if lowest >= _FIRST_CAPABILITY:
        return None
    return f"the GPU here has compute capability {lowest}, and bf16 begins with {_FIRST_CAPABILITY}"


def why_processor_is_slow(
    cpuinfo: str | None = None, machine: str | None = None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Return why this processor multiplies bf16 slowly, as a clause; None if it does not, or if it is unknown."""
    field, needed, name = _FLAGS.get(machine or platform.machine(), ("", set[str](), ""))
    if limit := next((key for key in _LIMITS if environment.get(key, "").upper() in _BELOW_AVX512), None):
        return f"{limit}={environment[limit]} keeps AVX-512 from being used"
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
    line = next((line for line in cpuinfo.splitlines() if line.partition(":")[0].strip() == field), None)
    if not field or line is None or needed <= set(line.partition(":")[2].split()):
        return None
    return f"the processor here lacks {name}"


def measured_slowdown() -> float | None:
    """Return the time of a product in bf16 on this machine, as a multiple of that in fp32; None if it fails."""
    try:
        with patiently("measuring bf16 on this machine"):
            answer = children.run(
                [sys.executable, "-m", "trainer.processes.bf16_time"],
                capture_output=True,
                text=True,
                timeout=_MEASURING_SECONDS,
                check=True,
                env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
            )
        return float(answer.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def slowdown_words() -> str:
    """Return how much slower bf16 is on this machine, measured, in words that follow "takes"."""
    factor = measured_slowdown()
    return "many times as long as in fp32" if factor is None else f"{max(1.0, factor):.0f} times as long as in fp32"
