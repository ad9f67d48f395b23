"""The process group of a run's ranks under Ray Train; imports torch, as Ray Train's own does."""

from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend  # no public name is what TorchConfig starts

from trainer.devices import check_device


class GpuGroup(TorchConfig):
    """A group over NCCL, whose ranks are asked for their GPUs first: a CPU build of torch has no NCCL, and says no more than that."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _GpuBackend


class _GpuBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_check_gpu)
        super().on_start(worker_group, backend_config)


def _check_gpu() -> None:
    from trainer.assemble import torch_gpus

    check_device(1, *torch_gpus())
