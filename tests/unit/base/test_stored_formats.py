"""Weights in FP8 and MXFP4 are decoded range by range to the very bits of their makers' and transformers' own
decoding.
"""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from tests.material import SIZES, Workshop, make_base
from tests.stored import edit_config, from_fp8, from_mxfp4, read_files, read_index, store_in_fp8, store_in_mxfp4, to_fp8
from trainer.base.describe.description import describe, without_quantization
from trainer.base.describe.language_model import model_config
from trainer.base.find.check import check_base
from trainer.base.find.locate import resolve_base
from trainer.base.rows.parameters import find_all_weights
from trainer.base.stored.gptq import Awq
from trainer.base.stored.shared.cached_values import LastMade, LastReads
from trainer.base.stored.shared.coded import E2M1, E4M3, E8M0, Coded, Mxfp4Experts, round_to_bf16
from trainer.config import Config
from trainer.errors import ConfigError, StorageError
from trainer.export.proof.models import dequantized_by_transformers
from trainer.model.held.codes import Code
from trainer.plan.plan import make_plan
from trainer.plan.resolve import resolve
from trainer.store.safetensors_index import PackedTensor, StoredTensor, TensorSource
from trainer.store.store import Store, open_store

TILE = (128, 128)
FULL = ("tuning.method=full", "tuning.rank=16", "tuning.alpha=32", "quant.type=none", "data.packing=false")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def fp8(workshop: Workshop, tmp_path: Path) -> Path:
    return store_in_fp8(workshop.base, tmp_path / "fp8", (16, 32))


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    plain = make_base(tmp_path / "plain", "gpt-oss", hidden_size=64, intermediate_size=32, num_hidden_layers=1)
    return store_in_mxfp4(plain, tmp_path / "mxfp4")


def stored(folder: Path, *tensors: Tensor) -> tuple[Store, list[TensorSource]]:
    """The tensors as sources in a file."""
    save_file({str(number): tensor for number, tensor in enumerate(tensors)}, folder / "model.safetensors")
    store = open_store(str(folder))
    index = read_index(store)
    return store, [index[str(number)] for number in range(len(tensors))]


def look(config: Config) -> None:
    """All that the launcher, and then the ranks, check before a weight is read."""
    found = resolve_base(config.model)
    check_base(found, config)
    find_all_weights(found)


def values(source: StoredTensor | PackedTensor, begin: int, end: int) -> Tensor:
    """The bits of a range."""
    assert not isinstance(source, PackedTensor)
    return torch.frombuffer(source.read(begin, end), dtype=torch.int16)


def differing_ranges(source: StoredTensor, expected: Tensor, ranges: Sequence[tuple[int, int]] = ()) -> list[Any]:
    """Those of many ranges that are not the bits of `expected`: of the whole, of single weights, and of any length."""
    draw, size = random.Random(3), expected.numel()
    several = [tuple(sorted(draw.sample(range(size + 1), 2))) for _ in range(40)]
    bits = expected.flatten().view(torch.int16)
    every = [(0, size), (0, 1), (size - 1, size), (5, 5), *several, *ranges]
    return [span for span in every if span[0] < span[1] and not torch.equal(values(source, *span), bits[slice(*span)])]


