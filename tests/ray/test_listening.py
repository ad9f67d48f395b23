"""A Ray that is started for one machine's ranks listens where no other machine reaches it."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from launcher.cluster.ray.cluster import local_ray
from trainer.processes.guard import started_with


def listening() -> set[str]:
    """The addresses at which a local Ray's processes listen."""
    with local_ray(1):
        mark = f"CAPSTAN_FAMILY={os.environ['CAPSTAN_FAMILY']}".encode()
        found = {
            connection.laddr.ip
            for process in {os.getpid(), *started_with(mark)}
            for connection in psutil.Process(process).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    return {address.removeprefix("::ffff:") for address in found}


@pytest.mark.long
def test_a_local_ray_listens_on_loopback_alone() -> None:
    # In a process of its own: one that has had a local Ray keeps its token, and then no cluster of the other tests
    # takes theirs.
    program = "import json; from tests.ray.test_listening import listening; print(json.dumps(sorted(listening())))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ["127.0.0.1"]
