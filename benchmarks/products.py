"""What `train.products: fp8` costs in accuracy: LoRA over NF4 by FP8 products beside plain ones, and beside another seed.

    python benchmarks/products.py [--steps 200] [--pretrain 200] [--seeds 0 1]

A small Llama that has read some of the source code of Python's standard library learns other parts of it, by the product's own layers, in bf16, in
one process. CPUs compute FP8 products by the rules of GPUs, so that a GPU's losses differ by the order of its sums alone. Runs of one seed see
the same rows in the same order. `apart` is how far the loss of a step is from that of plain products, on average; `noise` is how far two seeds
are apart over the last quarter and on rows that were held out. The script fails unless FP8 stays within that.
"""

import argparse
import copy
import sys
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from launcher.smoke.stdlib_docs import source_code, source_files  # noqa: E402
from trainer.model.nf4 import Format, FrozenLinear4bit, multiply_in_fp8, quantize_blocks  # noqa: E402

ROW, BATCH, HELD_OUT, RANK = 128, 8, 16, 8  # tokens, which are bytes; rows


def rows_of(files: int, skipped: int) -> Tensor:
    """(rows, ROW) int64, of so many modules behind so many."""
    text = b"".join(source_code(file).encode() for file in islice(source_files(), skipped, skipped + files))
    return torch.tensor(list(text[: len(text) // ROW * ROW])).view(-1, ROW)


def pretrained(rows: Tensor, steps: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss_of(model, rows[torch.randint(len(rows), (BATCH,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def adapted(base: Any, *, fp8: bool) -> Any:
    """The base with its layers' weights in NF4, and LoRA on all of them, by the product's layers."""
    from peft import LoraConfig, inject_adapter_in_model

    from trainer.tuning.lora.layer import LoraLinear

    model = copy.deepcopy(base).to(torch.bfloat16)
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    for name in names:
        model.set_submodule(name, _packed(model.get_submodule(name)))
    if fp8:
        assert multiply_in_fp8(model, torch.device("cpu")) == (len(names), len(names))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    config._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(config, model, adapter_name="default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _packed(linear: nn.Linear) -> FrozenLinear4bit:
    packed = FrozenLinear4bit(
        linear.in_features, linear.out_features, Format("nf4", 64, double=False, dtype=torch.bfloat16)
    )
    weight, absmax = quantize_blocks(linear.weight.detach().flatten(), "nf4", 64)
    packed.weight = nn.Parameter(weight, requires_grad=False)
    packed.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
    return packed


class Found(NamedTuple):
    """A run's losses by step, and that on rows that were held out at its end, in nats a byte."""

    steps: list[float]
    held_out: float

    @property
    def last(self) -> float:
        return mean(self.steps[-len(self.steps) // 4 :])


def run(base: Any, rows: Tensor, steps: int, seed: int, *, fp8: bool) -> Found:
    torch.manual_seed(seed)
    model, losses = adapted(base, fp8=fp8), list[float]()
    masters = {part: part.detach().float() for part in model.parameters() if part.requires_grad}
    optimizer = torch.optim.AdamW(masters.values(), lr=2e-3)
    for _ in range(steps):
        loss = loss_of(model, rows[HELD_OUT:][torch.randint(len(rows) - HELD_OUT, (BATCH,))])
        loss.backward()
        for part, master in masters.items():
            master.grad, part.grad = part.grad.float(), None
        optimizer.step()
        for part, master in masters.items():
            part.data.copy_(master)
        losses.append(float(loss))
    with torch.no_grad():
        return Found(losses, float(loss_of(model, rows[:HELD_OUT])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretrain", type=int, default=200, help="steps in which the base reads")
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1])
    given = parser.parse_args()
    torch.set_num_threads(1)
    base, rows = pretrained(rows_of(12, 0), given.pretrain), rows_of(12, 12)
    found = dict[tuple[str, int], Found]()
    print(
        "| products | seed | first | last quarter | held out | apart, a step |\n|---|---|---|---|---|---|", flush=True
    )
    for name in ("plain", "fp8"):
        for seed in given.seeds:
            one = found[name, seed] = run(base, rows, given.steps, seed, fp8=name == "fp8")
            apart = mean(abs(a - b) for a, b in zip(one.steps, found["plain", seed].steps, strict=True))
            print(
                f"| {name} | {seed} | {one.steps[0]:.4f} | {one.last:.4f} | {one.held_out:.4f} | {apart:.4f} |",
                flush=True,
            )
    first, second = given.seeds
    noise, wide = list[float](), list[float]()
    for part in ("last", "held_out"):
        of = {key: float(getattr(one, part)) for key, one in found.items()}
        noise.append(abs(of["plain", first] - of["plain", second]))
        wide.append(max(abs(of["fp8", seed] - of["plain", seed]) for seed in given.seeds))
    print(f"fp8 from plain at most {wide[0]:.4f} and {wide[1]:.4f} nats, two seeds {noise[0]:.4f} and {noise[1]:.4f}")
    if any(one > other for one, other in zip(wide, noise, strict=True)):
        raise SystemExit("FP8 products cost more than another seed does")


if __name__ == "__main__":
    main()
