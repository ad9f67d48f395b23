"""No call of bitsandbytes gets as many numbers as its kernels cannot count, and a run that is cut has the same bits."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn

from trainer.base.architecture import Architecture, Parameter
from trainer.base.describe.meta import architecture_of
from trainer.base.find.locate import FILE
from trainer.config import Config, parse_config
from trainer.model.experts import grouped_product
from trainer.model.held import blockwise
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear, HeldStack, HeldWeights
from trainer.model.kernels.grouped import Groups
from trainer.plan.gpus import find_gpu
from trainer.plan.plan import choose_experts_at_once, choose_scope, settled

ENTRIES: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text().splitlines()]
LIMIT = 2**31  # what a C int cannot hold
FORMS = {
    "nf4": Blocks("nf4"),
    "double": Blocks("nf4", 64, True),
    "int8": Blocks("int8"),
}
STACKS = {
    "GLM-4.6": (160, 3072, 5120),
    "MiniMax-M2": (256, 3072, 3072),
    "Qwen3-Coder-480B": (160, 5120, 6144),
    "ERNIE-4.5-300B": (64, 7168, 8192),
    "DeepSeek-V3": (256, 4096, 7168),
    "Kimi-K2": (384, 4096, 7168),
}


class Counted:
    """In the place of bitsandbytes: the largest number of elements that a call was given, and nothing computed."""

    most: ClassVar[int] = 0

    def _result(self, numel: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        Counted.most = max(Counted.most, numel)
        return torch.empty(numel, dtype=dtype, device="meta") if out is None else out

    def dequantize_4bit(self, codes: Tensor, state: bnb.QuantState, out: Tensor | None = None) -> Tensor:
        assert state.shape is not None
        assert state.blocksize is not None
        assert state.dtype is not None
        assert codes.numel() == -(-state.shape.numel() // 2)
        assert state.absmax.numel() == -(-state.shape.numel() // state.blocksize)
        return self._result(state.shape.numel(), state.dtype, out)

    def dequantize_blockwise(self, codes: Tensor, state: bnb.QuantState, out: Tensor | None = None) -> Tensor:
        assert state.blocksize is not None
        assert state.dtype is not None
        assert state.absmax.numel() == -(-codes.numel() // state.blocksize)
        return self._result(codes.numel(), state.dtype, out)


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Inside, nothing is computed; what is given tells the largest number of elements until then."""
    Counted.most = 0
    with patch.multiple(
        bnb, dequantize_4bit=Counted().dequantize_4bit, dequantize_blockwise=Counted().dequantize_blockwise
    ):
        yield lambda: Counted.most


def on_meta(module: HeldWeights) -> Any:
    for name, size in module.sizes.items():
        setattr(module, name, nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False))
    if module.form.means:
        module.absmax_mean = nn.Buffer(torch.empty(module.slices, device="meta"), persistent=False)
    return module


def multiply_a_stack(shape: tuple[int, int, int], form: Blocks, at_once: int) -> None:
    """One product of every expert with a row, of as many experts at a time as a run has."""
    stack = on_meta(HeldStack(shape, form, torch.bfloat16))
    stack.at_once = at_once
    groups = Groups(torch.arange(shape[0])[None], shape[0])
    rows = torch.empty(shape[0], shape[2], dtype=torch.bfloat16, device="meta")
    groups.offsets = groups.offsets.to("meta")
    groups.ends = list(range(shape[0] + 1))
    assert grouped_product(rows, stack, groups, transposed=False).shape == (shape[0], shape[1])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", STACKS.values(), ids=STACKS)
def test_no_call_counts_beyond_32_bits_where_a_whole_stack_is_dequantized_at_once(
    shape: tuple[int, int, int], form: Blocks
) -> None:
    with counted() as most:
        multiply_a_stack(shape, form, 2 * shape[0] * shape[1] * shape[2])
    assert 2**28 < most() < LIMIT


