"""Weights in 4 and 8 bits are read, range by range, as the very values that each format's specification gives them."""

import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.codes import FORMATS, compressed, gptq
from tests.stored import from_mxfp4, random_mxfp4, read_index
from tests.unit.plan.test_plan import LLAMA_70B
from trainer.base.architecture import Parameter
from trainer.base.base import Base
from trainer.base.describe.description import describe, stored_format
from trainer.base.partitions.filling import StoredTransposed
from trainer.base.stored.compressed_tensors import CompressedTensors
from trainer.base.stored.shared import columns as stored_columns
from trainer.base.stored.shared import moving
from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.coded import Mxfp4Experts
from trainer.base.stored.shared.moving import AT_ONCE, Movable, portions
from trainer.errors import ConfigError
from trainer.export.write import as_stored
from trainer.state.zero.division import share
from trainer.store.safetensors_index import StoredTensor, TensorSource
from trainer.store.store import open_store

# Sizes that no number of ranks divides, and codes that fill no whole int32 along the rows.
SHAPES = [(37, 384), (128, 128), (3, 640)]
WIDE = [(40, 384), (128, 128), (8, 640)]  # AWQ packs eight outputs


def base_of(folder: Path, tensors: dict[str, Tensor]) -> Base:
    """The files of a base, as stored formats see it."""
    save_file(tensors, folder / "model.safetensors")
    store = open_store(str(folder))
    return cast(Base, SimpleNamespace(name="mine", store=store, tensors=read_index(store)))


