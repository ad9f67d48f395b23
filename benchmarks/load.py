"""Memory and time of loading a 4-bit base on several ranks: ours beside transformers + bitsandbytes + DeepSpeed.

    python benchmarks/load.py [--ranks 1 2 4] [--layers 20] [--sides stock ours fp8 mxfp4]

"stock" and "ours" load the same random bf16 base, made on the spot, and put it with LoRA into ZeRO-3, one after the
other on this machine; "fp8" and "mxfp4" are ours with the same base in FP8, and with a gpt-oss whose experts are as
large as the real ones. The parent measures its ranks from outside, by what the kernel counts of each process: the peak
of its resident memory (VmHWM, which includes pages of files that are mapped) above what was resident when its imports
were done, and the bytes that it read from files by system calls (rchar). The stock side maps the files instead of
reading them.

"allowed" is what our load may take: 1.3 x the rank's share of the base, and the pieces that are read ahead; and, of
what is decoded, the bytes as they are stored: of FP8 half as many again, of MXFP4 two experts that are kept and one
that is read, twice while it is handed over.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import become_rank, rendezvous
from rich.console import Console
from rich.table import Table

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
EXPERTS, EXPERT_WIDTH = 8, 2880
TIMEOUT = 900.0
# The sides -> how their base is stored, and the bytes beside a load's share and the pieces that are read ahead.
SIDES = {
    "stock": ("bf16", 0),
    "ours": ("bf16", 0),
    "fp8": ("fp8", 16 * 2**20),
    "mxfp4": ("mxfp4", 4 * 2 * EXPERT_WIDTH**2 * 17 // 32),
}


def make_base(folder: Path, layers: int, hidden: int = HIDDEN, vocabulary: int = VOCABULARY) -> int:
    """A random Llama-like base in several safetensors files; its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * INTERMEDIATE // HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=vocabulary,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return model.num_parameters()


