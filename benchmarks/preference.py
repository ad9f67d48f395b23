"""Time of a DPO step beside that of two SFT steps on the same rows.

    python benchmarks/preference.py [--ranks 2] [--pairs 8] [--layers 4] [--hidden 512]

Both are steps of one engine, in turns: a random base in 4 bits under ZeRO-3 with LoRA, and one packed row a rank, which
holds two pairs of answers. A DPO step passes through the reference and then learns from the row; an SFT step learns
from its next tokens. The figure is the median over the pairs of turns, with and without activation checkpointing.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

from load import make_base, run_config
from ranks import become_rank, run_ranks
from rich.console import Console
from rich.table import Table

TOKENS = 512  # of a rank's row


def rank_main(rank: int, world: int, port: int, folder: str, checkpointing: bool, pairs: int) -> None:
    """One rank; rank 0 writes the seconds of each DPO step and of the two SFT steps beside it."""
    become_rank(rank, world, port)
    import torch

    from trainer.base.load.load import DTYPES
    from trainer.config import override
    from trainer.model.attention import choose_attention
    from trainer.model.micro_batch import MicroBatch, ModelInput, Role, Segments
    from trainer.plan.assemble import ShardingPlan, assemble
    from trainer.plan.resolve import resolve
    from trainer.processes.ranks import join
    from trainer.state.zero.policy import build_deepspeed_config
    from trainer.tuning.objective import find_objective

    torch.set_num_threads(1)
    ranks = join()
    config = override(run_config(Path(folder, "base")), f"train.activation_checkpointing={checkpointing}")
    settings = build_deepspeed_config(config, world_size=world, accumulation=1, on_gpu=False)
    resolved = resolve(config)
    attention = choose_attention("sdpa", ranks.device, DTYPES["bf16"], resolved.base.architecture.attention_needs)
    objectives = {
        name: find_objective(override(config, f"objective.name={name}", *more))
        for name, more in {"sft": (), "dpo": ("data.format=preference",)}.items()
    }
    engine, _ = assemble(resolved, ranks, attention, ShardingPlan(settings, "world"))
    quarter = TOKENS // 4
    tokens = torch.arange(TOKENS, dtype=torch.int32).mul(7).remainder(1000)[None]
    places = torch.arange(quarter, dtype=torch.int32).repeat(4)[None]
    segments = Segments((quarter,) * 4, (Role.DOCUMENT, Role.REJECTED) * 2)
    batch = MicroBatch(ModelInput.of(tokens, places, segments), tokens, TOKENS, TOKENS, documents=(0, 1))

    def step(name: str) -> float:
        """Seconds of one training step."""
        # One engine for both: only the function that it calls differs.
        engine._engine.module._loss = objectives[name].loss
        ranks.gather(0.0)
        started = time.monotonic()
        engine.backward(engine.loss(batch).reshape(-1)[0] / objectives[name].weight(batch) / world, last=True)
        engine.step(1e-5)
        ranks.gather(0.0)
        return time.monotonic() - started

    for name in ("dpo", "sft", "dpo", "sft"):
        step(name)
    turns = [(step("dpo"), step("sft") + step("sft")) for _ in range(pairs)]
    if rank == 0:
        Path(folder, f"{checkpointing}.json").write_text(json.dumps(turns))


def measure(folder: Path, ranks: int, checkpointing: bool, pairs: int) -> list[tuple[float, float]]:
    """The seconds of each DPO step, and of the two SFT steps after it."""
    run_ranks(rank_main, ranks, str(folder), checkpointing, pairs, seconds=900)
    return [(dpo, sft) for dpo, sft in json.loads((folder / f"{checkpointing}.json").read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    given = parser.parse_args()
    table = Table(
        "activation checkpointing", "a DPO step, s", "two SFT steps, s", "ratio", "of the pairs", "by passes",
        title=f"{given.ranks} ranks, a row of {TOKENS} tokens each, {given.pairs} pairs of turns",
        caption=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_base, (Path(folder, "base"), given.layers, given.hidden))
        for checkpointing, passes in ((True, 3), (False, 2)):
            turns = measure(Path(folder), given.ranks, checkpointing, given.pairs)
            ratios = sorted(dpo / sft for dpo, sft in turns)
            dpo, sft = (statistics.median(column) for column in zip(*turns, strict=True))
            table.add_row(
                "yes" if checkpointing else "no",
                f"{dpo:.3f}",
                f"{sft:.3f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                f"{(passes + 1) / (2 * passes):.2f}",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
