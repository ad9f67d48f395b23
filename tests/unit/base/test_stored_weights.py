"""Weights that stay as their files have them are, matrix by matrix, the values that a read decodes."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.codes import FORMATS, compressed
from tests.stored import from_fp8, from_mxfp4, random_mxfp4, to_fp8
from tests.unit.base.test_published_models import MODELS
from tests.unit.base.test_stored_codes import base_of
from trainer.base.architecture import Parameter
from trainer.base.base import Base
from trainer.base.describe.description import describe, quantization_of, stored_format
from trainer.base.rows.packed_parts import kept_sources
from trainer.config import Quant, override, parse_config
from trainer.model.held.codes import Code, KeptSources
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.held.layers import HeldLinear, HeldStack, HeldWeights
from trainer.plan.inputs import stored_bytes
from trainer.store.safetensors_index import Joined, Stretch, numel

KEPT = [
    "int4-32",
    "int4-128-fp16",
    "int4-rows",
    "int4-zeros",
    "int4-rows-zeros",
    "int8-rows",
    "int8-rows-zeros",
    "int8-zeros",
    "fp8-rows",
    "fp8-whole",
    "fp8-modelopt",
    "mxfp4-rows",
    "fp4-scale",
    "nvfp4",
    "nvfp4-modelopt",
]
BESIDE = ("weight_shape", "input_scale", "weight_zero_point", "weight_global_scale", "weight_scale_2")


def weight_of(base: Base, how: dict[str, Any], name: str) -> Any:
    return stored_format(how, "mine").tensors(base)[name]


def filled(module: HeldWeights, found: KeptSources) -> HeldWeights:
    """The module with the whole of its parameters, as one rank has them."""
    for name, source in found.sources.parts.items():
        assert numel(source) == module.sizes[name]
        data = torch.frombuffer(source.read(0, numel(source)), dtype=torch.uint8)
        setattr(module, name, nn.Parameter(data, requires_grad=False))
    return module


def linear(found: KeptSources, rows: int, columns: int, dtype: torch.dtype) -> Any:
    return filled(HeldLinear(columns, rows, KeptCodes(found.kept), dtype), found)


@pytest.mark.parametrize("name", KEPT)
def test_a_layer_over_a_stored_weight_is_that_over_its_values(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    how, make = FORMATS[name]
    tensors, values = make("q_proj", 37, 384)
    found = kept_sources(weight_of(base_of(tmp_path, tensors), how, "q_proj.weight"))
    assert found is not None
    layer = linear(found, 37, 384, torch.float32)
    # The values are rounded to bf16. A layer in fp32 has them as they are before that.
    unrounded = layer.dequantize()
    assert torch.allclose(unrounded, values.float(), rtol=2**-8, atol=0)
    assert torch.equal(linear(found, 37, 384, torch.bfloat16).dequantize(), values.bfloat16())
    stored = sum(tensor.nbytes for key, tensor in tensors.items() if not key.endswith(BESIDE))
    assert layer.weight.numel() + layer.scales.numel() == stored
    beside = {name: source for name, source in found.sources.parts.items() if name not in ("weight", "scales")}
    for source in beside.values():  # any range of a rank's
        whole = source.read(0, numel(source))
        assert all(source.read(begin, begin + 7) == whole[begin : begin + 7] for begin in range(numel(source) - 7))
    x = torch.randn(5, 384, requires_grad=True)
    layer(x).square().sum().backward()
    (expected,) = torch.autograd.grad((x @ unrounded.T).square().sum(), x)
    assert torch.allclose(cast(Tensor, x.grad), expected, rtol=1e-5, atol=1e-5)


def test_tiles_of_fp8_that_are_cut_off_and_stacks(tmp_path: Path) -> None:
    torch.manual_seed(1)
    how = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    weight, scales = to_fp8(torch.randn(70, 45), (16, 32))
    base = base_of(tmp_path, {"q.weight": weight, "q.weight_scale_inv": scales})
    found = kept_sources(weight_of(base, how, "q.weight"))
    assert found is not None
    assert torch.equal(linear(found, 70, 45, torch.bfloat16).dequantize(), from_fp8(weight, scales, (16, 32)))


@pytest.mark.parametrize("name", ["int4-32", "int4-zeros", "fp4-scale", "nvfp4", "nvfp4-modelopt"])
def test_experts_that_are_stored_one_by_one_are_a_stack_of_the_same_bytes(tmp_path: Path, name: str) -> None:
    """Gate and up of each expert, one over the other."""
    torch.manual_seed(1)
    how, make = FORMATS[name]
    made = {f"{expert}.{part}": make(f"{expert}.{part}", 24, 96) for expert in range(3) for part in ("gate", "up")}
    for number, (tensors, values) in enumerate(made.values()):  # each has a scale of scales of its own
        for key in (key for key in tensors if key.endswith(("global_scale", "scale_2"))):
            by = 2.0**number
            tensors[key] *= by
            values *= by if key.endswith("scale_2") else 1 / by
    files = {key: tensor for tensors, _ in made.values() for key, tensor in tensors.items()}
    read = stored_format(how, "mine").tensors(base_of(tmp_path, files))
    parts = tuple(cast(Any, read[f"{key}.weight"]) for key in made)
    stretches = tuple(Stretch(index, 0, 24 * 96) for index in range(6))
    found = kept_sources(Joined(parts, stretches, (3, 48, 96)))
    assert found is not None
    stack = filled(HeldStack((3, 48, 96), KeptCodes(found.kept), torch.bfloat16), found)
    expected = torch.cat([values for _, values in made.values()]).view(3, 48, 96)
    for first, last in ((0, 3), (1, 2), (1, 3)):
        assert torch.equal(stack.matrices(first, last), expected[first:last].bfloat16())


def test_rows_of_a_fused_weight_are_kept_where_they_are_whole_tiles(tmp_path: Path) -> None:
    how = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    weight, scales = to_fp8(torch.randn(64, 64), (16, 32))
    base = base_of(tmp_path, {"qkv.weight": weight, "qkv.weight_scale_inv": scales})
    fused, values = weight_of(base, how, "qkv.weight"), from_fp8(weight, scales, (16, 32))
    lower = kept_sources(Joined((fused,), (Stretch(0, 32 * 64, 32 * 64),), (32, 64)))
    assert lower is not None
    assert torch.equal(linear(lower, 32, 64, torch.bfloat16).dequantize(), values[32:])
    assert kept_sources(Joined((fused,), (Stretch(0, 8 * 64, 32 * 64),), (32, 64))) is None


def test_parts_are_kept_where_they_are_of_one_kind_and_their_tiles_are_those_of_the_whole(tmp_path: Path) -> None:
    how = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    made = {name: to_fp8(torch.randn(rows, 64), (16, 32)) for name, rows in {"a": 70, "b": 8, "c": 8, "d": 64}.items()}
    files = {f"{name}.weight": weight for name, (weight, _) in made.items()}
    read = stored_format(how, "mine").tensors(
        base_of(tmp_path, files | {f"{name}.weight_scale_inv": scales for name, (_, scales) in made.items()})
    )
    whole, *halves, square = (cast(Any, read[f"{name}.weight"]) for name in made)
    found = kept_sources(Joined((whole,), (Stretch(0, 0, 70 * 64),), (70, 64)))
    assert found is not None
    assert torch.equal(linear(found, 70, 64, torch.bfloat16).dequantize(), from_fp8(*made["a"], (16, 32)))
    both = Stretch(0, 0, 8 * 64), Stretch(1, 0, 8 * 64)
    assert kept_sources(Joined(tuple(halves), both, (16, 64))) is None, "a tile of the whole has parts of both"
    assert kept_sources(Joined((square,), (Stretch(0, 0, 64 * 64),), (128, 32))) is None, "rows of another length"

    kinds = list[Any]()
    for name in ("int4-32", "fp8-rows"):
        how, make = FORMATS[name]
        (tmp_path / name).mkdir()
        kinds.append(weight_of(base_of(tmp_path / name, make("q", 24, 96)[0]), how, "q.weight"))
    each = Stretch(0, 0, 24 * 96), Stretch(1, 0, 24 * 96)
    assert kept_sources(Joined(tuple(kinds), each, (2, 24, 96))) is None
    blocks, scales = random_mxfp4((3, 64, 40))
    (tmp_path / "mxfp4").mkdir()
    base = base_of(tmp_path / "mxfp4", {"down_proj_blocks": blocks, "down_proj_scales": scales})
    transposed = weight_of(base, {"quant_method": "mxfp4"}, "down_proj")
    assert kept_sources(Joined((transposed,), (Stretch(0, 0, 3 * 64 * 40),), (3, 64, 40))) is None


def test_mxfp4_stays_the_transpose_that_it_is(tmp_path: Path) -> None:
    blocks, scales = random_mxfp4((3, 64, 40))
    base = base_of(tmp_path, {"down_proj_blocks": blocks, "down_proj_scales": scales})
    found = kept_sources(weight_of(base, {"quant_method": "mxfp4"}, "down_proj"))
    assert found is not None
    stack = filled(HeldStack((3, 64, 40), KeptCodes(found.kept), torch.bfloat16), found)
    assert torch.equal(stack.matrices(0, 3), from_mxfp4(blocks, scales))


@pytest.mark.parametrize("name", ["int4-order", "llm-int8"])
def test_columns_in_any_order_and_scales_of_products_are_decoded_as_they_are_read(tmp_path: Path, name: str) -> None:
    how, make = FORMATS[name]
    tensors, _ = make("q", 16, 64)
    assert kept_sources(weight_of(base_of(tmp_path, tensors), how, "q.weight")) is None


@pytest.mark.parametrize("name", KEPT)
def test_what_config_json_says_of_a_base_is_what_its_files_have(tmp_path: Path, name: str) -> None:
    """The plan counts by the one, and ranks load by the other."""
    how, make = FORMATS[name]
    tensors, _ = make("q_proj", 32, 384)
    found = kept_sources(weight_of(base_of(tmp_path, tensors), how, "q_proj.weight"))
    assert found is not None
    said = stored_format(how, "mine").kept(Parameter("q_proj.weight", (32, 384), "linear", 0, 1.0))
    if name != "fp4-scale":  # of experts alone
        assert said is not None
        assert (said.code.bits, said.code.tile) == (found.kept.code.bits, found.kept.code.tile)
        assert (said.seconds, said.zeros) == (found.kept.seconds, found.kept.zeros)
    if how["quant_method"] in ("compressed-tensors", "modelopt"):
        parameter = Parameter("layers.0.mlp.q_proj.weight", (32, 384), "linear", 0, 1.0)
        for ignored, kept in (("re:.*mlp", False), ("re:mlp", True), ("mlp.q_proj", False), ("q", True)):
            assert (stored_format({**how, "ignore": [ignored]}, "mine").kept(parameter) is not None) is kept


KIMI = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True) | {
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ]
}


def test_a_base_in_4_bits_is_known_by_its_config_alone_and_stays_as_it_is() -> None:
    """Kimi K2 Thinking: its files are 594 GB."""
    plain = MODELS["Kimi-K2"].config
    base = describe({**plain, "quantization_config": KIMI})
    assert base.unrecognised == ()
    parts = base.architecture.parameters
    assert {part.kind for part in parts if part.kept} == {"experts"}
    held = sum(stored_bytes(part, Quant(type="stored"), 2) or 2 * part.numel for part in parts)
    assert held == pytest.approx(594e9, rel=0.005)
    # K2.5, which sees as well, says it of its language model.
    assert quantization_of({"text_config": {"quantization_config": KIMI}}) == KIMI
    unsaid = parse_config("model: {base: b}\nrun: {name: a, store: s}\ndata: {train: [{path: p}]}\ntrain: {steps: 1}")
    assert override(unsaid, "train.steps=2").decided(base.in_4_bits).quant.type == "stored"
    assert override(unsaid, "quant.type=nf4").decided(base.in_4_bits).quant.type == "nf4"
    assert unsaid.decided(describe(plain).in_4_bits).quant.type == "nf4"
    in_8_bits = describe({**plain, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    assert any(part.kept for part in in_8_bits.architecture.parameters)
    assert unsaid.decided(in_8_bits.in_4_bits).quant.type == "nf4"
    asked = override(unsaid, "quant.type=stored")
    assert any("has none that can stay so" in line for line in describe(plain).mismatches(asked))
    assert not any("quant.type" in line for line in base.mismatches(asked))


def test_experts_in_fp4_are_known_beside_weights_in_fp8() -> None:
    """DeepSeek-V4 says so at the top of its config.json, and leaves nothing else in 16 bits."""
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    base = describe({**MODELS["DeepSeek-V3"].config, "quantization_config": how, "expert_dtype": "fp4"})
    found = {part.kind: part.kept.code for part in base.architecture.parameters if part.kept}
    assert found == {"linear": Code("e4m3", (128, 128)), "experts": Code("e2m1", (1, 32))}
    assert {part.kept.scales for part in base.architecture.parameters if part.kept} == {"F8_E8M0"}
    plain = Parameter("model.layers.0.mlp.up_proj.weight", (256, 128), "linear", 0)
    for form, scales in (("ue8m0", "F8_E8M0"), ("float", "F32"), (None, "F32")):
        kept = stored_format({**how, "scale_fmt": form}, "mine").kept(plain)
        assert kept is not None
        assert kept.sizes(256, 128) == {"weight": 256 * 128, "scales": 2 * (1 if scales == "F8_E8M0" else 4)}
