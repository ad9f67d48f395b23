"""How much memory a load, a step and a merge take."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist.assembled import assemble_run
from trainer.base.load import load_model
from trainer.base.locate import resolve_base
from trainer.config import parse_config
from trainer.data.stream import MicroBatch
from trainer.export.merged import export_merged
from trainer.model import nf4
from trainer.model.attention import Attention
from trainer.model.nf4 import FrozenLinear4bit
from trainer.ranks import join
from trainer.store import open_store
from trainer.zero.engine import Engine
from trainer.zero.policy import build_deepspeed_config


def load_memory(config_text: str) -> dict[str, Any]:
    """How far this process's resident memory rises above what it was before the load, in bytes."""
    config, ranks = parse_config(config_text), join()
    torch.set_num_threads(1)
    base = resolve_base(config.model)
    settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
    before = _peak_from_here()
    _, report = load_model(base, config, settings, ranks, Attention("sdpa", ""), "world")
    return {"grown_bytes": _memory("VmHWM") - before, "kept_bytes": report.kept_bytes, "read_bytes": report.read_bytes}


def step_memory(config_text: str) -> dict[str, int]:
    """Bytes by which a step raises this process's resident memory: as it is, and with every gathered weight kept to its end.

    -> {"released", "kept", "packed": bytes of the packed weights, whole}
    """
    here = assemble_run(parse_config(config_text))
    _step_growth(here.engine)  # the first step finds out in which order parameters are used
    released, plain = _step_growth(here.engine), nf4.FrozenLinear4bit.dequantize
    held: list[Tensor] = []

    def keeping(self: FrozenLinear4bit, index: int = 0) -> Tensor:
        held.append(self.weight.data)
        return plain(self, index)

    nf4.FrozenLinear4bit.dequantize = keeping
    kept = _step_growth(here.engine)
    packed: list[Any] = [p for p in here.engine.model.parameters() if p.dtype == torch.uint8]
    return {"released": released, "kept": kept, "packed": sum(parameter.ds_numel for parameter in packed)}


def _step_growth(engine: Engine) -> int:
    tokens, borders = torch.arange(16)[None], torch.tensor([0, 16], dtype=torch.int32)
    batch = MicroBatch(tokens, tokens, tokens, borders, 16, 16, 16, (), ())
    before = _peak_from_here()
    engine.backward(engine.loss(batch), last=True)
    engine.step(1e-4)
    return _memory("VmHWM") - before


def _peak_from_here() -> int:
    """Let the peak start again from the memory that is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(what: str) -> int:
    """Bytes, as /proc/self/status has them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def merge_memory(run_uri: str, merged: str) -> int:
    """How far this process's resident memory rises above what it was before the merge, in bytes."""
    torch.set_num_threads(1)
    before = _peak_from_here()
    export_merged(open_store(run_uri), open_store(merged))
    return _memory("VmHWM") - before
