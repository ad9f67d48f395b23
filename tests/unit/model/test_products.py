"""FP8 products: near the plain ones, in the form that a GPU's kernel takes, and refused where there are none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.unit.plan.test_plan import TINY, config, plan_of
from trainer.errors import ConfigError
from trainer.model.held.blockwise import quantize_blocks
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear, multiply_in_fp8
from trainer.model.kernels import fp8
from trainer.tuning.lora.layer import Adapted, multiply_adapted

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
    y: Any = multiply_adapted(x, None, [Adapted(module, down, up, 2.0, None)])[0] if adapter else module(x)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    return y.detach().float(), x.grad.float()


@pytest.mark.parametrize("adapter", [False, True])
def test_each_output_and_gradient_is_near_the_plain_one(adapter: bool) -> None:
    module = layer()
    plain = values(module, adapter)
    assert multiply_in_fp8(module, torch.device("cpu")) == (1, 1)
    for ours, expected in zip(values(module, adapter), plain, strict=True):
        apart = (ours - expected).norm(dim=(0, 1)) / expected.norm(dim=(0, 1))
        assert 0 < apart.max() < 0.06  # three bits of mantissa: 2^-4 at most for each factor


def test_rows_of_any_size_are_finite() -> None:
    rows = torch.tensor([0.0, 1e-38, 1.0, 1e30])[:, None] * torch.ones(4, 32)
    found = fp8.product(rows.bfloat16(), torch.ones(16, 32).bfloat16())
    torch.testing.assert_close(found.float(), 32 * rows[:, :16].bfloat16().float(), rtol=0.04, atol=1e-30)


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
    assert multiply_in_fp8(model, torch.device("cpu")) == (1, 3)


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


def test_the_plan_names_the_layers_and_counts_their_factors() -> None:
    base = {**TINY, "model_type": "llama"}
    plain, ours = (plan_of(config(f"train.products={kind}"), base, 1, 1, None) for kind in ("plain", "fp8"))
    assert "train.products: fp8 in 21 of 21 linear layers" in " ".join(ours.notes)
    assert ours.memory_per_gpu.dequantized_weight > plain.memory_per_gpu.dequantized_weight
