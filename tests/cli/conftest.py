"""The real `capstan` command, as a process with a time-out and an end."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.material import Workshop

Capstan = Callable[..., subprocess.CompletedProcess[str]]

ENVIRONMENT = {
    **os.environ,
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "200",
}


@pytest.fixture
def capstan(tmp_path: Path) -> Capstan:
    """`capstan(*arguments, timeout=...)` in an empty folder; both streams as text."""

    def run(*arguments: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=tmp_path, env=ENVIRONMENT)

    return run


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def config(workshop: Workshop, tmp_path: Path) -> Path:
    """A small valid run whose store is this test's own."""
    tree = workshop.config("mine", f"run.store={tmp_path / 'store'}").model_dump(mode="json")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
