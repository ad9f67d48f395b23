"""How much memory a load, a step, a whole training and an export take."""

import gc
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.device import pretended
from tests.dist import runs
from tests.dist.assembled import assemble_run
from tests.dist.shared_rows import received
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import load_model
from trainer.base.partitions import reading
from trainer.config import parse_config, training
from trainer.data.order.settings import Position
from trainer.export.write import merged
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.model import activations
from trainer.model.attention import choose_attention
from trainer.model.held.layers import HeldLinear
from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
from trainer.processes.ranks import join
from trainer.state.checkpoint import manifest as checkpoint_reading
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
    attention = choose_attention("auto", ranks.device, torch.bfloat16, base.architecture.attention_needs)
    before = _peak_from_here()
    _, report = load_model(base, config, settings, ranks.world, attention, "world")
    return {"grown_bytes": _memory("VmHWM") - before, "kept_bytes": report.kept_bytes, "read_bytes": report.read_bytes}


def gathered_in_step(config_text: str) -> dict[str, int]:
    """The most bytes of gathered weights that are there at one time in a step: as it is, and with each kept to its
    end.
    """
    here = assemble_run(parse_config(config_text))
    _most_gathered(here.engine)  # the first step finds out in which order parameters are used
    return {"released": _most_gathered(here.engine), "kept": _most_gathered(here.engine, keep=list[Tensor]().append)}


def _most_gathered(engine: Engine, keep: Callable[[Tensor], None] = lambda _: None) -> int:
    gathered, bytes_there, plain = dict[StorageWeakRef, int](), list[int](), HeldLinear.dequantize

    def noting(self: HeldLinear) -> Tensor:
        keep(self.weight.data)
        storage = self.weight.data.untyped_storage()
        gathered[StorageWeakRef(storage)] = storage.nbytes()
        bytes_there.append(sum(size for one, size in gathered.items() if not one.expired()))
        return plain(self)

    HeldLinear.dequantize = noting
    try:
        _pass_through(engine, 16)
    finally:
        HeldLinear.dequantize = plain
    return max(bytes_there)


def row_memory(config_text: str, lengths: list[int], tile: int, library: str) -> list[tuple[int, int]]:
    """Bytes by which a forward and backward pass through one document of each length, or this rank's slice of it, raise
    the resident memory, or that of the pretended device in `library`; and those that this rank receives of its peers in
    it. MLPs that are tiled take so many tokens at a time."""
    config, activations.MLP_TILE, training.MLP_TILE = parse_config(config_text), tile, tile
    begin, highest = (pretended.peak_from_here, pretended.peak) if library else (_peak_from_here, _highest)
    if library:
        pretended.install(Path(library))
        pretended.take_memory_as_cards_do()
    reading._GLIBC_DEFAULT_LIMIT = 2**20
    with reading.freed_memory_given_back():
        here, parts, found = assemble_run(config), config.sharding.sequence_parallel, list[tuple[int, int]]()
        mine = here.ranks.rank % parts, parts
        for length in (lengths[0], *lengths):  # the first pass finds out in which order parameters are used
            before = begin()
            with received() as bytes_of_peers:
                _pass_through(here.engine, length, mine)
            found.append((highest() - before, sum(bytes_of_peers)))
    return found[1:]


def longest_row(config_text: str, memory: int, longest: int, tile: int) -> int:
    """The longest document, of at most `longest` tokens, whose step this process can make with `memory` bytes beyond
    those that it has before the base is loaded: bisected by steps, in 64ths of `longest`. MLPs that are tiled take so
    many tokens at a time."""
    config, activations.MLP_TILE, training.MLP_TILE = parse_config(config_text), tile, tile
    reading._GLIBC_DEFAULT_LIMIT = 2**20
    with reading.freed_memory_given_back():
        step = longest // 64
        _pass_through(assemble_run(config).engine, step)  # whatever is imported on the way is there then
        gc.collect()
        before, here = _peak_from_here(), assemble_run(config)

        def is_too_long(steps: int) -> bool:
            _peak_from_here()
            _pass_through(here.engine, steps * step)
            return _memory("VmHWM") - before > memory

        return step * bisect_right(range(1, 65), False, key=is_too_long)


def _pass_through(engine: Engine, length: int, mine: tuple[int, int] = (0, 1)) -> None:
    """A step over one document of so many tokens, or over a slice of it: its number and how many there are."""
    tokens = torch.arange(length, dtype=torch.int32)[None] % 250
    positions = torch.arange(length, dtype=torch.int32)[None]
    row = MicroBatch(
        ModelInput.of(tokens, positions, Segments.of_documents([length])), tokens, tokens=length, targets=length
    )
    engine.backward(engine.loss(row if mine == (0, 1) else row.cut(*mine)) / length, last=True)
    engine.step(1e-6)


def training_memory(config_text: str, fingerprint: str) -> int:
    """How far this process's resident memory rises above what it was before the load, in bytes, in a load and two
    steps.
    """
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


def _highest() -> int:
    return _memory("VmHWM")


def _memory(what: str) -> int:
    """Bytes, as /proc/self/status has them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def small_export_memory(run_uri: str, destination: str) -> int:
    """The same for an export in pieces and parts that are a sixteenth and a thirty-second of the real ones."""
    reading.PIECE_BYTES = merged.PIECE_BYTES = 2**18
    store.PART_BYTES = checkpoint_reading.PART_BYTES = 2**20
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
