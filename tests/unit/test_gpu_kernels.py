"""What is proven of the GPU's path on a machine without one: the benchmark says what it would do, and Triton kernels, ours and Liger's, are right."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def run(*command: str, environment: dict[str, str] | None = None, seconds: float = 100) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=WITHOUT_GPU | (environment or {}),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_benchmark_of_gpus_says_without_one_what_it_would_do() -> None:
    first, *parts = run("benchmarks/gpu.py", "--only", "kernels", "smoke").splitlines()
    assert first.startswith("There is no GPU on this machine.")
    assert [part.split(",")[0] for part in parts] == ["- kernels", "- smoke"]


def test_its_parts_end_within_ten_minutes() -> None:
    parts = run("benchmarks/gpu.py").splitlines()[1:]
    seconds = [int(part.split("at most ")[1].split(" s:")[0]) for part in parts]
    assert len(seconds) == 4
    assert sum(seconds) <= 600


def test_a_part_may_take_what_those_before_it_have_left() -> None:
    took = {"kernels": 20.0, "profile": 110.0, "training": 250.0}
    asked = f"from benchmarks import gpu; print(gpu.limit('training', {{}}), gpu.limit('smoke', {took}))"
    assert [float(seconds) for seconds in run("-c", asked).split()] == [270, 220]  # 600 in all


INTERPRETER = {"TRITON_INTERPRET": "1"}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed; PyTorch's builds for CUDA bring it")
@pytest.mark.parametrize(
    ("check", "environment", "said"), [("interpret", INTERPRETER, "interpreted"), ("compile", {}, "sm_100")]
)
def test_a_double_quantized_weight_in_one_pass_is_bitsandbytes_own(
    check: str, environment: dict[str, str], said: str
) -> None:
    assert said in run("-m", "tests.triton_kernels", check, environment=environment)


@pytest.mark.skipif(
    find_spec("liger_kernel") is None, reason="liger-kernel is not installed: the extra liger brings it"
)
@pytest.mark.parametrize(
    ("check", "environment", "said"),
    [("interpret", INTERPRETER, "interpreted"), ("ranks", INTERPRETER, "sharded"), ("compile", {}, "sm_100")],
)
def test_liger_computes_what_our_models_do(check: str, environment: dict[str, str], said: str) -> None:
    assert said in run("-m", "tests.liger_kernels", check, environment=environment, seconds=500)
