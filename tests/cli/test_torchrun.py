"""`capstan train` as the ranks of torchrun: one of them compiles the data, one speaks."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import ENVIRONMENT
from tests.cli.test_resume import alone
from tests.forked import run_command
from trainer.processes.guard import started_with

TIMEOUT = 300.0


def test_two_ranks_wait_for_the_data_and_print_one_status(config: Path, tmp_path: Path) -> None:
    """With the environment of torchrun's ranks, in forked processes."""
    group = {**alone(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def rank(number: int) -> "subprocess.CompletedProcess[str]":
        environment = {**group, "RANK": str(number), "LOCAL_RANK": str(number)}
        return run_command(["train", str(config), "train.steps=3", "--json"], tmp_path, environment, TIMEOUT)

    # Rank 0 decides what is left out, and the others read their own file.
    config.write_text(config.read_text().replace("  dtype: bf16\n", ""))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, (0, 1))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert_one_status(first.stdout + second.stdout)


@pytest.mark.long
def test_so_do_the_ranks_that_torchrun_starts_and_nothing_listens_where_others_reach_it(
    config: Path, tmp_path: Path
) -> None:
    """By the options of docs/networking.md, without which the agent listens at every address."""
    alone = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *alone, "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-m", "launcher.cli", "train", str(config), "train.steps=3", "--json"]
    mark = f"CAPSTAN_TEST_{os.getpid()}"
    environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", mark: "1"}
    at = set[str]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as running:
        reader = ThreadPoolExecutor(1).submit(running.communicate, timeout=TIMEOUT)
        while not reader.done():
            at |= {address for process in started_with(f"{mark}=1".encode()) for address in listening(process)}
            time.sleep(0.2)
        said, _ = reader.result()
    assert running.returncode == 0
    assert_one_status(said)
    assert at == {"127.0.0.1"}


def listening(process: int) -> set[str]:
    """The addresses at which a process listens."""
    with suppress(psutil.Error):
        connections = psutil.Process(process).net_connections("inet")
        return {one.laddr.ip.removeprefix("::ffff:") for one in connections if one.status == psutil.CONN_LISTEN}
    return set()


def assert_one_status(said: str) -> None:
    (status,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert (status["state"], status["step"], status["world_size"]) == ("finished", 3, 2)
