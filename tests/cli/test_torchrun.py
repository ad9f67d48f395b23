"""`capstan train` as the ranks of torchrun: one of them compiles the data, one speaks."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.conftest import ENVIRONMENT
from tests.cli.test_resume import alone
from tests.forked import run_command

TIMEOUT = 300.0


def test_two_ranks_wait_for_the_data_and_print_one_status(config: Path, tmp_path: Path) -> None:
    """With the environment of torchrun's ranks, in forked processes."""
    group = {**alone(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def rank(number: int) -> "subprocess.CompletedProcess[str]":
        environment = {**group, "RANK": str(number), "LOCAL_RANK": str(number)}
        return run_command(["train", str(config), "train.steps=3", "--json"], tmp_path, environment, TIMEOUT)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, (0, 1))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert_one_status(first.stdout + second.stdout)


@pytest.mark.long
def test_so_do_the_ranks_that_torchrun_starts(config: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-m", "launcher.cli", "train", str(config), "train.steps=3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert_one_status(done.stdout)


def assert_one_status(said: str) -> None:
    (status,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert (status["state"], status["step"], status["world_size"]) == ("finished", 3, 2)
