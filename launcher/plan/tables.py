"""Tables for people: what `plan` shows."""

from dataclasses import asdict

from rich.filesize import decimal

from launcher.view.wrapped_table import FoldedTable
from trainer.plan.needs import ALLOWANCES, ESTIMATES, Plan

_MEANING = {
    "frozen_quantized": "packed weights and scales, this rank's share",
    "frozen_unquantized": "what is frozen in 16 bits, such as embeddings, norms, head; this rank's share",
    "frozen_whole": "what of it is small and whole on each rank: norms, and scales beside wide adapters",
    "gathered_layers": "layers gathered at one time",
    "dequantized_weight": "the largest weight, dequantized",
    "adapter_weights": "what learns in 16 bits: this rank's share, and small parameters whole",
    "adapter_states": "fp32 masters, gradients and moments, this rank's share",
    "whole_gradient": "the largest gradient before it is divided",
    "optimizer_step": "what the update takes beyond what the passes have freed",
    "gradient_buckets": "DeepSpeed's buckets",
    "activations": "activations of one micro-batch",
    "logits": "one chunk of logits in the loss, as far as a layer's backward pass takes no more later",
    "context": "CUDA context and kernels",
    "communicators": "buffers of NCCL",
    "reads_during_load": "read buffers during the load",
    "offloaded_base": "offloaded base",
    "offloaded_states": "offloaded fp32 masters, gradients, moments, and what the update takes",
    "offloaded_activations": "offloaded inputs of layers that are computed again",
    "checkpoint_copy": "copies of what learns, from which checkpoints are uploaded",
    "base_gathers": "the frozen base, gathered layer by layer",
    "adapter_gathers": "what learns, gathered",
    "adapter_gradients": "its gradients, reduced",
    "row_exchanges": "heads for tokens, of the ranks that share rows",
    "from_other_nodes": "of all this, from other nodes",
    "total": "total",
}


def meaning(part: str) -> str:
    """A part of the plan's bytes in words, with how far they can be relied on."""
    kind = " (estimate)" if part in ESTIMATES else " (allowance)" if part in ALLOWANCES else ""
    return _MEANING.get(part, part.replace("_", " ")) + kind


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


def plan_tables(plan: Plan) -> list[FoldedTable]:
    """Parameters and batch, then a table of bytes for each of GPU, host and network. A part of nothing has no row."""
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


def binary(count: int) -> str:
    """Bytes of memory as makers and drivers of GPUs count them: 23.9 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


def _table(title: str, values: str) -> FoldedTable:
    table = FoldedTable(title)
    table.add_column(values, justify="right", no_wrap=True)
    return table
