"""What CI, make and a few scripts name by path is there: a file that moves away from a list would be missed by nobody else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def named(text: str) -> set[str]:
    """The paths of files and folders that a script names, from the repository's root: tests/slurm, tests/store/moto.txt"""
    return {found.rstrip(".") for found in re.findall(r"(?<![\w./])((?:tests|benchmarks|docs|examples)/[\w./]+)", text)}


@pytest.mark.parametrize("script", [".ci/run", ".ci/bare", ".ci/wheel", "Makefile", "CONTRIBUTING.md"])
def test_what_a_script_names_is_there(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    assert not [path for path in named(text) if not (ROOT / path).exists()]


def test_a_file_that_has_moved_is_found() -> None:
    assert named("make test ARGS='tests/slurm tests/unit/gone.py'") == {"tests/slurm", "tests/unit/gone.py"}
    assert not (ROOT / "tests/unit/gone.py").exists()
