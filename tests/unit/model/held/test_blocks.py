"""The 4-bit layer multiplies with bitsandbytes' own weights, and a run of whole blocks quantizes like the whole."""

import json
from typing import Any, Literal

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BitsAndBytesConfig

from tests.nf4 import dequantized, packed_stack
from trainer.model.held import WeightError
from trainer.model.held.blockwise import quantize_absmax, quantize_blocks
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear
from trainer.state.zero.division import share

Kind = Literal["nf4", "fp4", "int8"]
IN, OUT = 96, 71  # neither a row nor the whole is a number of whole blocks


@pytest.mark.parametrize(("double", "block_size"), [(False, 64), (True, 64), (False, 128)])
def test_files_have_what_bitsandbytes_itself_would_write(double: bool, block_size: int) -> None:
    weights = torch.randn(20, 256, generator=torch.Generator().manual_seed(4))
    encoder, error = Blocks("nf4").with_settings(block_size, double).encoder(torch.bfloat16), WeightError()
    given = b"".join(encoder.encode(iter(weights.flatten().split(7 * 128)), (20, 256), error))
    found, at = dict[str, bytes](), 0
    for entry in encoder.entries("a.weight", (20, 256)):
        found[entry.name], at = given[at : at + entry.size], at + entry.size
    assert at == len(given)
    codes, state = bnb.quantize_4bit(
        weights.bfloat16(), blocksize=block_size, quant_type="nf4", compress_statistics=double
    )
    expected = {f"a.weight.{name}": value for name, value in state.as_dict(packed=True).items()} | {"a.weight": codes}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        own = bytes(value.contiguous().view(torch.uint8).flatten().tolist())
        if "quant_state" in name:
            assert json.loads(found[name]) == json.loads(own)
        else:
            assert found[name] == own, name
    lost = dequantized(weights.bfloat16(), "nf4", block_size).float() - weights
    assert error.relative == pytest.approx(float(lost.norm() / weights.norm()), rel=1e-5)


def test_a_matrix_whose_rows_are_no_whole_blocks_stays_as_it_is_in_files() -> None:
    encoder = Blocks("nf4", 64, True).encoder(torch.bfloat16)
    assert encoder.takes((3, 128))
    assert not encoder.takes((2, 96)), "although the whole has three blocks"
    told = encoder.configuration(["lm_head", "model.layers.0.mlp.gate"])
    config: Any = BitsAndBytesConfig.from_dict(told)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.llm_int8_skip_modules == ["lm_head", "model.layers.0.mlp.gate"]


def layer(kind: Kind, double: bool, dtype: torch.dtype = torch.float32) -> tuple[HeldLinear, Tensor]:
    """A layer filled from random weights, and the weight that bitsandbytes makes of them."""
    torch.manual_seed(1)
    source = torch.randn(OUT, IN, dtype=dtype)
    module = HeldLinear(IN, OUT, Blocks(kind, 64, double), dtype)
    packed, absmax = quantize_blocks(source.view(-1), kind, 64)
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    if double:
        codes, nested, mean = quantize_absmax(absmax)
        module.absmax = torch.nn.Parameter(codes, requires_grad=False)
        module.nested_absmax = torch.nn.Parameter(nested.view(torch.uint8), requires_grad=False)
        module.absmax_mean = torch.nn.Buffer(mean[None], persistent=False)
    else:
        module.absmax = torch.nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
    module.bias = torch.nn.Parameter(torch.randn(OUT, dtype=dtype), requires_grad=False)
    whole = dequantized(source, kind, double=double)
    return module, whole


