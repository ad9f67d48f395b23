"""A plan for people: in words what a person wants to know of a run first, and the tables below.

With --longest it is the longest row on these GPUs, and what each setting buys.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.text import Text

from launcher.plan.planning import Planned, Whose, description_for, fits, machine_of, typed_for
from launcher.plan.starts import StartTime
from launcher.view.console import FoldedTable, facts
from trainer.base.find.locate import base_at_hand
from trainer.config import Config
from trainer.data.compile.length import BYTES_A_TOKEN
from trainer.errors import ConfigError, counted
from trainer.plan.forecast import Length, PictureWork
from trainer.plan.gpus import Gpu
from trainer.plan.longest import LongestRow, PlannedRanks, longest_rows
from trainer.plan.needs import ALLOWANCES, ESTIMATES, Plan
from trainer.run.lines import duration


def show_plan(planned: Planned, config: Config) -> RenderableType:
    """Show whether the run fits, how long it is, how long it takes and what it costs; then the tables behind this."""
    opening = facts()
    for name, text in (*plan_lines(planned, config), *(("export", f"not as {why}") for why in planned.no_exports)):
        opening.add_row(name, text)
    return Group(opening, "", *plan_tables(planned.plan), _phases(planned.start))


_WHOSE = {
    "given": "as asked for",
    "cluster.slurm.gpu_type": "cluster.slurm.gpu_type",
    "this machine": "of this machine",
}


def plan_lines(planned: Planned, config: Config) -> Iterator[tuple[str, str | Text]]:
    """Yield the name and the text of each line that a person wants to know of a run first."""
    yield "memory", fits_line(planned.plan, planned.gpu, planned.whose)
    yield from (("unclear", sentence) for sentence in planned.plan.unrecognised)
    yield "counted", _sureness(planned)
    yield "length", _length(planned, config)
    yield from (("rhythm", sentence) for sentence in _rhythm(planned.length, config))
    yield "data", _data(planned.length)
    if planned.pictures:
        yield "pictures", _pictures(planned.pictures, config.data.sequence_length)
    yield from _time(planned, config)
    yield from _starts(planned)
    yield from (("note", note) for note in planned.plan.notes)


def _time(planned: Planned, config: Config) -> Iterator[tuple[str, str]]:
    estimate = planned.forecast
    if estimate is None:
        yield "time", f"no estimate, as {_unknown(planned)}"
        return
    hours = "" if estimate.gpu_hours is None else f", {_rounded(estimate.gpu_hours)} GPU hours"
    left_out = "evaluations and commits" if estimate.run else "evaluations, commits and waits for the network"
    step = f"{estimate.step_seconds:.3g} s a step"
    yield "time", f"about {duration(estimate.seconds)}{hours}: {step}, without loading, {left_out}"
    if estimate.cost is not None:
        price = config.track.price_per_gpu_hour
        yield "cost", f"about {estimate.cost:,.2f}, at {price:g} a GPU hour (track.price_per_gpu_hour)"
    yield "basis", estimate.basis


def _pictures(work: PictureWork, row: int) -> str:
    """Say what the pictures of a row cost, or before the data is compiled those of one size."""
    operations = work.operations
    if work.share is None:
        tokens = work.tokens
        flops = "not counted" if operations is None else f"{_flops(operations * tokens)}"
        return (
            f"a {work.of} takes {tokens:,.0f} tokens, {flops} of the tower, and"
            f" {1e3 * work.seconds * tokens:.3g} ms of a core, measured here; how many a row has is known once the data"
            " is compiled"
        )
    tokens = work.share * row
    flops = "operations of the tower not counted"
    if operations is not None:
        flops = f"{_flops(work.operations_of_row(row))} of the tower"
    return (
        f"{work.share:.1%} of the tokens, {tokens / work.tokens:.3g} {work.noun} a row: {flops}, and"
        f" {1e3 * work.seconds * tokens:.3g} ms of a core, measured here; {counted(work.cores, 'core')} of each rank"
        f" read{'s' if work.cores == 1 else ''} them in {1e3 * work.host_seconds_of_row(row):.3g} ms"
    )


_LITTLE = 1e-4


def _starts(planned: Planned) -> Iterator[tuple[str, str]]:
    """Yield how long a start takes by its phases, what the figures rest on, and what restarts cost."""
    start, expected = planned.start, planned.restarts
    ranks = planned.plan.batch.world_size
    shown = ((name, f"{phase.seconds:.1f} s") for name, phase in start.phases.items())
    parts = ", ".join(f"{_words(name)} {seconds}" for name, seconds in shown if seconds != "0.0 s")
    if start.run is None:
        assumed = "; basis: the last table" if any(one.assumed for one in start.phases.values()) else ""
        yield "start", f"about {duration(start.seconds)} on {counted(ranks, 'rank')} ({parts}){assumed}"
    else:
        others = "" if start.ranks == ranks else f"; {counted(ranks, 'rank')} may take another time"
        took = f"as {start.run} took on {counted(start.ranks, 'rank')}"
        yield "start", f"about {duration(start.seconds)} ({parts}), {took}{others}"
    if expected is not None and expected.share < _LITTLE:
        yield (
            "restarts",
            f"less than {_LITTLE:.2%} of the cost, at a failure every {expected.gpu_hours:,.0f} GPU hours"
            " (--failure-every)",
        )
    elif expected is not None:
        yield (
            "restarts",
            f"{expected.share:.2%} of the cost: about {expected.count:.2g}, each {duration(expected.seconds_each)} of"
            f" all ranks (a start, and half the time between commits), at a failure every {expected.gpu_hours:,.0f} GPU"
            " hours (--failure-every)",
        )


def _phases(start: StartTime) -> FoldedTable:
    table = _table("a start", "seconds")
    table.add_column("by")
    for name, phase in start.phases.items():
        table.add_row(_words(name), f"{phase.seconds:.1f}", phase.basis)
    return table


def _words(name: str) -> str:
    return name.replace("_", " ")


def fits_line(plan: Plan, gpu: Gpu | None, whose: Whose | None) -> str | Text:
    """Say whether each rank has the memory that it needs. `gpu` is what it is compared with, and `whose` says why."""
    needed = binary(plan.memory_per_gpu.total)
    ranks = plan.batch.world_size
    if plan.device == "cpu" and gpu is None:
        return f"{needed} for {_each(ranks, 'rank')}, on the CPU (cluster.gpus_per_worker: 0)"
    if gpu is None:
        return f"{needed} on {_each(ranks, 'GPU')}; which GPU is not known: --gpu H100 or --gpu 24GB compares"
    verdicts = {True: ("fits", "green"), False: ("does not fit", "red"), None: ("not known whether it fits", "yellow")}
    verdict = Text(*verdicts[fits(plan, gpu)])
    there = f"{needed.removesuffix(' GiB')} of {binary(gpu.memory)}"
    name = f"{gpu.name}, " if gpu.name else ""
    return verdict.append(f": {there} on {_each(ranks, 'GPU')} ({name}{_WHOSE[whose or 'given']})", "default")


def _sureness(planned: Planned) -> str:
    """Say how much of the memory is counted, and how much is not."""
    parts = asdict(planned.plan.memory_per_gpu)
    estimated, allowed = (sum(parts.get(name, 0) for name in names) for names in (ESTIMATES, ALLOWANCES))
    counted = parts["total"] - estimated - allowed
    allowances = f"; {binary(allowed)} allowed for the device" if allowed else ""
    return f"{binary(counted)}; estimated {binary(estimated)} (activations, logits, gathered layers){allowances}"


def _length(planned: Planned, config: Config) -> str:
    length, about = planned.length, "" if planned.length.counted else "about "
    rows = f"of {counted(config.train.global_batch, 'row')} of {config.data.sequence_length:,} tokens"
    if length.steps is None:
        return f"{counted(length.epochs or 0, 'epoch')}; how many steps {rows} is not known before the data is compiled"
    steps = f"{about}{counted(length.steps, 'step')} {rows}"
    if length.epochs is None:
        return steps
    tokens = "" if length.tokens is None else f"about {_large(length.tokens)} tokens, "
    return f"{'' if config.train.epochs else 'about '}{counted(length.epochs, 'epoch')}, {tokens}{steps}"


def _rhythm(length: Length, config: Config) -> Iterator[str]:
    """Yield the steps between two of so many events in an epoch."""
    for name, times in (
        ("eval.per_epoch", config.eval.per_epoch),
        ("checkpoint.per_epoch", config.checkpoint.per_epoch),
    ):
        if not times:
            continue
        if length.steps_of_epoch is None:
            yield f"{name}: {times:g} is not known in steps before the data is compiled"
        else:
            about = "" if length.compiled and length.counted else "about "
            yield f"{name}: {times:g} is {about}every {max(1, length.steps_of_epoch / times):.4g} steps"


def _data(length: Length) -> str:
    if length.tokens_of_epoch is None:
        return "not known before it is compiled"
    tokens = f"{_large(length.tokens_of_epoch)} tokens an epoch"
    if length.compiled:
        return f"{tokens}, compiled"
    size = binary(length.file_bytes)
    return (
        f"some {tokens}, by the size of the files: {size}, {BYTES_A_TOKEN} bytes a token; `capstan data build` counts"
        " them"
    )


def _unknown(planned: Planned) -> str:
    if planned.length.steps is None:
        return "the number of steps is not known"
    if planned.plan.device == "cpu":
        return "no run of this store has done this work on CPUs"
    if planned.gpu is None:
        return "the GPU is not known: --gpu H100"
    return "only the GPU's memory is known, or its peak in this model.dtype is not; name the GPU: --gpu H100"


def _each(count: int, what: str) -> str:
    return f"each of {count:,} {what}s" if count > 1 else f"its {what}"


def _large(count: float) -> str:
    """Return a number in three digits: 31.2 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,.0f}"