def make_stored_base(folder: Path, stored: str, layers: int) -> int:
    """The same in FP8, or a gpt-oss in MXFP4 with a sixth of the layers; all random, as published files have them."""
    if stored == "bf16":
        return make_base(folder, layers)
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "num_attention_heads": 16, "num_key_value_heads": 4}
    if stored == "fp8":
        sizes |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers}
        config, how = AutoConfig.for_model("llama", **sizes), {"quant_method": "fp8", "weight_block_size": [128, 128]}
    else:
        sizes |= {
            "hidden_size": EXPERT_WIDTH,
            "intermediate_size": EXPERT_WIDTH,
            "num_hidden_layers": max(1, layers // 6),
        }
        config, how = AutoConfig.for_model("gpt_oss", **sizes, num_local_experts=EXPERTS), {"quant_method": "mxfp4"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if weight.ndim == 3:
            shape = (EXPERTS, weight.shape[2], weight.shape[1] // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full(shape, 121, dtype=torch.uint8)
        elif stored == "fp8" and "proj" in name:
            rows, columns = weight.shape
            tensors[name] = torch.randint(0, 120, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((-(-rows // 128), -(-columns // 128)), 1e-4)
        else:
            tensors[name] = torch.empty(weight.shape, dtype=torch.bfloat16).normal_(std=0.02)
    folder.mkdir()
    save_torch_state_dict(tensors, folder, max_shard_size="500MB")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": how}))
    return model.num_parameters()


def load_ours(base: Path, settings: dict[str, Any], ranks: Any, loaded: Callable[[int], None]) -> None:
    from trainer.base.find.locate import resolve_base
    from trainer.base.load.load import DTYPES, load_model
    from trainer.model.attention import choose_attention
    from trainer.model.packed import PackedModel
    from trainer.state.zero.engine import Engine
    from trainer.tuning.method import method_of
    from trainer.tuning.objective.sft import NextTokens

    config = run_config(base)
    found = resolve_base(config.model)
    attention = choose_attention("auto", ranks.device, DTYPES["bf16"], found.architecture.attention_needs)
    model, report = load_model(found, config, settings, ranks.world, attention, "world")
    method = method_of(config)
    method.attach(model, found.architecture, DTYPES["bf16"], seed=0)
    loaded(report.kept_bytes)
    groups = method.groups(model, config.optim)
    Engine(PackedModel(model, attention), NextTokens().loss, groups, config.optim, settings, ranks)


def load_stock(base: Path, settings: dict[str, Any], ranks: Any, loaded: Callable[[int], None]) -> None:
    import deepspeed
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from trainer.tuning.lora import METHODS

    deepspeed.init_distributed(verbose=False)
    keep = HfDeepSpeedConfig(settings)  # transformers looks for a live one to know of ZeRO-3
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    adapted = get_peft_model(model, METHODS["lora"](run_config(base).tuning).adapting("all-linear"))
    loaded(sum(parameter.nbytes for parameter in model.parameters()))
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    deepspeed.initialize(model=adapted, optimizer=torch.optim.AdamW(trainable), config=settings)
    del keep


def run_config(base: Path) -> Any:
    from trainer.config import parse_config

    tree = {
        "run": {"name": "bench"},
        "model": {"base": str(base)},
        "data": {"train": [{"path": "none.jsonl"}]},
        "train": {"steps": 1},
    }
    return parse_config(json.dumps(tree))


def rank_main(side: str, base: Path, rank: int, world: int, port: int, parent: Any) -> None:
    """One rank. It waits for the parent, which looks at it, before the load, after it and with the engine made."""
    become_rank(rank, world, port)
    import deepspeed
    import torch
    import transformers.models.llama.modeling_llama

    import trainer.rank
    from trainer.processes.ranks import join
    from trainer.state.zero.policy import build_deepspeed_config

    # Both sides import the same stack before they are measured.
    assert (trainer.rank, transformers.models.llama.modeling_llama) is not None
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]  # no side's seconds include a compiler's
    ranks = join()
    settings = build_deepspeed_config(run_config(base), world_size=world, accumulation=1, on_gpu=False)

    def show(value: int) -> None:
        parent.send(value)
        parent.recv()

    show(0)
    load = load_stock if side == "stock" else load_ours
    load(base, settings, ranks, show)
    show(0)


def resident(pid: int, what: str) -> int:
    """VmRSS or VmHWM of a process, in bytes."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def read_bytes(pid: int) -> int:
    """Bytes that a process has read by system calls."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["rchar"])


def measure(side: str, base: Path, world: int, port: int) -> dict[str, float]:
    """Bytes of the largest rank (`load`, `engine`, `kept`) and of all (`read`), and seconds of the load and with the
    engine.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = context.Pipe()
        arguments = (side, base, rank, world, port, theirs)
        processes.append(context.Process(target=rank_main, args=arguments, daemon=True))
        pipes.append(mine)

    def everyone() -> list[int]:
        """The numbers that the ranks show, one from each, once all have shown theirs."""
        if not all(pipe.poll(TIMEOUT) for pipe in pipes):
            raise TimeoutError(f"a rank of {side} did not answer within {TIMEOUT:.0f} s")
        return [pipe.recv() for pipe in pipes]

    def go_on() -> None:
        for pipe in pipes:
            pipe.send(None)

    try:
        for process in processes:
            process.start()
        everyone()
        pids = [process.pid for process in processes if process.pid]
        before, read = [resident(pid, "VmRSS") for pid in pids], [read_bytes(pid) for pid in pids]
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts again from here
        started = time.monotonic()
        go_on()
        kept, load_seconds = everyone(), time.monotonic() - started
        result: dict[str, float] = {
            "load": max(resident(pid, "VmHWM") - start for pid, start in zip(pids, before, strict=True)),
            "read": sum(read_bytes(pid) - start for pid, start in zip(pids, read, strict=True)),
            "kept": max(kept),
            "load_seconds": load_seconds,
        }
        started = time.monotonic()
        go_on()
        everyone()
        result["seconds"] = load_seconds + time.monotonic() - started
        result["engine"] = max(resident(pid, "VmHWM") - start for pid, start in zip(pids, before, strict=True))
        return result
    finally:
        for process in processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    arguments = parser.parse_args()
    from trainer.base.partitions.reading import PIECE_BYTES, PIECES_IN_FLIGHT

    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder:
        table = Table(
            "ranks", "load", "base", "kept a rank, MB", "allowed, MB", "peak of the load, MB", "with the engine, MB",
            "read by all / files", "load, s", "with the engine, s",
            title="peaks are of the largest rank",
            caption=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        )  # fmt: skip
        bases: dict[str, tuple[Path, str, int]] = {}
        for stored in dict.fromkeys(SIDES[side][0] for side in arguments.sides):
            base = Path(folder) / stored
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                parameters = pool.apply(make_stored_base, (base, stored, arguments.layers))
            files = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            bases[stored] = base, f"{parameters / 1e6:.0f} M, {files / 1e6:.0f} MB of {stored}", files
        for world in arguments.ranks:
            for side in arguments.sides:
                stored, beside = SIDES[side]
                base, name, files = bases[stored]
                with rendezvous() as port:
                    found = measure(side, base, world, port)
                allowed = 1.3 * found["kept"] + PIECE_BYTES * PIECES_IN_FLIGHT + beside
                table.add_row(
                    str(world),
                    side,
                    name,
                    f"{found['kept'] / 1e6:.0f}",
                    "" if side == "stock" else f"{allowed / 1e6:.0f}",
                    f"{found['load'] / 1e6:.0f}",
                    f"{found['engine'] / 1e6:.0f}",
                    "mapped, whole, by each" if side == "stock" else f"{found['read'] / files:.2f}",
                    f"{found['load_seconds']:.1f}",
                    f"{found['seconds']:.1f}",
                )
        Console(width=180).print(table)


if __name__ == "__main__":
    main()