def test_small_floats_are_torchs_own() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)
    assert np.array_equal(E8M0, codes.view(torch.float8_e8m0fnu).float().numpy(), equal_nan=True)
    assert E2M1.tolist() == FP4_VALUES
    numbers = torch.cat([torch.randn(5000), torch.randn(5000) * 1e-39, torch.tensor([3.4e38, float("inf"), -0.0])])
    rounded = np.empty(len(numbers), np.uint16)
    round_to_bf16(numbers.clone().numpy(), rounded)
    assert np.array_equal(rounded, numbers.bfloat16().view(torch.uint16).numpy())


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(576, 320), (192, 256), (128, 70), (1, 1000), (300, 1)])
def test_any_range_of_fp8_is_each_weight_times_the_scale_of_its_tile(
    tmp_path: Path, shape: tuple[int, int], scales: torch.dtype
) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape) * torch.arange(1, shape[0] + 1)[:, None]
    quantized, by = to_fp8(weight, TILE, scales)
    store, sources = stored(tmp_path, quantized, by)
    source = Coded(sources[0], sources[1], shape, Code("e4m3", TILE), LastReads(2))
    columns = shape[1]
    rows = [(row * columns, (row + 1) * columns) for row in (0, shape[0] // 2, shape[0] - 1)]
    assert differing_ranges(source, from_fp8(quantized, by, TILE), rows) == []
    assert source.shape == shape
    before = store.range_bytes
    source.read(1, min(700, weight.numel()))
    assert store.range_bytes - before == min(700, weight.numel()) - 1  # the scales are there already
    # A tile of another size means other weights.
    others = Coded(sources[0], sources[1], shape, Code("e4m3", shape), LastReads(2))
    assert by.numel() == 1 or differing_ranges(others, from_fp8(quantized, by, TILE)) != []


def test_scales_may_be_exponents_as_plain_bytes_and_matrices_may_be_stacked(tmp_path: Path) -> None:
    torch.manual_seed(1)
    parts = [to_fp8(torch.randn(70, 45) * size, (16, 32), torch.float8_e8m0fnu) for size in (1, 30, 900)]
    _, sources = stored(
        tmp_path,
        torch.stack([part.view(torch.uint8) for part, _ in parts]).view(torch.float8_e4m3fn),
        torch.stack([by.view(torch.uint8) for _, by in parts]),
    )
    expected = torch.stack([from_fp8(part, by, (16, 32)) for part, by in parts])
    source = Coded(sources[0], sources[1], (3, 70, 45), Code("e4m3", (16, 32)), LastReads(2))
    assert differing_ranges(source, expected, [(70 * 45 - 3, 70 * 45 + 3), (100, 2 * 70 * 45 + 100)]) == []


def test_transformers_has_other_tiles_where_128_does_not_divide_the_rows(tmp_path: Path) -> None:
    dequantize = Fp8Dequantize(None)._dequantize_one
    for rows, right in ((256, True), (192, False)):
        quantized, by = to_fp8(torch.randn(rows, 256) * torch.arange(1, rows + 1)[:, None], TILE)
        assert torch.equal(dequantize(quantized, by, torch.bfloat16), from_fp8(quantized, by, TILE)) == right
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        dequantize(*to_fp8(torch.randn(576, 256), TILE), torch.bfloat16)


def test_transformers_loads_a_base_as_it_is_read_here(workshop: Workshop, fp8: Path, mxfp4: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = Fp8Dequantize._dequantize_one
    for base in (fp8, mxfp4):
        found = resolve_base(workshop.config("t", f"model.base={base}").model)
        assert found.stored.decoded
        config = model_config(base, None)
        with dequantized_by_transformers(config):
            model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.bfloat16)
        expected = read_files(base / "decoded")
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
            assert torch.equal(
                values(found.weights[name], 0, parameter.numel()), expected[name].flatten().view(torch.int16)
            )
    assert Fp8Dequantize._dequantize_one is original


def test_any_range_of_mxfp4_is_in_the_parameters_order_with_transformers_bits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
    scales = torch.randint(0, 250, (3, 40, 2), dtype=torch.uint8)
    store, sources = stored(tmp_path, blocks, scales)
    expected = convert_moe_packed_tensors(blocks, scales)
    source = Mxfp4Experts(sources[0], sources[1], LastReads(4))
    assert source.shape == (3, 64, 40) == tuple(expected.shape)
    assert torch.equal(from_mxfp4(blocks, scales).view(torch.int16), expected.view(torch.int16))
    assert differing_ranges(source, expected, [(64 * 40 - 3, 64 * 40 + 3), (39, 32 * 40 + 1)]) == []
    # In the stored order they would be others.
    assert differing_ranges(source, expected.mT.contiguous()) != []
    # Pieces that follow each other read each expert once.
    again, before = Mxfp4Experts(sources[0], sources[1], LastReads(4)), store.range_bytes
    for begin in range(0, expected.numel(), 100):
        again.read(begin, min(begin + 100, expected.numel()))
    assert store.range_bytes - before == blocks.numel() + scales.numel()


def test_every_scale_and_every_half_byte_of_mxfp4_is_exact(tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    _, sources = stored(tmp_path, blocks, scales)
    source = Mxfp4Experts(sources[0], sources[1], LastReads(4))
    expected = convert_moe_packed_tensors(blocks, scales).flatten()
    finite = expected.isfinite()
    assert finite.sum() > 0.99 * len(finite)
    assert torch.equal(values(source, 0, len(expected))[finite], expected.view(torch.int16)[finite])


def test_threads_that_want_the_same_range_share_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, (source,) = stored(tmp_path, torch.arange(100, dtype=torch.uint8))
    kept, plain, together = LastReads(2), TensorSource.read, threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        before = store.range_bytes

        def read(_: int) -> bytes:
            together.wait()
            return bytes(kept.read(source, 10, 20))

        assert set(pool.map(read, range(4))) == {bytes(range(10, 20))}
    assert store.range_bytes - before == 10
    kept.read(source, 20, 40)
    kept.read(source, 10, 20)
    kept.read(source, 40, 60)  # which puts away the one that was not wanted for longest
    kept.read(source, 10, 20)
    assert store.range_bytes - before == 10 + 20 + 20
    kept.read(source, 20, 40)
    assert store.range_bytes - before == 10 + 20 + 20 + 20

    def fail(self: TensorSource, begin: int, end: int) -> bytearray:
        raise StorageError("gone")

    monkeypatch.setattr(TensorSource, "read", fail)
    with pytest.raises(StorageError, match="gone"):
        kept.read(source, 60, 70)
    monkeypatch.setattr(TensorSource, "read", plain)
    assert kept.read(source, 60, 70) == bytes(range(60, 70))


def test_the_plan_knows_both_formats(workshop: Workshop, fp8: Path, mxfp4: Path) -> None:
    for base in (fp8, mxfp4):
        config = workshop.config("t", f"model.base={base}", "data.packing=false", "model.attention=eager")
        found = resolve_base(config.model)
        check_base(found, config)
        plain = resolve_base(workshop.config("t", f"model.base={base}/decoded").model)
        ours, theirs = (make_plan(config, one.description, 2, 2, None) for one in (found, plain))
        assert ours == theirs
        # A training of the base itself is exported in 16 bits.
        full = workshop.config("t", f"model.base={base}", *FULL)
        assert make_plan(full, found.description, 2, 2, None).mismatches == []
        resolve(full, found)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r"'modelopt' \(quant_algo 'W4A8_AWQ'\)"),
        ({"quant_method": "gptq", "bits": 3}, r"'gptq' \(bits 3\)"),
        ({"quant_method": "gptq", "bits": 2}, r"'gptq' \(bits 2\)"),
        ({"quant_method": "awq", "bits": 8, "version": "gemm"}, "'awq'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'awq'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, r"'compressed-tensors' \(format 'marlin-24'\)"),
        ({"quant_method": "fp8", "expert_dtype": "int3"}, r"'fp8' \(expert_dtype 'int3'\)"),
        ({"quant_method": "fbgemm_fp8"}, "'fbgemm_fp8', which cannot be read"),
        ({"bits": 4}, r"null \(bits 4\)"),
    ],
)
def test_another_format_is_refused_by_its_name(quantization: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model.base: mine is stored by .*{named}.* Give the 16-bit model"):
        describe({**SIZES, "model_type": "llama", "quantization_config": quantization}, name="mine")


@pytest.mark.parametrize("version", [{}, {"version": "gemm"}, {"version": "GEMM"}])
def test_awqs_usual_layout_is_read_however_it_is_written(version: dict[str, str]) -> None:
    how = {"quant_method": "awq", "bits": 4, "group_size": 128, **version}
    assert type(describe({**SIZES, "model_type": "llama", "quantization_config": how}, name="mine").stored) is Awq


def test_the_plain_base_of_a_quantized_one_says_nothing_of_fewer_bits() -> None:
    stored = {"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4"}
    plain = {"model_type": "llama", "hidden_size": 8}
    assert without_quantization({**plain, **stored}) == plain
    text = {"text_config": {**plain, **stored}}
    assert without_quantization({**text, **stored}) == {"text_config": {**plain, "expert_dtype": "fp4"}}
    assert without_quantization({"text_config": None}) == {"text_config": None}


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors of a base, which becomes one file."""

    def apply(base: Path) -> None:
        tensors = read_files(base)
        change(tensors)
        for file in base.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    return apply


def tiles(*sides: Any) -> Callable[[Path], None]:
    how = {"quant_method": "fp8", "weight_block_size": list(sides) or None}
    return lambda base: edit_config(base, quantization_config=how)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (rewritten(lambda t: t.pop(f"{Q_PROJ}_scale_inv")), f"{Q_PROJ} is in FP8 in .*, and has no scales for its tiles"),
    (
        rewritten(lambda t: t.update({f"{Q_PROJ}_scale_inv": torch.ones(2, 4)})),
        rf"the scales of {Q_PROJ} are \[2, 4\] of F32 in .* have \[4, 2\]",
    ),
    (
        rewritten(lambda t: t.update({f"{Q_PROJ}_scale_inv": torch.ones(4, 2, dtype=torch.int32)})),
        rf"the scales of {Q_PROJ} are \[4, 2\] of I32",
    ),
    (
        tiles(128, 128),
        r"the scales of .* are \[2, 2\] of F32 in .* Tiles of 128 x 128 of its \[32, 64\] have \[1, 1\]",
    ),
    (tiles(), r"the scales of .* are \[2, 2\] of F32 in .* Tiles of 32 x 64 of its \[32, 64\] have \[1, 1\]"),
    (tiles(16, 0), r"config.json has weight_block_size \[16, 0\] in its quantization_config. Possible are two whole"),
    (tiles(16, 32, 1), r"config.json has weight_block_size \[16, 32, 1\]"),
    (lambda base: edit_config(base, quantization_config=None), f"{Q_PROJ} is of type F8_E4M3. Readable are BF16"),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_fp8_that_is_not_as_it_should_be_is_refused(
    workshop: Workshop, fp8: Path, damage: Callable[[Path], None], expected: str
) -> None:
    config = workshop.config("t", f"model.base={fp8}")
    check_base(resolve_base(config.model), config)
    damage(fp8)
    with pytest.raises(ConfigError, match=expected):
        look(config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{EXPERTS}_scales"), r"has blocks \[4, 64, 2, 16\] of U8 and no scales"),
        (lambda t: t.update({f"{EXPERTS}_scales": torch.ones(4, 64, 1).byte()}), r"and scales \[4, 64, 1\] of U8"),
        (lambda t: t.update({f"{EXPERTS}_scales": torch.ones(4, 64, 2)}), r"and scales \[4, 64, 2\] of F32"),
        (lambda t: t.pop(f"{EXPERTS}_blocks"), f"has no tensor {EXPERTS}"),
        (
            lambda t: t.update(
                {f"{EXPERTS}_{part}": t[f"{EXPERTS}_{part}"][:, :, :0] for part in ("blocks", "scales")}
            ),
            r"has blocks \[4, 64, 0, 16\] of U8 and scales \[4, 64, 0\] of U8",
        ),
    ],
)
def test_mxfp4_that_is_not_as_it_should_be_is_refused(
    workshop: Workshop, mxfp4: Path, change: Callable[[dict[str, Tensor]], Any], expected: str
) -> None:
    config = workshop.config("t", f"model.base={mxfp4}", "data.packing=false")
    check_base(resolve_base(config.model), config)
    rewritten(change)(mxfp4)
    with pytest.raises(ConfigError, match=expected):
        look(config)


def test_one_scale_for_a_whole_matrix_and_scales_of_inputs_are_read(workshop: Workshop, tmp_path: Path) -> None:
    base = store_in_fp8(workshop.base, tmp_path / "whole", None, torch.bfloat16, ("activation_scale",))
    config = workshop.config("t", f"model.base={base}")
    found = resolve_base(config.model)
    check_base(found, config)
    decoded = read_files(base / "decoded")
    assert set(found.weights) == set(decoded)
    for name, source in found.weights.items():
        assert torch.equal(values(source, 0, decoded[name].numel()), decoded[name].flatten().view(torch.int16)), name


def test_a_value_that_could_not_be_made_is_made_again_and_the_one_that_was_asked_for_last_stays() -> None:
    made = LastMade[int]()

    def fails() -> int:
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        made.get("a", 2, fails)
    assert [made.get(key, 2, lambda value=value: value) for value, key in enumerate("abac")] == [0, 1, 0, 3]
    assert made.get("a", 2, fails) == 0
    assert made.get("b", 2, lambda: 9) == 9, "it has made room"


@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unrounded", [False, True])
def test_codes_of_8_bits_are_decoded_to_the_type_that_is_asked_for(unrounded: bool, asked: torch.dtype | None) -> None:
    """The tiles at the edges are cut: 3 x 5 values in tiles of 2 x 4."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 5, generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, generator=draw) + 0.1
    config: Any = SimpleNamespace(quantization_config={"weight_block_size": [2, 4]})
    before = Fp8Dequantize._dequantize_one
    with dequantized_by_transformers(config, unrounded=unrounded):
        found = Fp8Dequantize(None)._dequantize_one(codes, scales, asked)
    assert Fp8Dequantize._dequantize_one is before
    assert config.quantization_config["dequantize"] is True
    expected = codes.float() * scales.repeat_interleave(2, 0)[:3].repeat_interleave(4, 1)[:, :5]
    expected = expected if unrounded else expected.bfloat16()
    assert torch.equal(found, expected.to(asked or torch.bfloat16))