@pytest.mark.parametrize(
    ("kind", "double"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
)
def test_output_and_input_gradient_are_those_of_the_dequantized_weight(kind: Kind, double: bool) -> None:
    module, weight = layer(kind, double)
    x = torch.randn(2, 5, IN, requires_grad=True)
    y = module(x)
    assert module.bias is not None
    assert torch.equal(y, torch.nn.functional.linear(x, weight, module.bias))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 43, 35),  # 1,505 weights a matrix: an odd number, and no whole blocks
        (3, 64, 64),  # whole blocks, but not of scales under double quantization
        (3, 128, 128),  # whole blocks of both: dequantized together
    ],
    ids=lambda shape: f"{shape[1]}x{shape[2]}",
)
def test_any_matrices_of_a_stack_are_those_that_bitsandbytes_packed(shape: tuple[int, ...], double: bool) -> None:
    torch.manual_seed(2)
    stack, whole = packed_stack(torch.randn(shape), double)
    for first, last in ((0, 3), (1, 2), (1, 3)):
        assert torch.equal(stack.matrices(first, last), whole[first:last])
    assert not torch.equal(stack.matrices(0, 1), whole[1:2])


def test_autograd_keeps_no_weight_between_forward_and_backward() -> None:
    module, weight = layer("nf4", False)
    x = torch.randn(3, IN, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = module(x)
    assert saved == []
    # ZeRO-3 frees the storage after the forward and gathers another before the backward: that one must be used.
    module.absmax.data = (2 * module.absmax.data.view(torch.float32)).view(torch.uint8)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ (2 * weight))


@given(
    block_size=st.sampled_from([64, 128]),
    blocks=st.integers(1, 9),
    short=st.integers(0, 63),
    first=st.integers(0, 8),
    kind=st.sampled_from(["nf4", "fp4", "int8"]),
)
def test_a_run_of_whole_blocks_quantizes_like_the_whole_tensor(
    block_size: int, blocks: int, short: int, first: int, kind: str
) -> None:
    weights = torch.randn(blocks * block_size - short, generator=torch.Generator().manual_seed(blocks)).bfloat16()
    first = min(first, blocks - 1)
    packed, absmax = quantize_blocks(weights, kind, block_size)
    part, part_absmax = quantize_blocks(weights[first * block_size :], kind, block_size)
    a_byte = 1 if kind == "int8" else 2
    assert torch.equal(part, packed[first * block_size // a_byte :])
    assert torch.equal(part_absmax, absmax[first:])
    sizes = Blocks(kind, block_size).sizes(1, len(weights))
    assert (len(packed), 4 * len(absmax)) == (sizes["weight"], sizes["absmax"])


def test_int8_is_off_by_half_a_step_of_its_block() -> None:
    source = torch.randn(96, 64)
    found = dequantized(source, "int8")
    assert ((found - source).abs() <= source.abs().amax(1, keepdim=True) / 127 * 0.51).all()


def test_double_quantization_is_that_of_bitsandbytes() -> None:
    source = torch.randn(300, 100)
    _, state = bnb.quantize_4bit(source, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert state.state2 is not None
    assert state.offset is not None
    codes, nested, mean = quantize_absmax(quantize_blocks(source.view(-1), "nf4", 64)[1])
    assert torch.equal(codes, state.absmax)
    assert torch.equal(nested, state.state2.absmax)
    assert torch.equal(mean, state.offset)
    assert 4 * len(nested) == Blocks("nf4", 64, True).sizes(*source.shape)["nested_absmax"] == 8


@given(numel=st.integers(0, 1000), world_size=st.integers(1, 12))
def test_shares_tile_the_tensor_in_order(numel: int, world_size: int) -> None:
    shares = [share(numel, world_size, rank) for rank in range(world_size)]
    assert [begin for begin, _ in shares] == [0, *(end for _, end in shares[:-1])]
    assert shares[-1][1] == numel
    assert max(end - begin for begin, end in shares) == -(-numel // world_size)


def test_a_bias_that_learns_gets_the_gradient_of_a_plain_layer():
    module, whole = layer("nf4", double=False)
    module.bias.requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    x, grad = torch.randn(3, 5, IN), torch.randn(3, 5, OUT)
    module(x).backward(grad)
    torch.nn.functional.linear(x, whole, bias).backward(grad)
    torch.testing.assert_close(module.bias.grad, bias.grad)
