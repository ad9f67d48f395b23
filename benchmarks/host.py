"""The host's time for a micro-batch, with the engine and without, and its collectives, by the number of layers.

    python benchmarks/host.py [--layers 32 80 126] [--ranks 1 2] [--micro-batches 5]

A device computes while the host calls: where the host needs longer than the device, the device waits. The base is a
Llama in 4 bits of tiny width with LoRA on all linear layers, with activation checkpointing, so that next to nothing is
computed. Without the engine the same model computes the same row, its parameters whole. Times are those that the
calling thread had its core, the median of the micro-batches; `collectives` are those of one micro-batch of a rank,
without those of an update.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load import run_config
from ranks import become_rank, run_ranks
from rich.console import Console
from rich.table import Table

TOKENS = 32
WIDTHS: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}


def make_base(folder: Path, layers: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=False, **WIDTHS)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def rank_main(rank: int, world: int, port: int, folder: str, count: int) -> None:
    """One rank; rank 0 writes the seconds without the engine and with it, those of an update, and the number of each
    collective.
    """
    become_rank(rank, world, port)
    import deepspeed
    import torch
    from deepspeed.comm.torch import TorchBackend

    from trainer.base.find.locate import resolve_base
    from trainer.base.load.load import DTYPES, load_model
    from trainer.config import override
    from trainer.model.attention import choose_attention
    from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
    from trainer.model.packed import PackedModel
    from trainer.plan.inputs import most_whole
    from trainer.processes.ranks import join
    from trainer.state.zero.engine import Engine
    from trainer.state.zero.policy import build_deepspeed_config
    from trainer.tuning.method import method_of
    from trainer.tuning.objective import find_objective

    torch.set_num_threads(1)
    ranks = join()
    # Of parameters so small all would stay whole: those of a real base that do are the norms and the adapters.
    (policy := Path(folder, f"policy-{rank}.json")).write_text(
        json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 2800}})
    )
    config = override(
        run_config(Path(folder, "base")), "train.activation_checkpointing=true", f"sharding.deepspeed={policy}"
    )
    base = resolve_base(config.model)
    settings = build_deepspeed_config(config, world, 1, on_gpu=False, whole=most_whole(config, base.architecture))
    attention = choose_attention("sdpa", ranks.device, DTYPES["bf16"], base.architecture.attention_needs)
    objective, method = find_objective(config), method_of(config)
    model, _ = load_model(base, config, settings, ranks.world, attention, "world")
    method.attach(model, base.architecture, DTYPES["bf16"], 0)
    ids = torch.arange(TOKENS, dtype=torch.int32)[None]
    row = MicroBatch(ModelInput.of(ids, ids, Segments.of_documents([TOKENS])), ids, TOKENS, TOKENS)
    packed = PackedModel(model, attention)

    def seconds(micro_batch: Callable[[], None], after: Callable[[], Any]) -> float:
        found = []
        for _ in range(count + 2):  # the first ones find out in which order units are used
            started = time.thread_time()
            micro_batch()
            found.append(time.thread_time() - started)
            after()
        return statistics.median(found[2:])

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        plain = seconds(lambda: objective.loss(packed, row.to(ranks.device)).backward(), model.zero_grad)
    engine = Engine(packed, objective.loss, method.groups(model, config.optim), config.optim, settings, ranks)
    counts: Counter[str] = Counter()
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        _count(TorchBackend, name, counts)

    def micro_batch() -> None:
        counts.clear()
        engine.backward(engine.loss(row), last=True)

    of_one, updates = Counter[str](), list[float]()

    def after() -> None:
        of_one.clear()
        of_one.update(counts)
        started = time.thread_time()
        engine.step(1e-5)
        updates.append(time.thread_time() - started)

    ours = seconds(micro_batch, after)
    if rank == 0:
        found = {"plain": plain, "ours": ours, "updates": sorted(updates[2:]), "collectives": of_one}
        Path(folder, "found.json").write_text(json.dumps(found))


def _count(owner: Any, name: str, counts: Counter[str]) -> None:
    called = getattr(owner, name)

    def counted(*arguments: Any, **given: Any) -> Any:
        counts[name] += 1
        return called(*arguments, **given)

    setattr(owner, name, counted)


def measure(layers: int, ranks: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_base, (Path(folder, "base"), layers))
        run_ranks(rank_main, ranks, folder, count, seconds=1800)
        return json.loads(Path(folder, "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 80, 126])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--micro-batches", type=int, default=5)
    given = parser.parse_args()
    table = Table(
        "layers", "ranks", "without the engine, s", "with it, s", "ratio", "allowed", "an update, ms", "the shortest", "gathers", "reductions",
        title=f"the host's time for a micro-batch, median of {given.micro_batches}",
        caption=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    )  # fmt: skip
    slow = False
    for layers in given.layers:
        for ranks in given.ranks:
            found = measure(layers, ranks, given.micro_batches)
            ratio, gathers = found["ours"] / found["plain"], found["collectives"].get("all_gather_into_tensor", 0)
            slow |= ratio > 2
            print(f"{layers} layers, {ranks} ranks: {found}", file=sys.stderr, flush=True)
            table.add_row(
                f"{layers}", f"{ranks}", f"{found['plain']:.3f}", f"{found['ours']:.3f}", f"{ratio:.2f}", "2.00", f"{1000 * statistics.median(found['updates']):.0f}",
                f"{1000 * found['updates'][0]:.0f}",
                f"{gathers}", f"{sum(found['collectives'].values()) - gathers}",
            )  # fmt: skip
    Console(width=140).print(table)
    if slow:
        raise SystemExit("the engine takes more than twice the host's time of the model alone")


if __name__ == "__main__":
    main()
