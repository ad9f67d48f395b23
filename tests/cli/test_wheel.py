"""The wheel, installed alone: all of the code is in it, with the files beside it, and nothing comes from the
checkout.
"""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.cli.conftest import ENVIRONMENT, ROOT, Installed

pytestmark = pytest.mark.long

PACKAGED = (
    "trainer/**/*.py",
    "launcher/**/*.py",
    "ds_configs/*.json",
    "slurm/*.sh",
    "slurm/*.md",
    "trainer/**/*.yaml",
    "trainer/**/*.jinja",
)
# Kernels in Triton, which PyTorch's builds for CUDA bring, are modules of their own. They alone may need it.
IMPORT_ALL = """
import importlib, pkgutil, launcher, trainer
for package in (launcher, trainer):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            try:
                print(importlib.import_module(module.name).__file__)
            except ModuleNotFoundError as error:
                if error.name != "triton" or not module.name.startswith("trainer.model.kernels."):
                    raise
"""
READ_FILES = """
from trainer.state.zero.policy import policy_names
from launcher.cluster.slurm.submit import _BODY
print(*policy_names(), _BODY.read_text().splitlines()[0])
"""


def run(*command: object, folder: Path, timeout: float = 200) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, cwd=folder, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_of_the_checkout_is_in_the_wheel(installed: Installed) -> None:
    there = {path.relative_to(ROOT).as_posix() for pattern in PACKAGED for path in ROOT.glob(pattern)}
    assert len(there) > 100
    assert there - set(zipfile.ZipFile(installed.wheel).namelist()) == set()


def test_the_command_answers(installed: Installed, tmp_path: Path) -> None:
    assert "Usage: capstan" in run(installed.capstan, "--help", folder=tmp_path)


def test_every_module_is_imported_from_the_wheel(installed: Installed, tmp_path: Path) -> None:
    files = run(installed.python, "-c", IMPORT_ALL, folder=tmp_path).split()
    assert len(files) > 100
    assert [file for file in files if not Path(file).is_relative_to(installed.folder)] == []


def test_the_policies_and_the_batch_files_body_are_found(installed: Installed, tmp_path: Path) -> None:
    policies = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
    first = (ROOT / "slurm/run.sh").read_text(encoding="utf-8").splitlines()[0]
    assert run(installed.python, "-c", READ_FILES, folder=tmp_path) == f"{' '.join(policies)} {first}\n"
