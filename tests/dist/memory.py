"""How much memory a load, a step, a whole training and an export take."""

import gc
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist import runs
from tests.dist.assembled import Assembled, assemble_run
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import load_model
from trainer.base.partitions import reading
from trainer.config import parse_config
from trainer.data.order.position import Position
from trainer.export.write import merged
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.model import nf4
from trainer.model.attention import choose_attention
from trainer.model.micro_batch import MicroBatch
from trainer.model.nf4 import FrozenLinear4bit
from trainer.processes.ranks import join
from trainer.state.checkpoint import shard
from trainer.state.zero.engine import Engine
from trainer.state.zero.policy import build_deepspeed_config
from trainer.store import store
from trainer.store.store import open_store


def load_memory(config_text: str) -> dict[str, Any]:
    """How far this process's resident memory rises above what it was before the load, in bytes."""
    config, ranks = parse_config(config_text), join()
    torch.set_num_threads(1)
    base = resolve_base(config.model)
    settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
    attention = choose_attention("auto", ranks.device, torch.bfloat16, base.architecture)
    before = _peak_from_here()
    _, report = load_model(base, config, settings, ranks, attention, "world")
    return {"grown_bytes": _memory("VmHWM") - before, "kept_bytes": report.kept_bytes, "read_bytes": report.read_bytes}


def step_memory(config_text: str) -> dict[str, int]:
    """Bytes by which a step raises this process's resident memory: as it is, and with every gathered weight kept to its end.

    -> {"released", "kept", "packed": bytes of the packed weights, whole}
    """
    here = assemble_run(parse_config(config_text))
    _step_growth(here.engine)  # the first step finds out in which order parameters are used
    # The less of two, as a library may take memory of its own in one of them.
    released, plain = min(_step_growth(here.engine) for _ in range(2)), nf4.FrozenLinear4bit.dequantize
    held: list[Tensor] = []

    def keeping(self: FrozenLinear4bit) -> Tensor:
        held.append(self.weight.data)
        return plain(self)

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


def row_memory(config_text: str, lengths: list[int]) -> list[int]:
    """Bytes by which a forward and backward pass through one document of each length, or this rank's slice of it, raise the resident memory."""
    config = parse_config(config_text)
    reading._GLIBC_DEFAULT_LIMIT = 2**20
    with reading.freed_memory_given_back():
        here, parts, grown = assemble_run(config), config.sharding.sequence_parallel, list[int]()
        for length in (lengths[0], *lengths):  # the first pass finds out in which order parameters are used
            before = _peak_from_here()
            _pass_through(here, length, parts)
            grown.append(_memory("VmHWM") - before)
    return grown[1:]


def longest_row(config_text: str, memory: int, longest: int) -> int:
    """The longest document, of at most `longest` tokens, whose step this process can make with `memory` bytes beyond those that it has before the
    base is loaded: bisected by steps, in 64ths of `longest`."""
    config = parse_config(config_text)
    reading._GLIBC_DEFAULT_LIMIT = 2**20
    with reading.freed_memory_given_back():
        step = longest // 64
        _pass_through(assemble_run(config), step, 1)  # whatever is imported on the way is there then
        gc.collect()
        before, here = _peak_from_here(), assemble_run(config)

        def is_too_long(steps: int) -> bool:
            _peak_from_here()
            _pass_through(here, steps * step, 1)
            return _memory("VmHWM") - before > memory

        return step * bisect_right(range(1, 65), False, key=is_too_long)


def _pass_through(here: Assembled, length: int, parts: int) -> None:
    """A step over one document of so many tokens, or this rank's slice of it."""
    tokens = torch.arange(length, dtype=torch.int32)[None] % 250
    borders = torch.tensor([0, length], dtype=torch.int32)
    positions = torch.arange(length, dtype=torch.int32)[None]
    row = MicroBatch(tokens, tokens, positions, borders, length, length, length, (), ())
    mine = row if parts == 1 else row.cut(here.ranks.rank % parts, parts)
    here.engine.backward(here.engine.loss(mine) / length, last=True)
    here.engine.step(1e-6)


def training_memory(config_text: str, fingerprint: str) -> int:
    """How far this process's resident memory rises above what it was before the load, in bytes, in a load and two steps."""
    join()
    torch.set_num_threads(1)
    # Have glibc return what is freed during all of it, not only during the load, as CUDA's allocator would reuse it.
    reading._GLIBC_DEFAULT_LIMIT = 2**20
    with reading.freed_memory_given_back():
        before = _peak_from_here()
        here = assemble_run(parse_config(config_text), fingerprint)
        position = Position()
        for _ in range(2):
            for batch in (batches := here.stream.step(position)):
                here.engine.backward(here.engine.loss(batch) / 100, last=batch is batches[-1])
            here.engine.step(1e-4)
            position = here.stream.advance(position)
    return _memory("VmHWM") - before


def run_memory(config_text: str, fingerprint: str) -> int:
    """The same for a whole run, with its checkpoints."""
    reading._GLIBC_DEFAULT_LIMIT = 2**20
    with reading.freed_memory_given_back():
        before = _peak_from_here()
        outcome = runs.run(config_text, fingerprint)
    assert outcome["outcome"] == "finished", outcome
    return _memory("VmHWM") - before


def _peak_from_here() -> int:
    """Let the peak start again from the memory that is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(what: str) -> int:
    """Bytes, as /proc/self/status has them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def small_export_memory(run_uri: str, destination: str) -> int:
    """The same for an export in pieces and parts that are a sixteenth and a thirty-second of the real ones."""
    reading.PIECE_BYTES = merged.PIECE_BYTES = 2**18
    store.PART_BYTES = shard.PART_BYTES = 2**20
    torch.set_num_threads(1)
    before = _peak_from_here()
    export_adapter(store.open_store(run_uri), store.open_store(destination))
    return _memory("VmHWM") - before


def merge_memory(run_uri: str, destination: str) -> int:
    """How far this process's resident memory rises above what it was before the merge, in bytes."""
    torch.set_num_threads(1)
    before = _peak_from_here()
    export_merged(open_store(run_uri), open_store(destination))
    return _memory("VmHWM") - before
