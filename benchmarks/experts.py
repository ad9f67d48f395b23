"""A mixture's experts, forward and backward: ours over 4 bits beside transformers' own over 16- or 32-bit weights.

    python benchmarks/experts.py [--experts 64] [--top 8] [--tokens 512] [--hidden 256] [--inner 128] [--rank 8] [--dtype fp32]

Experts of Qwen3-MoE with random weights, by themselves, on one thread. `one matrix at a time` is what Capstan did
before: transformers' eager forward pass, which asks the host for each expert, over matrices that are dequantized one by
one. PEFT adds B @ A of all experts to their weights before it multiplies. A wait is a number or a list that the host
asks for: with a GPU it waits until that has come so far. Times are those of the process on its core, the best of
several, the sides in turn, as a machine is rarely idle.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from trainer.base.load.load import DTYPES
from trainer.model import experts
from trainer.model.held.blockwise import quantize_blocks
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldStack
from trainer.tuning.experts.layer import ExpertLora

STACKS = ("gate_up_proj", "down_proj")
SCALING = 2.0
WAITS = ("_local_scalar_dense", "nonzero")


class Counter(TorchDispatchMode):
    """Operators called, and how often the host waits. A list is one wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.waits = 0

    def __enter__(self) -> "Counter":
        self._tolist: Callable[[Tensor], Any] = Tensor.tolist
        Tensor.tolist = lambda tensor: self._listed(tensor)  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*raised)

    def _listed(self, tensor: Tensor) -> Any:
        self.waits += 1
        return self._tolist(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.waits += function.overloadpacket.__name__ in WAITS
        return function(*args, **(kwargs or {}))


class OneAtATime(nn.Module):
    """A stack whose `[i]` is matrix i, dequantized for the product in which it stands."""

    def __init__(self, stack: HeldStack) -> None:
        super().__init__()
        self.stack = stack

    def __getitem__(self, index: Tensor) -> "_Matrix":
        return _Matrix(self.stack, int(index))


class _Matrix:
    def __init__(self, stack: HeldStack, index: int) -> None:
        self.stack, self.index = stack, index

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        rows, matrix = args
        return _Product.apply(rows, matrix.stack, matrix.index)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: HeldStack, index: int) -> Tensor:
        ctx.stack, ctx.index = stack, index
        return rows @ stack.matrices(index, index + 1)[0].T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad @ ctx.stack.matrices(ctx.index, ctx.index + 1)[0], None, None


def built(given: argparse.Namespace, implementation: str) -> Any:
    """The experts with weights of the given type, the same every time."""
    sizes = {"num_experts": given.experts, "hidden_size": given.hidden, "moe_intermediate_size": given.inner}
    config = AutoConfig.for_model("qwen3_moe", **sizes)
    config._experts_implementation = implementation
    made: Any = Qwen3MoeExperts(config)
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.to(DTYPES[given.dtype]).requires_grad_(False)


def packed(given: argparse.Namespace, implementation: str, wrapped: Callable[[HeldStack], nn.Module]) -> Any:
    """The same over 4 bits."""
    made = built(given, implementation)
    experts.prepare_experts(made)
    for name in STACKS:
        weight = getattr(made, name).data
        count, rows, columns = weight.shape
        stack = HeldStack((count, rows, columns), Blocks("nf4", 64, False), weight.dtype)
        parts = [quantize_blocks(matrix.flatten(), "nf4", 64) for matrix in weight]
        stack.weight = nn.Parameter(torch.cat([part for part, _ in parts]), requires_grad=False)
        stack.absmax = nn.Parameter(torch.cat([scale for _, scale in parts]).view(torch.uint8), requires_grad=False)
        delattr(made, name)
        made.add_module(name, wrapped(stack))
    return made


def with_lora(made: Any, given: argparse.Namespace) -> Any:
    for name in STACKS:
        rows, columns = getattr(made, name).slice_shape
        dtype = DTYPES[given.dtype]
        a = torch.randn(given.experts, given.rank, columns).div(columns**0.5).to(dtype)
        b = torch.zeros(given.experts, rows, given.rank, dtype=dtype)
        made.adapters[name] = ExpertLora(a, b, SCALING, swapped=False)
    return made


def with_peft(made: Any, given: argparse.Namespace) -> Any:
    targets = [f"experts.{name}" for name in STACKS]
    lora = LoraConfig(r=given.rank, lora_alpha=int(SCALING * given.rank), target_modules=[], target_parameters=targets)
    adapted: Any = inject_adapter_in_model(lora, nn.ModuleDict({"experts": made}))
    return adapted["experts"]


def sides(given: argparse.Namespace) -> dict[str, Any]:
    """What a row of the table is called -> the experts."""
    bits = "bf16" if given.dtype == "bf16" else "fp32"
    plain = experts.IMPLEMENTATION
    return {
        "ours, nf4": packed(given, plain, lambda stack: stack),
        "ours, nf4, in four portions": packed(given, plain, lambda stack: stack),
        "one matrix at a time, nf4": packed(given, "eager", OneAtATime),
        f"transformers eager, {bits}": built(given, "eager"),
        f"transformers grouped_mm, {bits}": built(given, "grouped_mm"),
        "ours with LoRA, nf4": with_lora(packed(given, plain, lambda stack: stack), given),
        f"transformers grouped_mm with PEFT, {bits}": with_peft(built(given, "grouped_mm"), given),
    }


def passes(made: Any, given: argparse.Namespace) -> None:
    """Forward and backward of the same tokens."""
    torch.manual_seed(1)
    tokens = torch.randn(given.tokens, given.hidden, dtype=DTYPES[given.dtype], requires_grad=True)
    weights, index = torch.randn(given.tokens, given.experts).softmax(-1).topk(given.top)
    made(tokens, index, weights.to(tokens.dtype)).float().square().sum().backward()


def measure(given: argparse.Namespace) -> dict[str, tuple[float, Counter]]:
    whole = HeldStack.at_once
    portion = given.experts // 4 * 2 * given.hidden * given.inner * DTYPES[given.dtype].itemsize
    made, taken, counters = sides(given), dict[str, list[float]](), dict[str, Counter]()
    for _ in range(given.repeats):
        for name, side in made.items():
            HeldStack.at_once = portion if "portions" in name else whole
            started = time.process_time()
            passes(side, given)
            taken.setdefault(name, []).append(time.process_time() - started)
    for name, side in made.items():
        HeldStack.at_once = portion if "portions" in name else whole
        with Counter() as counters[name]:
            passes(side, given)
    return {name: (min(times), counters[name]) for name, times in taken.items()}


def show(found: dict[str, tuple[float, Counter]], given: argparse.Namespace) -> None:
    table = Table(
        "experts", "CPU ms", "of ours", "operators", "host waits",
        title=f"{given.experts} experts, top {given.top}, {given.tokens} tokens, {given.hidden} x {given.inner}, {given.dtype}, "
        f"LoRA of rank {given.rank}",
        caption=f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}",
    )  # fmt: skip
    ours = next(iter(found.values()))[0]
    for name, (seconds, counter) in found.items():
        table.add_row(
            name, f"{1e3 * seconds:.0f}", f"{seconds / ours:.2f}", f"{counter.operators:,}", f"{counter.waits:,}"
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"experts": 64, "top": 8, "tokens": 512, "hidden": 256, "inner": 128, "rank": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    show(measure(given), given)


if __name__ == "__main__":
    main()
