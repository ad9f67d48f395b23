"""Full fine-tuning of a base of 100 M parameters on several ranks, beside transformers and torch's AdamW in one
process.

    python benchmarks/full.py [--ranks 2] [--steps 20] [--layers 12]

Both sides train the same random base on the same short rows in fp32. Ours is a whole run, from the load to the last
commit; its memory is the peak of a rank's resident memory (VmHWM) above what was resident after the imports, while
glibc returns at once what is freed, as CUDA's allocator would reuse it. The script fails where a bound of the table
does not hold.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the ranks that the tests share

from launcher.view.status import read_generation
from tests.dist import full, memory
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config
from trainer.export.write.adapter import export_adapter
from trainer.plan.needs import Plan
from trainer.plan.plan import make_plan
from trainer.run import layout
from trainer.state.checkpoint.learnt_weights import master_weights
from trainer.state.checkpoint.manifest import read_manifest
from trainer.store.store import Store, open_store

SIZES: dict[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "initializer_range": 0.02,
}
TIMEOUT = 1800.0
MEMORY_BOUND, LOSS_BOUND = 0.1, 1e-3


def planned_memory(plan: Plan, ranks: int) -> int:
    """Bytes of one CPU rank: its part of the host's memory is that of its checkpoints, and it has no GPU's context."""
    return plan.memory_per_gpu.total - plan.memory_per_gpu.context + plan.memory_per_host.checkpoint_copy // ranks


def differing_weights(run: Store, folder: Path) -> int:
    """Weights of the exported model, as transformers loads it, that are not the trained ones cast to its type."""
    masters = master_weights(run, export_adapter(run, open_store(str(folder))))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    stored = dict(model.named_parameters())
    assert stored.keys() == masters.keys()
    return sum(int((stored[name] != values.to(stored[name].dtype)).sum()) for name, values in masters.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        workshop = Workshop(folder, shard_size="100MB", num_hidden_layers=arguments.layers, **SIZES)
        config = workshop.config(
            "full", "tuning.method=full", "tuning.rank=16", "tuning.alpha=32", "quant.type=none", "model.dtype=fp32",
            "optim.lr=1e-4", "optim.weight_decay=0.1", f"train.steps={arguments.steps}", "checkpoint.every_steps=10",
            "sharding.deepspeed=cpu", "cluster.gpus_per_worker=0",
        )  # fmt: skip
        run = workshop.store.sub(config.run.name)
        run.put(layout.CONFIG, dump_config(config).encode())  # as the launcher does before any rank starts
        fingerprint = workshop.prepare(config).train
        plan = make_plan(config, resolve_base(config.model).description, arguments.ranks, arguments.ranks, None)
        (stock,) = launch(1, full.plain_losses, dump_config(config), fingerprint, timeout=TIMEOUT)
        began = time.monotonic()
        grown = max(launch(arguments.ranks, memory.run_memory, dump_config(config), fingerprint, timeout=TIMEOUT))
        seconds = time.monotonic() - began
        records = read_generation(run, 1)
        ours = [record["loss"] for record in records["step"]]
        step = sorted(record["seconds"] for record in records["step"])[len(ours) // 2]
        stalls = [1e3 * record["stall_seconds"] for record in records["commit"]]
        size = read_manifest(run, arguments.steps).size
        differing = differing_weights(run, folder / "model")
    gap = max(abs(one - other) for one, other in zip(ours, stock, strict=True))
    planned = planned_memory(plan, arguments.ranks)
    rows = (
        ("loss of the first and the last step, nats", f"{ours[0]:.4f}, {ours[-1]:.4f}", ""),
        ("largest difference of a step's loss", f"{gap:.1e}", f"{LOSS_BOUND:.0e}"),
        ("memory of the largest rank, MB", f"{grown / 1e6:.0f}", f"{planned / 1e6:.0f} by plan, within 10 %"),
        ("first stall of a save, and the others', ms", ", ".join(f"{stall:.0f}" for stall in stalls), ""),
        ("checkpoint, MB", f"{size / 1e6:.1f}", f"{plan.checkpoint_bytes / 1e6:.1f} by plan, and headers"),
        ("weights of the export that differ from the trained ones", str(differing), "0"),
        ("a step, and the whole run, s", f"{step:.1f}, {seconds:.0f}", ""),
    )
    table = Table(
        "",
        "measured",
        "allowed",
        title=(
            f"{plan.parameters.trainable / 1e6:.1f} M parameters, {arguments.ranks} ranks, {arguments.steps} steps,"
            " fp32"
        ),
        caption=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    )
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    if gap >= LOSS_BOUND or differing or abs(grown / planned - 1) >= MEMORY_BOUND:
        raise SystemExit("a bound does not hold")


if __name__ == "__main__":
    main()
