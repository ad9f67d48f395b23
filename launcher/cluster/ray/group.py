"""The process group of a run's ranks under Ray Train. It tells the ranks where they meet.

They join as ranks of torchrun do.

Ray's own group would be served at every address of its machine, and would say of a CPU build of torch only that it
lacks NCCL. This file imports torch, as Ray Train's own group does.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend  # no public name has either

from trainer.processes.devices import check_device


@dataclass
class RankGroup(TorchConfig):
    """A group that the ranks make themselves. If each rank has a GPU, this is checked first.

    `keepers` is the actor that numbers the ranks by what their machines keep (`launcher.cluster.ray.keepers`).
    """

    keepers: Any = None

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _RankBackend


class _RankBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: RankGroup) -> None:
        if backend_config.backend == "nccl":
            worker_group.execute(_check_gpu)
        keepers = backend_config.keepers
        order = [0] if keepers is None else ray.get(keepers.number.remote(worker_group.execute(_node)))
        address, port = worker_group.execute_single(order.index(0), meeting)
        worker_group.execute(_tell, address, port)
        if keepers is not None:
            ray.get([worker_group.execute_single_async(place, _number, rank) for place, rank in enumerate(order)])


def _node() -> str:
    return ray.get_runtime_context().get_node_id()


def _check_gpu() -> None:
    from trainer.plan.assemble import torch_gpus

    check_device(1, *torch_gpus())


def meeting() -> tuple[str, int]:
    """Return an address of this machine that the others reach, and a port that is free there now."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]


def _tell(address: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    _set_torch_distributed_env_vars()


def _number(rank: int) -> None:
    os.environ["RANK"] = str(rank)  # Ray's own number of this rank may be another one