def _flops(count: float) -> str:
    return f"{_large(count)}FLOP" if count >= 1e4 else f"{count:,.0f} FLOP"


def _rounded(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"


def plan_tables(plan: Plan) -> list[FoldedTable]:
    """Return parameters and batch, then a table of bytes for each of GPU, host and network.

    A part of zero bytes has no row.
    """
    facts = _table("run", "")
    facts.add_row("device of a rank", {"gpu": "a GPU", "cpu": "the CPU (cluster.gpus_per_worker: 0)"}[plan.device])
    for name, count in asdict(plan.parameters).items():
        facts.add_row(f"{name} parameters", f"{count:,}")
    for name, count in asdict(plan.batch).items():
        words, unit = _BATCH.get(name, (name.replace("_", " "), ""))
        if count and (plan.batch.sequence_parallel > 1 or name not in ("data_groups", "sequence_parallel")):
            facts.add_row(words, f"{count:,} {unit}".strip())
    facts.add_row("layers computed again in the backward pass", f"{plan.recomputed_layers} of {plan.layers}")
    facts.add_row("a checkpoint", decimal(plan.checkpoint_bytes))
    for part in plan.whole:
        facts.add_row(
            f"not quantized: {part.name}, as {part.reason}", f"{part.weights:,} weights, {decimal(part.bytes)}"
        )
    for part in plan.left_out:
        facts.add_row(f"left out: {part.path}", f"{part.tensors} tensors, {part.weights:,} weights")
    parts = (
        ("memory of one GPU" if plan.device == "gpu" else "memory of one rank", plan.memory_per_gpu, binary),
        ("memory of one host", plan.memory_per_host, binary),
        ("received by one rank in a step", plan.traffic_per_step, decimal),
    )
    tables = [facts]
    for title, part, shown in parts:
        tables.append(table := _table(title, "size"))
        for name, value in asdict(part).items():
            if value or name == "total":
                table.add_row(meaning(name), shown(value), style="bold" if name == "total" else None)
    return tables


# The batch's figures in words, and the unit of each.
_BATCH = {
    "world_size": ("ranks", ""),
    "data_groups": ("groups of ranks with rows of their own", ""),
    "sequence_parallel": ("ranks that share each row", ""),
    "accumulation": ("micro-batches of a rank in a step", ""),
    "rows": ("rows of a step", "rows"),
    "empty_rows": ("empty rows of a step, as global_batch does not divide evenly", "rows"),
    "tokens": ("tokens of a step", "tokens"),
    "reference_time_percent": ("passes through the reference, beside the time of the others", "%"),
    "stored_reference_percent": ("the pass that stores the reference, beside the time of an epoch", "%"),
}


def _table(title: str, values: str) -> FoldedTable:
    table = FoldedTable(title)
    table.add_column(values, justify="right", no_wrap=True)
    return table


_MEANING = {
    "frozen_quantized": "packed weights and scales, this rank's share",
    "frozen_unquantized": "what is frozen in 16 bits, such as embeddings, norms, head; this rank's share",
    "frozen_whole": "what of it is small and whole on each rank: norms, and scales beside wide adapters",
    "frozen_tower": "the base's tower (encoder and projector), in 16 bits, whole on each rank",
    "gathered_layers": "layers gathered at one time",
    "dequantized_weight": "the largest weight, dequantized",
    "adapter_weights": "what learns in 16 bits: this rank's share, and small parameters whole",
    "adapter_states": "fp32 masters, gradients and moments, this rank's share",
    "whole_gradient": "the largest gradient before it is divided",
    "optimizer_step": "what the update takes beyond what the passes have freed",
    "gradient_buckets": "DeepSpeed's buckets",
    "activations": "activations of one micro-batch",
    "tower_activations": "those of the tower, which learns, as if pictures filled the rows",
    "logits": "one chunk of logits in the loss, beyond what a layer's backward pass takes later",
    "context": "CUDA context and kernels",
    "communicators": "buffers of NCCL",
    "reads_during_load": "read buffers during the load",
    "offloaded_base": "offloaded base",
    "offloaded_states": "offloaded fp32 masters, gradients, moments, and what the update takes",
    "offloaded_activations": "offloaded inputs of layers that are computed again",
    "pictures_read_ahead": "pictures of coming rows (data.images.read_ahead of each rank)",
    "checkpoint_copy": "copies of what learns, from which checkpoints are uploaded",
    "base_gathers": "the frozen base, gathered layer by layer",
    "adapter_gathers": "what learns, gathered",
    "adapter_gradients": "its gradients, reduced",
    "row_exchanges": "heads for tokens, of the ranks that share rows",
    "from_other_nodes": "of all this, from other nodes",
    "total": "total",
}


def meaning(part: str) -> str:
    """A part of the plan's bytes in words, with how reliable they are."""
    kind = " (estimate)" if part in ESTIMATES else " (allowance)" if part in ALLOWANCES else ""
    return _MEANING.get(part, part.replace("_", " ")) + kind


def binary(count: int) -> str:
    """Return bytes of memory as makers and drivers of GPUs count them: 23.9 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


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
    at_hand = base_at_hand(config.model)
    base = at_hand.description
    config, _ = typed_for(config.decided(base.in_4_bits), machine, base)
    base = description_for(config, at_hand)
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
        cells = (f"{row.tokens:,}", binary(row.activations), binary(row.host))
        table.add_row(words, *(cells if row.tokens else ("none fits", "", "")))
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
