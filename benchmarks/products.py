"""What `train.products: fp8` costs in accuracy: LoRA over NF4 by FP8 products beside plain ones, and beside another
seed.

    python benchmarks/products.py [--base llama mixture] [--steps 200] [--pretrain 300]

A tiny Llama, and a tiny mixture with adapters on its experts, that has read some of the source code of Python's standard library learns other parts of it, by the
product's own layers, in bf16, in one process: two minutes of a core for each. CPUs compute FP8 products by the rules of GPUs, so
that a GPU's losses differ by the order of its sums alone. Runs of one seed begin with the same adapter and see the same
rows in the same order. Two runs are apart by their curves, the mean distance between their losses over tenths of the
steps, and by the loss on rows that were held out. The script fails unless FP8 is nearer to plain products, by both,
than two of three seeds are to each other, and unless a control is further: FP8 products where each row is multiplied by the
scale of the row before it.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from launcher.smoke.sample import source_code, source_files  # noqa: E402
from trainer.model import experts  # noqa: E402
from trainer.model.held.blockwise import quantize_blocks  # noqa: E402
from trainer.model.held.formats.blocks import Blocks  # noqa: E402
from trainer.model.held.layers import HeldLinear, HeldStack, multiply_in_fp8  # noqa: E402
from trainer.model.kernels import fp8  # noqa: E402
from trainer.model.parts import is_experts  # noqa: E402
from trainer.tuning.experts.layer import ExpertLora  # noqa: E402

ROW, BATCH, HELD_OUT, RANK = 64, 4, 64, 8  # tokens, which are bytes; rows


def rows_of(files: int, skipped: int) -> Tensor:
    """(rows, ROW) int64, of so many modules behind so many."""
    text = b"".join(source_code(file).encode() for file in islice(source_files(), skipped, skipped + files))
    return torch.tensor(list(text[: len(text) // ROW * ROW])).view(-1, ROW)


def pretrained(kind: str, rows: Tensor, steps: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes))
    else:
        sizes |= {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=256, num_key_value_heads=2, norm_topk_prob=True, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss_of(model, rows[torch.randint(len(rows), (4 * BATCH,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model: Any, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def adapted(base: Any, *, eight_bits: bool) -> Any:
    """The base with its layers' weights in NF4, and LoRA on all of them, by the product's layers."""
    from peft import LoraConfig, inject_adapter_in_model

    from trainer.tuning.lora.layer import LoraLinear

    model = copy.deepcopy(base).to(torch.bfloat16)
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    for name in names:
        model.set_submodule(name, _packed(model.get_submodule(name)))
    model.config._experts_implementation = experts.IMPLEMENTATION
    experts.prepare_experts(model)
    stacks = [
        _stack(part, name) for part in model.modules() if is_experts(part) for name in ("gate_up_proj", "down_proj")
    ]
    if eight_bits:
        counts = len(names), len(names), len(stacks), len(stacks)
        assert multiply_in_fp8(model, torch.device("cpu")) == counts
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names)
    config._register_custom_module({nn.Linear: LoraLinear})
    inject_adapter_in_model(config, model, adapter_name="default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _packed(linear: nn.Linear) -> HeldLinear:
    packed = HeldLinear(linear.in_features, linear.out_features, Blocks("nf4", 64, double=False), dtype=torch.bfloat16)
    weight, absmax = quantize_blocks(linear.weight.detach().flatten(), "nf4", 64)
    packed.weight = nn.Parameter(weight, requires_grad=False)
    packed.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
    return packed


def _stack(module: Any, name: str) -> HeldStack:
    """Put the experts' weights into NF4, with an adapter."""
    weights = getattr(module, name).detach()
    count, rows, columns = weights.shape
    stack = HeldStack((count, rows, columns), Blocks("nf4", 64, double=False), torch.bfloat16)
    weight, absmax = quantize_blocks(weights.flatten(), "nf4", 64)
    stack.weight = nn.Parameter(weight, requires_grad=False)
    stack.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
    delattr(module, name)
    module.add_module(name, stack)
    down = torch.randn(count, RANK, columns) / columns**0.5
    module.adapters[name] = ExpertLora(down, torch.zeros(count, rows, RANK), 2.0, swapped=False)
    return stack


class Found(NamedTuple):
    """A run's losses by step, and that on rows that were held out at its end, in nats a byte."""

    steps: list[float]
    held_out: float

    @property
    def curve(self) -> list[float]:
        """The mean losses of tenths of the steps."""
        tenth = len(self.steps) // 10
        return [mean(self.steps[at : at + tenth]) for at in range(0, 10 * tenth, tenth)]

    def apart(self, other: "Found") -> tuple[float, float]:
        """The mean distance of two curves, and that of the losses on the rows that were held out."""
        curves = zip(self.curve, other.curve, strict=True)
        return mean(abs(one - another) for one, another in curves), abs(self.held_out - other.held_out)


def run(base: Any, rows: Tensor, steps: int, seed: int, *, eight_bits: bool) -> Found:
    torch.manual_seed(seed)
    model, losses = adapted(base, eight_bits=eight_bits), list[float]()
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
        losses.append(loss.item())
    with torch.no_grad():
        return Found(losses, loss_of(model, rows[:HELD_OUT]).item())


@contextmanager
def misplaced_scales() -> Iterator[None]:
    """FP8 products that multiply each row by the scale of the row before it."""
    scaled: Callable[[Tensor], tuple[Tensor, Tensor]] = fp8._scaled

    def misplaced(rows: Tensor) -> tuple[Tensor, Tensor]:
        values, scales = scaled(rows)
        return values, scales.roll(1, -2)

    with patch.object(fp8, "_scaled", misplaced):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=["llama", "mixture"], default=["llama", "mixture"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretrain", type=int, default=300, help="steps in which the base reads")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind in given.base:
        # Of so few tokens an expert of the product would multiply plainly.
        with patch.object(experts, "FP8_ROWS_EACH", 0):
            compare(pretrained(kind, rows_of(12, 0), given.pretrain), rows_of(12, 12), given.steps)


def compare(base: Any, rows: Tensor, steps: int) -> None:
    print("| products | seed | first | last tenth | held out | from | curves apart | held out apart |\n|" + 8 * "---|")

    def table(name: str, seed: int, beside: Found | None, whose: str = "plain, same seed") -> Found:
        found = run(base, rows, steps, seed, eight_bits=name != "plain")
        distance = f"{whose} | {' | '.join(f'{one:.4f}' for one in found.apart(beside))}" if beside else "| |"
        print(f"| {name} | {seed} | {found.steps[0]:.4f} | {found.curve[-1]:.4f} | {found.held_out:.4f} | {distance} |")
        sys.stdout.flush()
        return found

    first = table("plain", 0, None)
    seeds = [first, *(table("plain", seed, first, "plain, seed 0") for seed in (1, 2))]
    apart = [one.apart(other) for one, other in combinations(seeds, 2)]
    noise = max(curves for curves, _ in apart), max(held_out for _, held_out in apart)
    near = [table("fp8", seed, plain).apart(plain) for seed, plain in enumerate(seeds[:2])]
    with misplaced_scales():
        wrong = table("fp8, misplaced scales", 0, first).apart(first)
    if any(ours >= allowed for distance in near for ours, allowed in zip(distance, noise, strict=True)):
        raise SystemExit("FP8 products cost more than another seed does")
    if any(control <= allowed for control, allowed in zip(wrong, noise, strict=True)):
        raise SystemExit("the control was not noticed")


if __name__ == "__main__":
    main()
