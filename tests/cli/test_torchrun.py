"""`capstan train` as the ranks of torchrun: one of them compiles the data, one speaks."""

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import ENVIRONMENT


def test_two_ranks_wait_for_the_data_and_print_one_status(config: Path, tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-m", "launcher.cli", "train", str(config), "train.steps=3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (status,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (status["state"], status["step"], status["world_size"]) == ("finished", 3, 2)