def differing(source: StoredTensor, expected: Tensor) -> list[Any]:
    """Those of many ranges whose values are not `expected`, in their very bits."""
    draw, size = random.Random(3), expected.numel()
    spans = [(0, size), (0, 1), (size - 1, size), *(tuple(sorted(draw.sample(range(size + 1), 2))) for _ in range(25))]
    bits = expected.contiguous().flatten().view(torch.uint8)
    item = expected.element_size()
    found = [(first, last) for first, last in spans if first < last]
    return [
        (first, last)
        for first, last in found
        if not torch.equal(
            torch.frombuffer(source.read(first, last), dtype=torch.uint8), bits[item * first : item * last]
        )
    ]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_range_has_the_values_of_the_specification(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    how, make = FORMATS[name]
    shape = WIDE[SHAPES.index(shape)] if name == "awq" else shape
    tensors, expected = make("layers.0.q_proj", *shape)
    norm = torch.ones(4)
    base = base_of(tmp_path, {**tensors, "norm.weight": norm, "layers.0.k_scale": torch.ones(1)})
    found = dict(stored_format(how, "mine").tensors(base))
    found.pop("layers.0.k_scale", None)
    assert found.keys() == {"layers.0.q_proj.weight", "norm.weight"}
    weight = cast(StoredTensor, found["layers.0.q_proj.weight"])
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    assert (weight.shape, weight.dtype) == (shape, names[expected.dtype])
    assert differing(weight, expected) == []


@pytest.mark.parametrize("name", ["int4-32", "int4-128-fp16", "nvfp4", "mxfp4-rows", "fp8-rows"])
def test_ranks_read_the_bytes_that_are_there_once(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    how, make = FORMATS[name]
    tensors, _ = make("q_proj", 211, 640)
    base = base_of(tmp_path, tensors)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    for ranks in (1, 2, 3):
        before = base.store.range_bytes
        for rank in range(ranks):
            weight = cast(StoredTensor, stored_format(how, "mine").tensors(base)["q_proj.weight"])
            each = -(-211 * 640 // ranks)
            weight.read(rank * each, min(211 * 640, (rank + 1) * each))
        assert 0.98 <= (base.store.range_bytes - before) / stored <= 1.08


@pytest.mark.parametrize("name", ["fp8-rows", "fp8-whole"])
def test_the_few_scales_of_rows_are_read_once_for_all_pieces(tmp_path: Path, name: str) -> None:
    how, make = FORMATS[name]
    tensors, _ = make("q_proj", 64, 128)
    base = base_of(tmp_path, tensors)
    weight = cast(StoredTensor, stored_format(how, "mine").tensors(base)["q_proj.weight"])
    weight.read(0, 128)
    before = base.store.range_bytes
    weight.read(128, 512)
    assert base.store.range_bytes - before == 384


@pytest.mark.parametrize("name", ["gptq-4", "gptq-4-16", "gptq-8", "awq"])
def test_ranks_that_read_the_transpose_read_the_bytes_that_are_there_once(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    how, make = FORMATS[name]
    rows, columns = 216, 640
    tensors, values = make("q_proj", rows, columns)
    base = base_of(tmp_path, tensors)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    for ranks in (1, 2, 3):
        before, found = base.store.range_bytes, bytearray()
        for rank in range(ranks):
            weight = stored_format(how, "mine").tensors(base)["q_proj.weight"]
            assert isinstance(weight, StoredTransposed)
            groups = -(-columns // weight.together)
            first, last = (min(columns, number * weight.together) * rows for number in share(groups, ranks, rank))
            found += weight.transpose.read(first, last)
        assert 0.98 <= (base.store.range_bytes - before) / stored <= 1.08
        assert torch.equal(torch.frombuffer(found, dtype=values.dtype).view(columns, rows), values.T)


def test_any_range_of_a_transpose_has_the_values_of_the_specification(tmp_path: Path) -> None:
    torch.manual_seed(1)
    for name, columns in {"gptq-4-order": 384, "gptq-4": 320, "gptq-8": 384, "awq": 384}.items():
        how, make = FORMATS[name]
        folder = tmp_path / name
        folder.mkdir()
        tensors, expected = make("q_proj", 40, columns)  # a group of 128 may have fewer at the end
        weight = stored_format(how, "mine").tensors(base_of(folder, tensors))["q_proj.weight"]
        assert isinstance(weight, StoredTransposed)
        assert differing(weight.transpose, expected.T) == []


@pytest.mark.parametrize("name", ["gptq-4", "gptq-8", "awq"])
def test_a_matrix_so_wide_that_few_rows_are_decoded_at_once_has_the_same_values(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_columns, "_AT_ONCE", 100)
    torch.manual_seed(1)
    how, make = FORMATS[name]
    tensors, expected = make("q_proj", 24, 256)
    weight = stored_format(how, "mine").tensors(base_of(tmp_path, tensors))["q_proj.weight"]
    assert differing(cast(StoredTensor, weight), expected) == []


def test_units_are_moved_in_portions_of_so_many_weights() -> None:
    assert list(portions(5, AT_ONCE // 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(portions(5, 100, at_once=300)) == [(0, 3), (3, 5)]
    assert list(portions(2, 100, at_once=1)) == [(0, 1), (1, 2)], "one at least"
    assert list(portions(5, 100, lambda first: 4 - first % 4)) == [(0, 4), (4, 5)], "none reaches across a border"
    assert list(portions(0, 100)) == []


def exchange(folder: Path, weight: Movable, values: Tensor, wanted: Tensor) -> int:
    """Move the codes of a weight with these `values` to those of the values `wanted`. Return how many have changed."""

    class Exchanged:
        shape = values.shape

        def apply_to(self, rows: Tensor, first: int) -> None: ...

        def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
            return (wanted.float() - values.float()).flatten(0, -2)[first : first + rows, columns]

    first, last = weight.codes.byte_range(0, math.prod(weight.codes.shape))
    units = torch.frombuffer(weight.codes.store.get_range(weight.codes.key, first, last), dtype=torch.uint8)
    units = units.view(-1, weight.unit)
    change = as_stored.OfPart("w", 0, weight.shape, Exchanged(), "nearest")
    moved = sum(weight.move(units[begin:end], begin, change) for begin, end in ((0, 5), (5, len(units))))
    with (folder / weight.codes.key).open("r+b") as file:
        file.seek(first)
        file.write(units.numpy().tobytes())
    return moved


@pytest.mark.parametrize(
    "name",
    [
        "int4-32",
        "int4-zeros",
        "int4-order",
        "nvfp4",
        "gptq-4-16",
        "gptq-4-order",
        "gptq-8 in fp16",
        "awq",
        "mxfp4 of experts",
    ],
)
def test_codes_become_those_of_the_values_that_are_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight becomes another one of its group, whose value it can have."""
    torch.manual_seed(1)
    for module in (moving, as_stored):
        monkeypatch.setattr(module, "AT_ONCE", 3 * 256)
    if name == "mxfp4 of experts":
        blocks, scales = random_mxfp4((3, 64, 24))
        base, values = base_of(tmp_path, {"blocks": blocks, "scales": scales}), from_mxfp4(blocks, scales)
        wanted = values.unflatten(1, (-1, 32)).flip(2).flatten(1, 2)
    else:
        # The numbers of bf16 are too far from each other to name one of 256 codes.
        of_8_bits = {"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq(8, -1)
        how, make = of_8_bits if name == "gptq-8 in fp16" else FORMATS[name]
        tensors, values = make("q_proj", 24, 256)
        base = base_of(tmp_path, tensors)
        group = tensors.get("q_proj.g_idx", tensors.get("q_proj.weight_g_idx", torch.arange(256) // 16))
        wanted = values.clone()
        for number in group.unique():
            columns = torch.nonzero(group == number).flatten()
            wanted[:, columns] = values[:, columns.flip(0)]

    def weight() -> StoredTensor:
        if name == "mxfp4 of experts":
            blocks, scales = (cast(TensorSource, base.tensors[part]) for part in ("blocks", "scales"))
            return Mxfp4Experts(blocks, scales, LastReads(2))
        return cast(StoredTensor, stored_format(how, "mine").tensors(base)["q_proj.weight"])

    before = weight()
    assert isinstance(before, Movable)
    assert exchange(tmp_path, before, values, wanted) == int(wanted.ne(values).sum())
    found = torch.frombuffer(weight().read(0, values.numel()), dtype=values.dtype)
    assert torch.equal(found.view_as(values), wanted)


def test_a_part_that_is_missing_or_of_another_size_is_refused(tmp_path: Path) -> None:
    how, make = FORMATS["int4-zeros"]
    tensors, _ = make("q_proj", 16, 64)
    for name, change in {
        "q_proj.weight_scale": None,
        "q_proj.weight_zero_point": None,
        "q_proj.weight_packed": torch.ones(16, 9).int(),
    }.items():
        changed = {key: value for key, value in (tensors | {name: change}).items() if value is not None}
        folder = tmp_path / name
        folder.mkdir()
        base = base_of(folder, changed)
        with pytest.raises(ConfigError, match=r"q_proj has weights \[16, .* in mine, and beside them .* no group of"):
            stored_format(how, "mine").tensors(base)


def test_groups_that_cannot_be_read_are_a_mismatch() -> None:
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    for groups in ({}, {"a": {}}, {"a": {"weights": {"num_bits": 3, "strategy": "group", "group_size": 32}}}):
        stored = stored_format({**how, "config_groups": groups}, "mine")
        found = stored.mismatches(cast(Any, None))
        assert not groups or "config_groups that cannot be read" in found[0]
    for wrong in (
        {"strategy": "group", "group_size": 0},
        {"strategy": "group", "group_size": True},
        {"strategy": "block", "block_structure": [128]},
        {"strategy": "block", "block_structure": [128, -1]},
    ):
        groups = {"a": {"weights": {"num_bits": 4, **wrong}}}
        (said,) = stored_format({**how, "config_groups": groups}, "mine").mismatches(cast(Any, None))
        assert "(group_size or block_structure " in said


def test_a_tile_may_be_a_part_of_a_row_or_of_a_column_or_the_matrix() -> None:
    for tile in ([1, 128], [128, 1], None):
        stored = stored_format({"quant_method": "fp8", "weight_block_size": tile}, "mine")
        assert stored.mismatches(cast(Any, None)) == []
    for wrong in ([0, 128], [128, True], [128, 128, 1], [128.0, 128], 128):
        stored = stored_format({"quant_method": "fp8", "weight_block_size": wrong}, "mine")
        assert len(stored.mismatches(cast(Any, None))) == 1


def test_sparse_weights_are_not_read_and_dense_ones_are() -> None:
    how = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    for dense in ({}, None, {"format": "dense"}, {"ignore": []}):
        assert isinstance(stored_format({**how, "sparsity_config": dense}, "mine"), CompressedTensors)
    for sparse in ({"format": "sparse-24-bitmask"}, "x"):
        with pytest.raises(ConfigError, match="is stored by"):
            stored_format({**how, "sparsity_config": sparse}, "mine")


def test_each_form_of_compressed_tensors_is_read_and_an_unknown_one_is_not() -> None:
    forms = "pack-quantized float-quantized int-quantized naive-quantized nvfp4-pack-quantized mxfp4-pack-quantized"
    how = {"quant_method": "compressed-tensors", "config_groups": {}}
    for form in (*forms.split(), "mixed-precision"):
        assert isinstance(stored_format({**how, "format": form}, "mine"), CompressedTensors)
    with pytest.raises(
        ConfigError, match=r"stored by 'compressed-tensors' \(format 'marlin-24'\), which cannot be read"
    ):
        stored_format({**how, "format": "marlin-24"}, "mine")


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("fp8-rows", "input_scale input_zero_point output_scale output_global_scale k_scale v_scale q_scale"),
        ("nvfp4", "input_global_scale weight_shape k_scale v_scale q_scale"),
        ("nvfp4-modelopt", "input_scale k_scale v_scale"),
        ("fp4-scale", "activation_scale input_scale qscale_act"),
    ],
)
def test_scales_of_inputs_outputs_and_the_cache_are_no_weights(tmp_path: Path, name: str, beside: str) -> None:
    how, make = FORMATS[name]
    tensors, _ = make("q_proj", 64, 128)
    others = {f"q_proj.{leaf}": torch.ones(1) for leaf in beside.split()}
    base = base_of(tmp_path, {**others, **tensors, "norm.weight": torch.ones(4)})
    assert stored_format(how, "mine").tensors(base).keys() == {"q_proj.weight", "norm.weight"}


def test_a_mixed_base_has_weights_of_each_of_its_groups(tmp_path: Path) -> None:
    (ints, make_ints), (floats, make_floats) = FORMATS["int4-32"], FORMATS["fp8-rows"]
    groups = {"group_0": ints["config_groups"]["group_0"], "group_1": floats["config_groups"]["group_0"]}
    made, expected = make_ints("q_proj", 16, 64)
    more, others = make_floats("k_proj", 16, 64)
    base = base_of(tmp_path, {**made, **more})
    found = stored_format({**ints, "format": "mixed-precision", "config_groups": groups}, "mine").tensors(base)
    assert differing(cast(StoredTensor, found["q_proj.weight"]), expected) == []
    assert differing(cast(StoredTensor, found["k_proj.weight"]), others) == []


@pytest.mark.parametrize(("group", "scales"), [(16, "F8_E4M3"), (32, "F8_E8M0"), (64, None)])
def test_floats_of_4_bits_stay_where_their_groups_are_those_of_nvfp4_or_mxfp4(group: int, scales: str | None) -> None:
    how = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=group)
    kept = stored_format(how, "mine").kept(Parameter("model.layers.0.mlp.up_proj.weight", (64, 128), "linear", 0))
    assert (kept and kept.scales) == scales
    if kept is not None:
        assert kept.seconds == ("over" if group == 16 else "none"), "NVFP4's global scale divides"


def test_matrices_that_the_publisher_left_out_of_fp8_are_not_read_as_codes() -> None:
    stored = stored_format({"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "k_proj"]}, "mine")
    left, there = (
        Parameter(f"model.layers.0.self_attn.{name}.weight", (64, 128), "linear", 0) for name in ("k_proj", "q_proj")
    )
    assert stored.kept(left) is None
    assert stored.kept(there) is not None


EXPERTS = Parameter("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 128), "experts", 0)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("model.layers.0.mlp.experts", False),
        ("model.layers.0.mlp.experts.0.gate_proj", False),
        ("model.layers.0.mlp.experts.1.gate_proj", True),
        ("model.layers.0.mlp.experts.0.up_proj", True),
        ("*.experts.*", False),
        ("re:language_model\\.model\\.layers\\.0\\.", False),
        ("model.layers.0.mlp.exp", True),
        ("lm_head", True),
    ],
)
def test_experts_stay_in_16_bits_where_the_publisher_names_them_or_the_first_of_them(name: str, kept: bool) -> None:
    stored = stored_format({"quant_method": "mxfp4", "modules_to_not_convert": [name]}, "mine")
    assert (stored.kept(EXPERTS) is not None) is kept


def test_groups_that_cannot_be_read_are_described_and_then_refused_by_name() -> None:
    how = compressed("pack-quantized", num_bits=3, strategy="group", group_size=32)
    found = describe({**LLAMA_70B, "quantization_config": how})
    assert not any(part.kept for part in found.architecture.parameters)
    (said,) = found.stored.mismatches(cast(Any, None))
    assert "has config_groups that cannot be read (int of 3 bits by group)" in said
    no_pattern = {**compressed("pack-quantized", num_bits=4, strategy="group", group_size=32), "ignore": ["re:("]}
    found = describe({**LLAMA_70B, "quantization_config": no_pattern})
    assert not any(part.kept for part in found.architecture.parameters)


@pytest.mark.parametrize(("order", "stays"), [(None, True), ("static", True), ("group", False)])
def test_a_weight_whose_groups_are_of_any_columns_does_not_stay_in_4_bits(order: str | None, stays: bool) -> None:
    stored = stored_format(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder=order), "m"
    )
    kept = stored.kept(Parameter("model.layers.0.mlp.up_proj.weight", (64, 128), "linear", 0))
    assert (kept is not None) is stays
    assert stored.kept(Parameter("model.norm.weight", (64,), "small")) is None
    if kept is not None:
        assert not kept.zeros, "it is symmetric unless it says otherwise"


@pytest.mark.parametrize(
    ("name", "part", "change", "said"),
    [
        ("llm-int8", "SCB", None, "is in 8 bits in mine, and has no SCB with a number for each of its rows"),
        ("llm-int8", "SCB", torch.ones(15), "has no SCB"),
        ("llm-int8", "SCB", torch.ones(16).half(), "has no SCB"),
        (
            "gptq-4",
            "scales",
            None,
            r"has qweight \[32, 16\] of I32, qzeros \[2, 2\] of I32, g_idx \[256\] of I32 in mine",
        ),
        ("gptq-4", "qzeros", None, "which are not those of one matrix"),
        ("gptq-4", "scales", torch.ones(2, 17).half(), r"scales \[2, 17\] of F16.* which are not those"),
        ("gptq-4", "qzeros", torch.ones(2, 3).int(), "which are not those of one matrix"),
        ("gptq-4", "g_idx", torch.zeros(255).int(), "which are not those of one matrix"),
        ("nvfp4-modelopt", "weight_scale", None, "has no scales in mine that belong to its weight of U8"),
        ("nvfp4-modelopt", "weight_scale_2", None, "has no scales in mine"),
        ("nvfp4-modelopt", "weight_scale_2", torch.ones(2), "has no scales in mine"),
        ("fp8-modelopt", "weight_scale", torch.ones(2), "has no scales in mine that belong to its weight of F8_E4M3"),
    ],
)
def test_parts_that_do_not_belong_to_a_weight_are_named(
    tmp_path: Path, name: str, part: str, change: Tensor | None, said: str
) -> None:
    how, make = FORMATS[name]
    tensors, _ = make("q_proj", 16, 256)
    assert change is None or f"q_proj.{part}" in tensors or part == "g_idx"
    changed = {**tensors, f"q_proj.{part}": change}
    base = base_of(tmp_path, {key: value for key, value in changed.items() if value is not None})
    with pytest.raises(ConfigError, match=f"q_proj.*{said}"):
        stored_format(how, "mine").tensors(base)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "has group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "has checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "group_size": "x"}, "has group_size 'x'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"has weight_block_size \[128\]"),
    ],
)
def test_numbers_of_config_json_that_cannot_be_are_named(how: dict[str, Any], named: str) -> None:
    base = describe({**LLAMA_70B, "quantization_config": how})
    assert any(re.search(named, line) for line in base.stored.mismatches(cast(Any, None)))
