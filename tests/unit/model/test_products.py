"""FP8 products: near the plain ones, in the form that a GPU's kernel takes, and refused where there are none."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.unit.plan.test_plan import TINY, config, plan_of
from trainer.errors import ConfigError
from trainer.model import experts
from trainer.model.held.blockwise import quantize_blocks
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear, HeldStack, InFp8, multiply_in_fp8
from trainer.model.kernels import fp8
from trainer.model.kernels.grouped import Groups
from trainer.tuning.lora.layer import AdaptedLinear, multiply_adapted

IN, OUT = 96, 80


def layer(inputs: int = IN, outputs: int = OUT) -> HeldLinear:
    torch.manual_seed(1)
    module = HeldLinear(inputs, outputs, Blocks("nf4", 64, double=False), dtype=torch.bfloat16)
    scales = torch.logspace(-1, 1, outputs)[:, None]  # rows of very different sizes, as a scale a row is for
    packed, absmax = quantize_blocks((torch.randn(outputs, inputs) * scales).bfloat16().view(-1), "nf4", 64)
    module.weight = nn.Parameter(packed, requires_grad=False)
    module.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
    module.bias = nn.Parameter(torch.randn(outputs, dtype=torch.bfloat16), requires_grad=False)
    return module


def values(module: HeldLinear, adapter: bool) -> tuple[Tensor, Tensor]:
    """The result of a pass, and the gradient of its input."""
    torch.manual_seed(2)
    x = torch.randn(2, 50, IN, dtype=torch.bfloat16, requires_grad=True)
    down, up = (nn.Parameter(0.1 * torch.randn(*shape).bfloat16()) for shape in ((4, IN), (OUT, 4)))
    y: Any = multiply_adapted(x, None, [AdaptedLinear(module, down, up, 2.0, None)])[0] if adapter else module(x)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    return y.detach().float(), x.grad.float()


@pytest.mark.parametrize("adapter", [False, True])
def test_each_output_and_gradient_is_near_the_plain_one(adapter: bool) -> None:
    module = layer()
    plain = values(module, adapter)
    assert multiply_in_fp8(module, torch.device("cpu")) == InFp8(1, 1)
    for ours, expected in zip(values(module, adapter), plain, strict=True):
        apart = (ours - expected).norm(dim=(0, 1)) / expected.norm(dim=(0, 1))
        assert 0 < apart.max() < 0.06  # three bits of mantissa: 2^-4 at most for each factor


def test_rows_of_any_size_are_finite() -> None:
    sizes = torch.tensor([0.0, 1e-38, 3e-38, 1.0, 1e30])[:, None]
    rows = sizes * (torch.arange(32) % 2)  # zeros beside the least of numbers stay zeros
    found = fp8.product(rows.bfloat16(), torch.ones(16, 32).bfloat16())
    torch.testing.assert_close(found.float(), (16 * sizes).bfloat16().float().expand(5, 16), rtol=0.04, atol=1e-30)


def test_factors_are_as_the_kernel_of_a_gpu_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mode, seen = FakeTensorMode(), list[tuple[int, ...]]()
    plain: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]

    def checked(*factors: Tensor, **given: Any) -> Tensor:
        def on_gpu(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            return FakeTensor(mode, there, torch.device("cuda:0"))

        with mode:  # PyTorch's own conditions for a GPU
            seen.append(plain(*map(on_gpu, factors), **{name: on_gpu(value) for name, value in given.items()}).shape)
        return plain(*factors, **given)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    module = layer()
    multiply_in_fp8(module, torch.device("cpu"))
    values(module, adapter=False)
    assert seen == [(100, OUT), (100, IN)]


def test_sizes_that_a_gpu_cannot_take_multiply_plainly() -> None:
    model = nn.ModuleList([layer(), layer(IN, 72), layer(88, OUT)])
    assert multiply_in_fp8(model, torch.device("cpu")) == InFp8(1, 3)


@pytest.mark.parametrize(("name", "capability"), [("NVIDIA A100", (8, 0)), ("NVIDIA GeForce RTX 5090", (12, 0))])
def test_a_gpu_without_fp8_by_rows_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ConfigError, match=f"fp8 cannot run on {name}"):
        multiply_in_fp8(layer(), torch.device("cuda:0"))


@pytest.mark.parametrize("wrong", ["quant.type=none", "model.dtype=fp32"])
def test_it_needs_a_quantized_base_in_bf16(wrong: str) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.products: fp8 needs frozen weights in 4 or 8 bits and model.dtype bf16"
    ):
        config("train.products=fp8", wrong)


GROUPS, EACH = 5, 40


def stack(rows: int = OUT, columns: int = IN) -> HeldStack:
    torch.manual_seed(3)
    module = HeldStack((GROUPS, rows, columns), Blocks("nf4", 64, double=False), torch.bfloat16)
    packed, absmax = quantize_blocks(torch.randn(GROUPS * rows * columns).bfloat16(), "nf4", 64)
    module.weight = nn.Parameter(packed, requires_grad=False)
    module.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
    return module


def some_groups() -> Groups:
    """One of the experts has no row."""
    torch.manual_seed(4)
    experts = torch.randint(0, GROUPS - 1, (GROUPS * EACH, 1))
    return Groups(experts + (experts == 2), GROUPS)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("at_once", [2**29, 3 * 2 * IN * OUT])
def test_products_of_experts_are_those_of_each_group_in_fp8(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, at_once: int
) -> None:
    monkeypatch.setattr(experts, "FP8_ROWS_EACH", EACH)
    monkeypatch.setattr(fp8, "FP8_AT_ONCE", 2 * IN * OUT)
    module, groups = stack(), some_groups()
    module.at_once = at_once  # of two or three experts, in portions
    rows = torch.randn(GROUPS * EACH, OUT if transposed else IN).bfloat16()
    plain = experts.grouped_product(rows, module, groups, transposed)
    assert multiply_in_fp8(nn.ModuleList([module]), torch.device("cpu")) == InFp8(0, 0, 1, 1)
    found, matrices = experts.grouped_product(rows, module, groups, transposed), module.matrices(0, GROUPS)
    for group, (begin, end) in enumerate(pairwise(groups.ends)):
        matrix = matrices[group] if not transposed else matrices[group].mT
        assert torch.equal(found[begin:end], fp8.product(rows[begin:end], matrix))
    assert 0 < (found - plain).norm() / plain.norm() < 0.06
    fewer = experts.grouped_product(rows[:-1], module, groups, transposed) if at_once == 2**29 else None
    assert fewer is None or torch.equal(fewer, plain[:-1])  # too few rows to pay for the conversion


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_as_the_kernel_of_a_gpu_takes_them(transposed: bool) -> None:
    """PyTorch's own conditions for layouts, types and shapes, which tensors on `meta` are held to."""
    matrices = torch.empty(GROUPS, OUT, IN, dtype=torch.bfloat16, device="meta")
    rows = torch.empty(GROUPS * EACH, OUT if transposed else IN, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(GROUPS, dtype=torch.int32, device="meta")
    found = fp8.product_of_groups(rows, matrices if transposed else matrices.mT, offsets)
    assert (found.shape, found.dtype) == ((GROUPS * EACH, IN if transposed else OUT), torch.bfloat16)
    assert found.is_contiguous()
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        fp8.product_of_groups(rows[:, 8:], (matrices if transposed else matrices.mT)[:, 8:], offsets)


@pytest.mark.parametrize(("capability", "stacks"), [((8, 9), 0), ((9, 0), 1), ((10, 0), 1), ((10, 3), 0), ((11, 0), 0)])
def test_experts_multiply_plainly_where_there_is_no_such_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], stacks: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = multiply_in_fp8(nn.ModuleList([layer(), stack(), stack(72)]), torch.device("cuda:0"))
    assert found == InFp8(1, 1, stacks, 2)
    assert str(found) == f"1 of 1 linear layers, {stacks} of 2 stacks of experts"


