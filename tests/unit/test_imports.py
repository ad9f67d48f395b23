"""The command line answers before anything heavy is imported."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "deepspeed", "transformers", "peft", "bitsandbytes", "pyarrow", "numpy")


@pytest.mark.parametrize(
    "module",
    [
        "launcher.cli.__main__",
        "launcher.doctor.doctor",
        "trainer.plan.plan",
        "trainer.zero.policy",
        "trainer.checkpoint.identity",
        "launcher.plan.opening",
    ],
)
def test_importing_leaves_heavy_libraries_out(module: str):
    code = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
