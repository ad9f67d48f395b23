"""Five changes as a stranger would make them, in a copy of the packages: each is one new file or folder, and nothing is edited."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "tests/toys"


def run(copy: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, and the additions among their files."""
    copy = tmp_path_factory.mktemp("stranger")
    for package in ("trainer", "launcher"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    there = {path for path in (TOYS / "added").rglob("*.py") if (copy / path.relative_to(TOYS / "added")).exists()}
    assert there == set(), "an addition is a new file"
    shutil.copytree(TOYS / "added", copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def found(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(run(copy, str(TOYS / "stranger.py"), str(tmp_path_factory.mktemp("base"))))


def test_a_method_has_a_setting_of_its_own(found: dict[str, Any]) -> None:
    assert found["method"]["identity"] == {"method": "some_biases", "biases_of": ["k_proj"]}
    assert found["method"]["refused"] == "tuning.biases_of: has no effect with tuning.method: lora. Remove it."
    assert "Did you mean 'biases_of'?" in found["method"]["mistyped"]


def test_an_objective_over_pairs_is_a_formula_with_its_settings(found: dict[str, Any]) -> None:
    assert found["objective"]["identity"] == {"name": "gap", "gap": 3.0}
    assert found["objective"]["loss"] == 0.0  # tokens are exp(3) times as likely, as the setting asks
    assert found["objective"]["refused"] == "objective.gap: has no effect with objective.name: orpo. Remove it."


def test_a_stored_format_is_read_and_listed(found: dict[str, Any]) -> None:
    assert found["stored"]["values"] == [3.0, -4.0]
    assert (
        "Readable are 16 and 32 bits, 4 bits by bitsandbytes, 8 bits by bitsandbytes, AWQ, compressed-tensors (INT4, INT8, FP8, NVFP4, MXFP4), "
        "FP8 with scales for tiles (with experts in FP4 too), GPTQ in 4 and 8 bits, halves, MXFP4 and NVFP4 and FP8 of Model Optimizer."
        in (found["stored"]["refused"])
    )


def test_a_format_of_rows_is_recognised_and_named(found: dict[str, Any]) -> None:
    assert found["rows"] == {
        "form": "riddle (riddle, solution)",
        "row": {
            "messages": [{"role": "user", "content": "What has hands?"}, {"role": "assistant", "content": "A clock."}]
        },
        "fields": {"solution": "answer"},
    }


def test_the_schema_and_the_page_of_settings_list_what_is_new(found: dict[str, Any]) -> None:
    assert found["listed"] == ["biases_of", "gap", "riddle"]


def test_a_verb_runs_and_is_in_the_help(copy: Path, found: dict[str, Any]) -> None:
    assert run(copy, "-m", "launcher.cli", "greet", "--loud") == "HELLO\n"
    assert found["verbs"][0] == "doctor"
    assert "greet" in found["verbs"]
