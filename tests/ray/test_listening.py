"""A Ray that is started for one machine's ranks listens where no other machine reaches it."""

import os

import psutil

from launcher.ray.cluster import local_ray
from trainer.processes.guard import family


def test_a_local_ray_listens_on_loopback_alone() -> None:
    with local_ray(1):
        mark = f"CAPSTAN_FAMILY={os.environ['CAPSTAN_FAMILY']}".encode()
        found = {
            connection.laddr.ip
            for process in {os.getpid(), *family(mark)}
            for connection in psutil.Process(process).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert found
    assert {address.removeprefix("::ffff:") for address in found} == {"127.0.0.1"}
