"""Tables for people: what `plan` shows."""

from dataclasses import asdict

from rich.console import Group
from rich.filesize import decimal
from rich.table import Table

from trainer.plan import Plan

_MEANING = {
    "frozen_quantized": "4-bit weights and scales, this rank's share",
    "frozen_unquantized": "what is frozen in 16 bits, such as embeddings, norms, head; this rank's share",
    "gathered_layers": "layers gathered at one time",
    "dequantized_weight": "the largest weight, dequantized",
    "adapter_weights": "what learns in 16 bits: this rank's share, and small parameters whole",
    "adapter_states": "fp32 masters, gradients and moments, this rank's share",
    "whole_gradient": "the largest gradient before it is divided",
    "optimizer_step": "what the update takes beyond what the passes have freed",
    "gradient_buckets": "DeepSpeed's buckets",
    "activations": "activations of one micro-batch",
    "logits": "one chunk of logits in the loss",
    "context": "CUDA context and kernels (allowance)",
    "communicators": "buffers of NCCL (allowance)",
    "reads_during_load": "read buffers during the load",
    "offloaded_base": "offloaded base",
    "offloaded_states": "offloaded fp32 masters, gradients, moments, and what the update takes",
    "checkpoint_copy": "copies of what learns, from which checkpoints are uploaded",
    "base_gathers": "the frozen base, gathered layer by layer",
    "adapter_gathers": "what learns, gathered",
    "adapter_gradients": "its gradients, reduced",
    "from_other_nodes": "of all this, from other nodes",
    "total": "total",
}


def meaning(part: str) -> str:
    """A part of the plan's bytes in words."""
    return _MEANING.get(part, part.replace("_", " "))


def plan_table(plan: Plan) -> Group:
    """Parameters and batch, then a table of bytes for each of GPU, host and network."""
    facts = Table("run", "")
    facts.add_row("device of a rank", {"gpu": "a GPU", "cpu": "the CPU (cluster.gpus_per_worker: 0)"}[plan.device])
    for name, value in (*asdict(plan.parameters).items(), *asdict(plan.batch).items()):
        facts.add_row(
            f"{name.replace('_', ' ')} {'parameters' if name in asdict(plan.parameters) else ''}".strip(), f"{value:,}"
        )
    facts.add_row("bytes of a checkpoint", decimal(plan.checkpoint_bytes))
    for part in plan.left_out:
        facts.add_row(f"left out: {part.path}", f"{part.tensors} tensors, {part.weights:,} weights")
    parts = (
        ("memory of one GPU" if plan.device == "gpu" else "memory of one rank", plan.memory_per_gpu),
        ("memory of one host", plan.memory_per_host),
        ("received by one rank in a step", plan.traffic_per_step),
    )
    tables = []
    for title, part in parts:
        table = Table(title, "bytes")
        for name, value in asdict(part).items():
            table.add_row(meaning(name), decimal(value))
        tables.append(table)
    return Group(facts, *tables)
