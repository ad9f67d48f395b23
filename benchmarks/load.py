"""Memory and time of loading a 4-bit base on several ranks: ours beside transformers + bitsandbytes + DeepSpeed.

    python benchmarks/load.py [--ranks 2] [--layers 8]

Both sides load the same random bf16 base, made on the spot, into ZeRO-3 with LoRA, one after the other on this machine.
Memory is each process's peak resident set as the kernel counts it (VmHWM), above its own peak after its imports. Ours
reports the bytes it read from the files; the stock side reads whole files through mmap, which counts as resident.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000


def make_base(folder: Path, layers: int) -> int:
    """A random Llama-like base in several safetensors files; its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return model.num_parameters()


def load_ours(base: Path, settings: dict[str, Any], ranks: Any) -> dict[str, Any]:
    from trainer.attention import choose_attention
    from trainer.base import resolve_base
    from trainer.engine import Engine
    from trainer.load import DTYPES, load_model

    config = run_config(base)
    found = resolve_base(config.model)
    attention = choose_attention("sdpa", ranks.device, DTYPES["bf16"], found.config)
    model, report = load_model(found, config, settings, ranks, attention)
    Engine(model, attention, config.optim, settings, ranks)
    return {"read_bytes": report.read_bytes, "shard_bytes": report.kept_bytes}


def load_stock(base: Path, settings: dict[str, Any], ranks: Any) -> dict[str, Any]:
    import deepspeed
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from trainer.load import lora_config

    deepspeed.init_distributed(verbose=False)
    keep = HfDeepSpeedConfig(settings)  # transformers looks for a live one to know of ZeRO-3
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    adapted = get_peft_model(model, lora_config(run_config(base).tuning, "all-linear"))
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    deepspeed.initialize(model=adapted, optimizer=torch.optim.AdamW(trainable), config=settings)
    del keep
    return {}


def run_config(base: Path) -> Any:
    from trainer.config import parse_config

    tree = {
        "run": {"name": "bench"},
        "model": {"base": str(base)},
        "data": {"train": [{"path": "none.jsonl"}]},
        "train": {"steps": 1},
    }
    return parse_config(json.dumps(tree))


def rank_main(side: str, base: Path, rank: int, world: int, port: int, results: Any) -> None:
    """One rank: imports, then the load; reports its peaks, in bytes, and seconds."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import deepspeed
    import torch

    import trainer.rank
    from trainer.deepspeed_config import build_deepspeed_config
    from trainer.ranks import join

    assert trainer.rank is not None  # both sides import the same stack before they are measured
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]  # no side's seconds include a compiler's
    ranks = join()
    settings = build_deepspeed_config(run_config(base), world_size=world, accumulation=1, on_gpu=False)
    before, started = peak_bytes(), time.monotonic()
    report = {"ours": load_ours, "stock": load_stock}[side](base, settings, ranks)
    seconds = time.monotonic() - started
    results.put({"grown_bytes": peak_bytes() - before, "seconds": seconds, **report})


def peak_bytes() -> int:
    """Peak resident memory of this process, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def measure(side: str, base: Path, world: int) -> list[dict[str, Any]]:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    rendezvous = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=rank_main, args=(side, base, rank, world, rendezvous.port, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        return [results.get(timeout=900) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder:
        base = Path(folder) / "base"
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            parameters = pool.apply(make_base, (base, arguments.layers))
        files = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        table = Table(
            "load", "memory a rank, MB", "seconds", "read by all, MB", "shard a rank, MB",
            title=f"{parameters / 1e6:.0f} M parameters, {files / 1e6:.0f} MB of bf16 files, {arguments.ranks} ranks",
            caption=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        )  # fmt: skip
        for side in ("stock", "ours"):
            rows = measure(side, base, arguments.ranks)
            read, shard = (sum(row.get(key, 0) for row in rows) for key in ("read_bytes", "shard_bytes"))
            table.add_row(
                side,
                f"{max(row['grown_bytes'] for row in rows) / 1e6:.0f}",
                f"{max(row['seconds'] for row in rows):.1f}",
                f"{read / 1e6:.0f}" if read else "mmap",
                f"{shard / len(rows) / 1e6:.0f}" if shard else "whole base, then partitioned",
            )
        Console().print(table)


if __name__ == "__main__":
    main()
