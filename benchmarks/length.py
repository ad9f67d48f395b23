"""The memory of a row's activations by its length, on one rank and on ranks that share it, beside the plan's.

    python benchmarks/length.py [--ranks 1 2 4] [--lengths 4096 12288] [--memory MIB]

A forward and backward pass through one document of either length on CPUs, over a small random base: what a token adds
to a rank's peak of resident memory (VmHWM) between the two lengths, and what `capstan plan` says that it adds to
activations and logits. With `--memory` instead the longest row that one rank computes in so many MiB, bisected by real
steps, beside that of `capstan plan --longest`. With `--prompts` what steps of DPO cost over pairs of answers to prompts
of so many tokens, each once in a row (`data.share_prefix`) or twice.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the ranks that the tests share

from tests.device.pretended import build
from tests.dist import memory as memory_of
from tests.dist import shared_rows
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.base.find.locate import describe_base
from trainer.config import Config, dump_config, training
from trainer.plan import memory
from trainer.plan.longest import PlannedRanks, longest_rows
from trainer.plan.plan import make_plan

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2**20,
}
# What is done for memory -> its settings.
WAYS = {
    "nothing": "{activation_checkpointing: none, tiled_mlp: false",
    "layers computed again": "{activation_checkpointing: all, tiled_mlp: false",
    "and MLPs in tiles": "{activation_checkpointing: all, tiled_mlp: true",
    "and inputs of layers on the host": "{activation_checkpointing: all, tiled_mlp: true, activation_offload: true",
}
ON_HOST = tuple(WAYS)[:-1]


def planned(config: Config, ranks: int) -> tuple[int, int]:
    """Bytes of a rank's activations and logits, and those that it receives of its peers."""
    plan = make_plan(config, describe_base(config.model), ranks, ranks, None)
    return plan.memory_per_gpu.activations + plan.memory_per_gpu.logits, plan.traffic_per_step.row_exchanges


def settings_of(ranks: int, way: str, on_device: bool = False) -> tuple[str, ...]:
    return (
        "model.dtype=fp32",
        f"sharding.sequence_parallel={ranks}",
        f"train={WAYS[way]}, steps: 4, global_batch: 1}}",
        # bitsandbytes compiles what dequantizes on a device that it does not know.
        *(("quant.type=none",) if on_device else ("cluster.gpus_per_worker=0",)),
    )


def longest(workshop: Workshop, memory: int, tile: int) -> Table:
    """The longest rows that fit into `memory` bytes, by the plan and by real steps."""
    table = Table("for memory", "longest row", "planned", "ratio")
    for way in ON_HOST:
        config = workshop.config("longest", *settings_of(1, way))
        said = longest_rows(config, describe_base(config.model), PlannedRanks(1, 1, memory, on_gpu=False))[0].tokens
        (found,) = launch(1, memory_of.longest_row, dump_config(config), memory, 2 * said, tile, timeout=3600)
        table.add_row(way, f"{found:,}", f"{said:,}", f"{found / said:.2f}")
        print(way, found, said, found / said, flush=True)
    return table


def prompts(workshop: Workshop, tokens: int) -> Table:
    """A step of DPO over pairs of short answers to prompts of so many tokens, each once in a row or twice."""
    pairs, table = Path(workshop.folder) / "pairs.jsonl", Table("prompts", "tokens of a pair", "processor's seconds")
    prompt, costs = "the ant and the bee " * (tokens // 20), list[tuple[float, float]]()
    with pairs.open("w") as file:
        for n in range(8):
            file.write(
                json.dumps({"prompt": f"{n} {prompt}", "chosen": "fox gnu hen " * 4, "rejected": "emu " * 9}) + "\n"
            )
    for shared in (False, True):
        config = workshop.config(
            f"shared-{shared}",
            *settings_of(1, "nothing"),
            "objective.name=dpo",
            f"data={{train: [{{path: {pairs}}}], format: preference, share_prefix: {shared}, sequence_length:"
            f" {2 * tokens + 256}}}",
            "train.global_batch=2",
        )
        (cost,) = launch(1, shared_rows.pair_costs, dump_config(config), workshop.prepare(config).train, timeout=1800.0)
        costs.append(cost)
        table.add_row("once" if shared else "a copy for each answer", f"{cost[0]:,.0f}", f"{cost[1]:.2f}")
    table.add_row("ratio", *(f"{once / each:.2f}" for each, once in zip(*costs, strict=True)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="The memory of a row's activations by its length.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs=2, default=[4096, 12288])
    parser.add_argument(
        "--device", action="store_true", help="on the pretended device, whose every allocation is counted"
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=512,
        help="tokens that tiled MLPs take at a time, so that short rows have several tiles",
    )
    parser.add_argument("--memory", type=int, help="MiB")
    parser.add_argument("--prompts", type=int, help="tokens of prompts that pairs of answers share")
    asked = parser.parse_args()
    training.MLP_TILE = memory.MLP_TILE = asked.tile
    table = Table(
        "ranks that share a row", "for memory", "bytes a token", "planned", "ratio", "of peers, each layer", "planned"
    )
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder), **SIZES)
        if asked.memory:
            Console().print(longest(workshop, asked.memory * 2**20, asked.tile))
            return
        if asked.prompts:
            Console().print(prompts(workshop, asked.prompts))
            return
        library = str(build(Path(__file__).parents[1] / ".pytest_cache" / "device")) if asked.device else ""
        for way in WAYS if library else ON_HOST:
            for ranks in asked.ranks:
                settings = settings_of(ranks, way, asked.device)
                configs = [
                    workshop.config("length", *settings, f"data.sequence_length={length}") for length in asked.lengths
                ]
                found = launch(
                    ranks,
                    memory_of.row_memory,
                    dump_config(configs[0]),
                    asked.lengths,
                    asked.tile,
                    library,
                    timeout=3600,
                )
                expected = [planned(config, ranks) for config in configs]
                tokens = asked.lengths[1] - asked.lengths[0]
                measured = max((longer[0] - shorter[0]) / tokens for shorter, longer in found)
                shorter, longer = expected
                slope, layers = (longer[0] - shorter[0]) / tokens, SIZES["num_hidden_layers"] * asked.lengths[1]
                of_peers = {one[1][1] for one in found}
                row = (f"{measured:,.0f}", f"{slope:,.0f}", f"{measured / slope:.2f}")
                row += ("/".join(f"{one / layers:,.0f}" for one in of_peers), f"{longer[1] / layers:,.0f}")
                print(ranks, way, *row, flush=True)
                table.add_row(str(ranks), way, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
