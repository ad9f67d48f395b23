"""The rate of a run of the store that did the work of the one that is planned."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil
from typing import Any

from launcher.view.runs import runs
from trainer.config import Config
from trainer.config.paths import local_path
from trainer.errors import CapstanError
from trainer.plan.forecast import Rate
from trainer.plan.gpus import Gpu, find_gpu
from trainer.run import layout
from trainer.run.folder import name_of, run_config
from trainer.run.records import Record, edge_records, starts_in
from trainer.run.segments import streams
from trainer.store.store import Store

_RUNS_AT_A_TIME = 16
_EDGE_BYTES = 2**16
# The first steps of a start warm kernels up, and fewer than these are no measurement.
_FEWEST_STEPS = 10


def measured_rate(store: Store, config: Config, gpu: Gpu | None) -> Rate | None:
    """The rate of the newest run whose settings make the same work of a row, on GPUs of this name, or on CPUs where the
    run is for them.

    None where there is no such run, or the store cannot be read. `gpu` is None where any will do.
    """
    with suppress(CapstanError), ThreadPoolExecutor(_RUNS_AT_A_TIME) as pool:
        found = pool.map(lambda name: _rate(store.sub(name), config, gpu), runs(store))
        return max(filter(None, found), default=(0.0, None), key=lambda rated: rated[0])[1]
    return None


def _rate(folder: Store, config: Config, gpu: Gpu | None) -> tuple[float, Rate] | None:
    """The time of the run's last step, and its rate."""
    with suppress(CapstanError):
        other = run_config(folder)
        if _work(other) != _work(config):
            return None
        found = streams(folder.list(layout.METRICS))
        for number in reversed(starts_in(found)):
            records = edge_records(folder, number, found, _EDGE_BYTES)
            start = next((record for record in records if record["kind"] == "start"), None)
            steps = [record for record in records if record["kind"] == "step"][2:]
            taken = [step for step in steps if step.get("seconds")][-_FEWEST_STEPS:]
            if start and len(taken) == _FEWEST_STEPS and _is_alike(start, config, gpu):
                return taken[-1].get("time", 0.0), _rate_of(other, folder, start, taken)
    return None


def _work(config: Config) -> list[Any]:
    """The settings that decide what a rank computes with one row."""
    model, train, base = config.model, config.train, config.model.base
    if "://" not in base and (path := local_path(base, "model.base")).exists():
        base = str(path)  # as a run's own configuration has it, from wherever it was started
    return [
        (base, model.layers, model.dtype, config.quant.type),
        (config.tuning.method, config.tuning.targets, config.tuning.experts, config.objective.name),
        (config.data.sequence_length, train.micro_batch, train.activation_checkpointing),
        config.sharding.sequence_parallel,
    ]


def _is_alike(start: Record, config: Config, gpu: Gpu | None) -> bool:
    device = str(start.get("device"))
    on_gpu = device.startswith("cuda")
    if config.cluster.gpus_per_worker == 0 or not on_gpu:
        return config.cluster.gpus_per_worker == 0 and not on_gpu
    found = find_gpu(_card(device))
    return gpu is None or gpu.name in (_card(device), found.name if found else None)


def _card(device: str) -> str:
    """The name of the card in "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    return device.partition("(")[2].removesuffix(")")


def _rate_of(config: Config, folder: Store, start: Record, steps: Sequence[Record]) -> Rate:
    ranks, train = start.get("world_size") or 1, config.train
    at_once = max(1, ranks // config.sharding.sequence_parallel) * train.micro_batch
    rows = train.micro_batch * ceil(train.global_batch / at_once) * len(steps)
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step.get("tokens") or 0 for step in steps) / ranks / seconds
    device = _card(str(start.get("device"))) or "CPUs"
    basis = (
        f"measured: the run {name_of(folder)} of this store trained {tokens:,.0f} tokens/s a rank, on {ranks}"
        f" ({device}), with the same base, method, quantization and length of rows"
    )
    return Rate(seconds / rows, tokens, basis, name_of(folder))
