"""The sides of benchmarks/train.py: ours, TRL's, and the matrix products of the same step. Each rank of one is a
process.

A rank says that its imports are done, then after each step what its loss was, and waits each time until the parent lets
it go on.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from ranks import become_rank


class Case(NamedTuple):
    """One comparison. `recompute` is None where both sides decide by their defaults."""

    name: str
    data: str
    recompute: bool | None
    packing: bool = False  # TRL's; ours always packs


def become(rank: int, world: int, port: int) -> None:
    """A rank on a GPU of its own where there are GPUs, else on one core."""
    from trainer.processes.devices import local_gpus

    become_rank(rank, world, port)
    if local_gpus():
        del os.environ["DS_ACCELERATOR"], os.environ["OMP_NUM_THREADS"]
    else:
        import torch

        torch.set_num_threads(1)


def report(pipe: Any, loss: float, **more: float) -> None:
    """Tell the parent that a step is over, and wait until it wants the next one."""
    import torch

    peak = 0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    pipe.send({"loss": loss, "device_bytes": peak, **more})
    pipe.recv()


def ours(rank: int, world: int, port: int, folder: Path, case: Case, pipe: Any) -> None:
    become(rank, world, port)
    from trainer.config import override, parse_config
    from trainer.data.compile.prepare import Datasets
    from trainer.rank import run_rank
    from trainer.train.start import Starter

    config = parse_config((folder / f"{case.data}.yaml").read_text())
    config = override(config, f"run.name=run-{port}")
    if case.recompute is not None:
        config = override(config, f"train.activation_checkpointing={case.recompute}")
    datasets = Datasets(json.loads((folder / f"{case.data}.json").read_text())["fingerprint"], None)
    pipe.send(None)
    pipe.recv()
    starter = Starter(observe=lambda record: report(pipe, record["loss"], mfu=record.get("mfu", 0.0)))
    run_rank(config, datasets if rank == 0 else None, resume=False, starter=starter)


def trl(rank: int, world: int, port: int, folder: Path, case: Case, pipe: Any) -> None:
    """`SFTTrainer` with PEFT's LoRA over bitsandbytes' NF4 and DeepSpeed ZeRO-3, its settings as TRL's documentation
    has them.
    """
    become(rank, world, port)
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_DEEPSPEED": "true"}
    import deepspeed
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]  # no side's seconds include a compiler's
    material = json.loads((folder / f"{case.data}.json").read_text())
    pipe.send(None)
    pipe.recv()

    class Turns(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_rest: Any) -> None:
            if logs and "loss" in logs:
                report(pipe, logs["loss"])

    zero = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": True}, **dict.fromkeys(sizes, "auto")}
    given: dict[str, Any] = {} if case.recompute is None else {"gradient_checkpointing": case.recompute}
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=material["steps"],
        per_device_train_batch_size=1 if case.packing else material["documents_a_row"],
        packing=case.packing,
        max_length=material["length"],
        train_sampling_strategy="sequential",
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=settings,
        model_init_kwargs={"dtype": "bfloat16"},
        **given,
    )
    trainer = SFTTrainer(
        str(folder / "base"),
        args=arguments,
        train_dataset=Dataset.from_list(material["rows"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        ),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[Turns()],
    )
    trainer.train()


def products(rank: int, world: int, port: int, folder: Path, case: Case, pipe: Any) -> None:
    """The matrix products of our step with nothing around them, each of its own shape: with recompute, where that is
    asked for.
    """
    become(rank, world, port)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads((folder / "base" / "config.json").read_text())
    material = json.loads((folder / f"{case.data}.json").read_text())

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    hidden, wide, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    size = config.get("head_dim") or hidden // heads
    narrow = config["num_key_value_heads"] * size
    shapes = [(heads * size, hidden), (narrow, hidden), (narrow, hidden), (hidden, heads * size)]
    shapes += [(wide, hidden), (wide, hidden), (hidden, wide)]
    weights = [(some(*shape), some(16, shape[1]), some(shape[0], 16)) for shape in shapes]
    head = some(config["vocab_size"], hidden)
    chunk = max(1, 2**28 // (4 * len(head)))
    widest = {width: some(material["length"], width) for width in {width for shape in shapes for width in shape}}
    queries = some(heads, material["length"], size)
    pipe.send(None)
    pipe.recv()

    def attention(lengths: list[int], times: int) -> None:
        """The half of the pairs of tokens that a causal attention has."""
        for length in lengths:
            keys = queries[:, : -(-length // 2)]
            for _ in range(times):
                _ = (queries[:, :length] @ keys.mT) @ keys

    def forward(entering: dict[int, torch.Tensor], lengths: list[int]) -> None:
        for weight, a, b in weights:
            x = entering[weight.shape[1]]
            _ = x @ weight.T
            _ = (x @ a.T) @ b.T
        attention(lengths, 1)

    def backward(entering: dict[int, torch.Tensor], lengths: list[int]) -> None:
        for weight, a, b in weights:
            x, gradient = entering[weight.shape[1]], entering[weight.shape[0]]
            _ = gradient @ weight
            inner = gradient @ b
            _ = gradient.T @ (x @ a.T)
            _ = inner.T @ x
            _ = inner @ a
        attention(lengths, 2)

    with torch.no_grad():
        while True:
            for row in material["ranks"][rank % len(material["ranks"])]:
                tokens = sum(row["lengths"])
                entering = {width: values[:tokens] for width, values in widest.items()}
                for _ in range(config["num_hidden_layers"]):
                    forward(entering, row["lengths"])
                for first in range(0, row["targets"], chunk):
                    _ = (entering[hidden][first : min(first + chunk, row["targets"])] @ head.T) @ head
                for _ in range(config["num_hidden_layers"]):
                    if case.recompute is not False:
                        forward(entering, row["lengths"])
                    backward(entering, row["lengths"])
                report(pipe, 0.0)


SIDES = {"ours": ours, "TRL": trl, "products": products}