def run_of(double: bool, quant: str) -> Config:
    data = {"train": [{"path": "rows.jsonl"}], "sequence_length": 4096}
    tree = {"run": {"name": "a"}, "model": {"base": "a"}, "train": {"steps": 1}, "data": data}
    return parse_config(json.dumps({**tree, "quant": {"type": quant, "double": double}}))


def largest(parameters: tuple[Parameter, ...], kind: str) -> list[Parameter]:
    """The largest one of a kind, if there is one."""
    some = [parameter for parameter in parameters if parameter.kind == kind and parameter.matrices]
    return sorted(some, key=lambda one: one.numel)[-1:]


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            entry,
            id=entry["ids"][0],
            marks=[] if "MiniMaxAI/MiniMax-M2" in entry["ids"] else pytest.mark.long,
        )
        for entry in ENTRIES
    ],
)
def test_no_call_counts_beyond_32_bits_with_any_known_base_as_ranks_decide(
    entry: dict[str, Any],
) -> None:
    model = Architecture.from_json(architecture_of(entry["config"], None, entry["ids"][0]))
    for kind, form in FORMS.items():
        config = run_of(form.double, form.quant_type)
        stacks, budgets = largest(model.parameters, "experts"), set[int]()
        for gpu, ranks in (("H100", 8), ("H200", 8), ("B200", 16)) if stacks else ():
            found = find_gpu(gpu)
            assert found is not None
            decided = settled(config, model, ranks, 8, found.memory)
            scope = choose_scope(decided, model, ranks, 8, found.memory)
            budgets.add(choose_experts_at_once(decided, model, ranks, 8, scope, found.memory))
        with counted() as most:
            for stack in stacks:
                count, rows, columns = stack.shape
                for at_once in budgets:
                    multiply_a_stack((count, rows, columns), form, at_once)
            for linear in largest(model.parameters, "linear"):
                layer = on_meta(HeldLinear(linear.shape[1], linear.shape[0], form, torch.bfloat16))
                assert layer.dequantize().shape == linear.shape
            assert most() < LIMIT, kind


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_a_run_that_is_cut_is_quantized_and_dequantized_to_the_same_bits(
    quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numel = 10 * 4096 + 65  # the last block is short
    torch.manual_seed(0)
    weights = torch.randn(numel)
    whole = blockwise.quantize_blocks(weights, quant_type, 64)
    values = blockwise.dequantize_blocks(*whole, numel, quant_type, 64, torch.bfloat16)
    scales = blockwise.quantize_absmax(weights)
    monkeypatch.setattr(blockwise, "AT_ONCE", 4096)
    called, dequantize_4bit, dequantize_8bit = list[int](), bnb.dequantize_4bit, bnb.dequantize_blockwise
    monkeypatch.setattr(bnb, "dequantize_4bit", lambda *args, **given: called.append(1) or dequantize_4bit(*args))
    monkeypatch.setattr(bnb, "dequantize_blockwise", lambda *args, **given: called.append(1) or dequantize_8bit(*args))
    cut = blockwise.quantize_blocks(weights, quant_type, 64)
    for part, other in zip(cut, whole, strict=True):
        assert torch.equal(part, other)
    assert torch.equal(blockwise.dequantize_blocks(*cut, numel, quant_type, 64, torch.bfloat16), values)
    assert len(called) == 11
    for part, other in zip(blockwise.quantize_absmax(weights), scales, strict=True):
        assert torch.equal(part, other)
    decoded = blockwise.dequantize_absmax(*scales[:2])
    monkeypatch.undo()
    assert torch.equal(decoded, blockwise.dequantize_absmax(*scales[:2]))


def test_nothing_else_calls_bitsandbytes_but_the_other_side_of_a_proof() -> None:
    root = Path(blockwise.__file__).parents[2]
    called = re.compile(r"^\s*(from|import) bitsandbytes\b", re.MULTILINE)
    found = {str(file.relative_to(root)) for file in root.rglob("*.py") if called.search(file.read_text())}
    proof = "export/proof"
    assert found == {"model/held/blockwise.py", f"{proof}/streamed.py", f"{proof}/plain.py"}
