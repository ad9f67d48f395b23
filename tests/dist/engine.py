"""DeepSpeed's private names, looked at from the public side."""

import os
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from tests.dist.assembled import STATES, assemble_run
from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.state.zero.engine import zero_init
from trainer.train.loop import train


def engine_internals(config_text: str, fingerprint: str) -> dict[str, Any]:
    """The internals that trainer/state/zero/engine.py takes from DeepSpeed, compared with DeepSpeed's public
    functions.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    here = assemble_run(parse_config(config_text), fingerprint)
    here.set_masters()
    parted = _watch_frozen(list(here.engine.model.parameters()))
    record = next(train(here.training(), 0, Position()))
    wrong = []
    parts = {part.name: part for part in here.engine.partitions()}
    for name, parameter in here.engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.pop(name)
        public = {"master": safe_get_full_fp32_param(parameter)}
        public |= {key: safe_get_full_optimizer_state(parameter, key) for key in STATES[1:]}
        for key, whole in public.items():
            assert whole is not None
            if not torch.equal(whole.reshape(-1)[part.begin : part.end], part.states[key]):
                wrong.append(f"{name} {key}")
    every: list[Any] = list(here.engine.model.parameters())
    frozen = [p for p in every if not p.requires_grad]
    return {
        "time_limits": _time_limits(),
        "devices": [here.engine._engine.local_rank, *_devices_of_one_gpu_a_rank()],
        "wrong": wrong,
        "left_over": list(parts),
        "intervals": {part.name: [part.begin, part.end, *part.shape] for part in here.engine.partitions()},
        "updates": here.engine.updates,
        "grad_norm": record["grad_norm"],
        "seconds": {name: value for name, value in record.items() if name.endswith("seconds")},
        "compiled": deepspeed.comm.comm.cdb.shm_comm_op is not None,
        "parted": parted,
        "persistent": sum(p.ds_persist for p in every),
        "whole_after_step": [p.ds_shape for p in frozen if p.ds_status.name == "AVAILABLE" and not p.ds_persist],
        "partitioned": sum(not p.ds_persist for p in frozen),
        "held": sum(p.ds_tensor.numel() for p in frozen if not p.ds_persist),
        "numel": sum(p.ds_numel for p in frozen if not p.ds_persist),
    }


def _watch_frozen(parameters: list[Any]) -> list[int]:
    """The numbers of frozen parameters, whole on every rank, that are partitioned from now on."""
    parted = list[int]()
    for parameter in parameters:
        if parameter.ds_persist and not parameter.requires_grad:
            plain = parameter.partition
            parameter.partition = lambda *given, plain=plain, number=parameter.ds_id, **more: (
                parted.append(number) or plain(*given, **more)
            )
    return parted


def _time_limits() -> list[float]:
    """Seconds that a collective may take, of every process group that this process has."""
    groups = list(distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def _devices_of_one_gpu_a_rank() -> list[str]:
    """The device that DeepSpeed's Init takes on a machine that shows each rank its own GPU alone, and LOCAL_RANK behind
    it.
    """
    accelerator: Any = type(get_accelerator())
    plain, accelerator.device_name = accelerator.device_name, lambda self, index=None: f"cuda:{index}"
    try:
        init: Any = zero_init({"train_batch_size": 3}, torch.float32, torch.device("cuda", 0))
    finally:
        accelerator.device_name = plain
    return [str(init.local_device), os.environ["LOCAL_RANK"]]