def test_the_plan_says_whose_experts_have_enough_rows() -> None:
    sizes = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    base = {**TINY, "model_type": "qwen3_moe", "mlp_only_layers": [], "norm_topk_prob": True, **sizes}
    every = 2 * TINY["num_hidden_layers"]
    for tokens, ranks, some in ((4096, 1, 0), (8192, 1, every), (8192, 2, 0), (16384, 2, every)):
        shared = (f"data.sequence_length={tokens}", f"sharding.sequence_parallel={ranks}")
        plan = plan_of(config("train.products=fp8", *shared), base, ranks, ranks, None)
        assert f"Also in {some} of {every} stacks of experts" in " ".join(plan.notes)


def test_the_plan_counts_the_rows_of_all_experts() -> None:
    """Two in eight experts take each token, so there are twice as many rows of them as tokens."""
    sizes = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    base = {**TINY, "model_type": "qwen3_moe", "mlp_only_layers": [], "norm_topk_prob": True, **sizes}

    def factors(tokens: int) -> int:
        plain, ours = (
            plan_of(config(f"train.products={kind}", f"data.sequence_length={tokens}"), base, 1, 1, None)
            for kind in ("plain", "fp8")
        )
        return ours.memory_per_gpu.dequantized_weight - plain.memory_per_gpu.dequantized_weight

    # The widest are those of both halves of the gate, in 16 bits and in 8.
    assert factors(16384) - factors(8192) == 3 * 2 * 8192 * 2 * 64


def test_the_plan_names_the_layers_and_counts_their_factors() -> None:
    base = {**TINY, "model_type": "llama"}
    plain, ours = (plan_of(config(f"train.products={kind}"), base, 1, 1, None) for kind in ("plain", "fp8"))
    assert "train.products: fp8 in 21 of 21 linear layers" in " ".join(ours.notes)
    assert ours.memory_per_gpu.dequantized_weight > plain.memory_per_gpu.dequantized_weight
    odd = plan_of(config("train.products=fp8"), {**base, "intermediate_size": 104}, 1, 1, None)
    assert "train.products: fp8 in 12 of 21 linear layers" in " ".join(odd.notes), "104 is no multiple of 16"
