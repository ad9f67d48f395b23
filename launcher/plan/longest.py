"""`capstan plan --longest`: the longest row on these GPUs, and what each setting buys."""

from dataclasses import dataclass
from math import ceil
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from launcher.plan.planning import machine_of, typed_for
from launcher.plan.summary import binary
from launcher.view.console import FoldedTable
from trainer.base.find.locate import base_at_hand
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.plan.gpus import Gpu
from trainer.plan.longest import LongestRow, PlannedRanks, longest_rows


@dataclass(frozen=True)
class Longest:
    """The longest rows on `ranks`, of a base with so many `positions`, if it has a limit."""

    ranks: PlannedRanks
    gpu: Gpu | None
    positions: int | None
    rows: list[LongestRow]


def find_longest(config: Config, gpu: str | None, ranks_per_node: int | None) -> Longest:
    """Return the longest rows of `config` on `gpu`, which is found as in `plan_run`.

    Raises:
        ConfigError: no GPU is known to compare with, or the base or a method cannot be planned with.
    """
    machine = machine_of(config, gpu, ranks_per_node)
    memory = machine.gpu.memory if machine.gpu else machine.host_memory
    if memory is None:
        raise ConfigError("--longest: needs to know the memory of a GPU. Add --gpu H100 or --gpu 24GB.")
    ranks = PlannedRanks(machine.world_size, machine.per_node, memory, machine.gpu is not None)
    base = base_at_hand(config.model).description
    config, _ = typed_for(config.decided(base.in_4_bits), machine, base)
    rows = longest_rows(config, base, ranks)
    return Longest(ranks, machine.gpu, base.architecture.positions, rows)


def show_longest(found: Longest) -> RenderableType:
    """Show a table with a line for each setting, and sentences on what it rests on."""
    table = FoldedTable()
    table.add_column("settings")
    for name in ("tokens", "activations", "host memory of a node"):
        table.add_column(name, justify="right", no_wrap=True)
    before: dict[str, Any] = {}
    for row in found.rows:
        new = [f"{name}: {value}" for name, value in row.settings.items() if before.get(name) != value]
        words = f"and {', '.join(new)}" if before else "without those that follow" if new else "as they are"
        fits = (f"{row.tokens:,}", binary(row.activations), binary(row.host))
        table.add_row(words, *(fits if row.tokens else ("none fits", "", "")))
        before = row.settings
    ranks = found.ranks
    whose = (
        f"{found.gpu.name or 'a GPU'}, {binary(ranks.memory)}" if found.gpu else f"{binary(ranks.memory)} of the host"
    )
    sentences = [f"By the plan; ranks: {ranks.world_size}, each with {whose}."]
    longest = max(row.tokens for row in found.rows)
    if found.positions and longest > found.positions:
        factor = ceil(longest / found.positions)
        sentences.append(
            f"The base has {found.positions:,} positions: longer documents need model.rope_scaling, of a factor up to"
            f" {factor}."
        )
    return Group(table, *map(Text, sentences))
