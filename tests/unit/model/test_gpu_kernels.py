"""What is proven of the GPU's path on a machine without one: the benchmark says what it would do, and Triton kernels,
ours and Liger's, are right.
"""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.card.carry import BESIDE_TORCH, WITH_TORCH
from tests.forked import run_module, server
from tests.needs import need

ROOT = Path(__file__).parents[3]
TRITON = ROOT / ".servers/triton"
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
    first, *parts = run("benchmarks/gpu.py").splitlines()
    assert first.startswith("There is no GPU on this machine.")
    assert [part.split(",")[0] for part in parts] == [
        f"- {name}" for name in ("kernels", "tiny", "big", "rooflines", "ways", "trace", "life", "longest", "trl")
    ]
    seconds = [int(part.split("at most ")[1].split(" s:")[0]) for part in parts]
    assert sum(seconds) <= 480


def test_a_part_may_take_what_those_before_it_have_left() -> None:
    took = {"kernels": 20.0, "tiny": 80.0}
    asked = f"from benchmarks import gpu; print(gpu.limit('kernels', {{}}), gpu.limit('big', {took}))"
    assert [float(seconds) for seconds in run("-c", asked).split()] == [40, 130]


def test_what_is_carried_to_a_machine_lacks_nothing_that_it_needs() -> None:
    names = {canonicalize_name(name) for name in BESIDE_TORCH} | WITH_TORCH
    needed = (Requirement(line) for name in BESIDE_TORCH for line in metadata.requires(name) or ())
    asked = {canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert asked <= names


_WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "trl", "liger_kernel", "pyarrow", "datasets", "pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
"""Libraries that a machine with a card need not have."""


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_benchmark_of_gpus_runs_from_start_to_end_on_a_cpu_and_keeps_what_it_measured_when_it_is_killed(
    tmp_path: Path,
) -> None:
    """What a part has found is in the file while the part still runs, where no kill takes it away."""
    (tmp_path / "sitecustomize.py").write_text(_WITHOUT)
    environment = {**WITHOUT_GPU, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu.py", "--pretend", "--to", str(tmp_path)]
    with (
        (tmp_path / "output").open("wb") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process,
    ):
        kept = list[dict[str, Any]]()
        try:
            while process.poll() is None:
                if not any(figure["part"] == "tiny" for figure in kept):
                    kept = figures(tmp_path)
                time.sleep(0.2)
        finally:
            process.kill()
    found = figures(tmp_path)
    assert process.returncode == 0, [figure for figure in found if figure.get("right") is False]
    assert {figure["part"] for figure in kept} == {"machine", "kernels", "tiny"}
    assert found[: len(kept)] == kept
    assert len(kept) < len([figure for figure in found if figure["part"] in ("machine", "kernels", "tiny")])
    parts = list(dict.fromkeys(figure["part"] for figure in found))
    assert parts == ["machine", "kernels", "tiny", "big", "rooflines", "ways", "trace", "life", "longest", "trl"]
    assert {figure["found"] for figure in found if figure.get("what") == "TRL"} == {"is not installed"}
    assert (tmp_path / "trace.json.gz").exists()


def figures(folder: Path) -> list[dict[str, Any]]:
    """Those that are kept; of a line that is being written there is no end yet."""
    file = folder / "figures.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


INTERPRETER = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def triton() -> dict[str, str]:
    """The environment in which Triton can be imported: PyTorch's builds for CUDA bring it, or it lies beside."""
    if find_spec("triton") is not None:
        return {}
    need(None if (TRITON / "triton").is_dir() else "Triton is not installed (make triton)")
    return {"PYTHONPATH": f"{ROOT}:{TRITON}"}


def checked(*module: str, environment: dict[str, str], beside: dict[str, str], seconds: float) -> str:
    """What `python -m` says. The process is forked unless the server may have imported Triton, which reads the
    environment once.
    """
    if not beside:
        return run("-m", *module, environment=environment, seconds=seconds)
    server()
    done = run_module(
        [sys.executable, "-m", *module],
        before=f"import sys; sys.path.insert(0, {str(TRITON)!r})",
        cwd=ROOT,
        env=WITHOUT_GPU | environment | beside,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(700)
def test_our_kernels_compute_what_operators_do(triton: dict[str, str]) -> None:
    said = checked("tests.kernels.interpret", "quick", environment=INTERPRETER, beside=triton, seconds=600)
    assert "interpreted" in said


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_our_kernels_compute_what_operators_do_at_any_size_and_place(triton: dict[str, str]) -> None:
    assert "exit" in run("-m", "tests.kernels.interpret", environment=INTERPRETER | triton, seconds=1100)


@pytest.mark.timeout(700)
def test_a_kernel_is_compiled_without_a_gpu_and_spills_nothing(triton: dict[str, str]) -> None:
    said = checked("tests.kernels", "decode nf4, double", environment={}, beside=triton, seconds=600)
    assert "3 kernels, 0 worse" in said


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_machine_code_of_all_kernels_is_that_of_the_table(triton: dict[str, str]) -> None:
    assert ", 0 worse" in run("-m", "tests.kernels", environment=triton, seconds=1400)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed: the extra gpu brings it")
@pytest.mark.parametrize(
    ("check", "environment", "said"),
    [("interpret", INTERPRETER, "interpreted"), ("ranks", INTERPRETER, "sharded"), ("compile", {}, "sm_100")],
)
def test_liger_computes_what_our_models_do(check: str, environment: dict[str, str], said: str) -> None:
    assert said in run("-m", "tests.liger_kernels", check, environment=environment, seconds=500)
