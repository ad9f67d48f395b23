"""A base that bitsandbytes quantized is loaded as it is, or refused with what does not fit."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.material import Workshop, quantize_base
from tests.nf4 import decoded
from tests.nf4 import quantized as packed_by_bitsandbytes
from tests.unit.base.test_stored_codes import base_of
from trainer.base.describe.description import stored_format
from trainer.base.find.check import check_base
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import empty_model
from trainer.base.partitions.filling import copy_packed
from trainer.base.rows.packed_parts import join_packed, unpacked
from trainer.base.rows.parameters import find_weights
from trainer.errors import ConfigError, Damaged
from trainer.model.attention import Attention
from trainer.model.held.blockwise import nested_code
from trainer.state.zero.division import Division
from trainer.state.zero.partition import Partition
from trainer.store.safetensors_index import PackedSources, PackedTensor, StoredTensor, Stretch, numel

DOUBLE = "quant.double=true"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("prequantized"))


@pytest.fixture(scope="module")
def quantized(workshop: Workshop) -> Path:
    return quantize_base(
        workshop.base, workshop.folder / "4bit", bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def check(workshop: Workshop, base: Path, *overrides: str) -> int:
    """-> the number of packed matrices of the model."""
    config = workshop.config("check", f"model.base={base}", *overrides)
    found = resolve_base(config.model)
    check_base(found, config)
    weights = find_weights(found, empty_model(found, config, Attention("sdpa", "")), config.model.layers)
    return sum(isinstance(source, PackedTensor) for source in weights.sources.values())


def refusal(workshop: Workshop, base: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        check(workshop, base, *overrides)
    return str(error.value)


def test_every_matrix_is_found_packed(workshop: Workshop, quantized: Path) -> None:
    assert check(workshop, quantized, DOUBLE) == 2 * 7
    assert check(workshop, quantized, DOUBLE, "model.layers=1") == 7


def test_settings_that_do_not_fit_are_refused_with_those_that_do(workshop: Workshop, quantized: Path) -> None:
    expected = "quant: the base is quantized already, and loaded as it is. Set quant.type: nf4 and quant.double: true."
    assert refusal(workshop, quantized) == expected
    assert refusal(workshop, quantized, DOUBLE, "quant.type=fp4") == expected
    assert re.match(
        r"quant\.block_size: 128, but model\.\S+\.weight is stored with 64 in .* Set quant\.block_size: 64\.$",
        refusal(workshop, quantized, DOUBLE, "quant.block_size=128"),
    )
    assert "_proj.weight was bfloat16 before it was quantized" in refusal(
        workshop, quantized, DOUBLE, "model.dtype=fp32"
    )
    config = workshop.config("check", f"model.base={quantized}", DOUBLE, "quant.cache=true")
    (mistake,) = resolve_base(config.model).description.mismatches(config)
    assert mistake.startswith("quant.cache: true has no effect")


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (".quant_state.bitsandbytes__nf4", f"its {Q_PROJ} is not in 4 bits, as all linear layers must be"),
        (".absmax", f"{Q_PROJ}.absmax has 0 bytes in .*, 64 by its quant_state. Copy the model again."),
        (".nested_quant_map", f"the scales of {Q_PROJ} in .* are not stored as bitsandbytes stores them today"),
    ],
)
def test_a_part_that_is_missing_is_named(
    workshop: Workshop, quantized: Path, tmp_path: Path, tensor: str, expected: str
) -> None:
    base = Path(shutil.copytree(quantized, tmp_path / "base"))
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(Q_PROJ + tensor, None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=expected):
        check(workshop, base, DOUBLE)


IN_4_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


class Bytes:
    """A stored tensor in memory."""

    dtype = "U8"

    def __init__(self, values: Tensor) -> None:
        self.values = values.contiguous().view(-1).view(torch.uint8)
        self.shape = (len(self.values),)

    def read(self, begin: int, end: int) -> bytearray:
        return bytearray(self.values[begin:end].numpy().tobytes())


def packed(
    weight: Tensor, double: bool = False, block_size: int = 64, quant_type: str = "nf4"
) -> tuple[PackedTensor, Tensor]:
    """`weight` as bitsandbytes packs it, and the values that it then stands for."""
    codes, state = packed_by_bitsandbytes(weight, quant_type, block_size, double)
    parts: dict[str, StoredTensor] = {"weight": Bytes(codes), "absmax": Bytes(state.absmax)}
    mean = None
    if double:
        assert state.state2 is not None
        assert state.offset is not None
        parts["nested_absmax"], mean = Bytes(state.state2.absmax), [float(state.offset)]
    made_of = str(weight.dtype).removeprefix("torch.")
    found = PackedTensor(tuple(weight.shape), PackedSources(parts, mean), quant_type, block_size, made_of)
    return found, decoded(codes, state)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_range_of_a_packed_weight_has_bitsandbytes_values(double: bool, dtype: torch.dtype) -> None:
    """Also if it begins and ends inside of a block, and the last block and the last byte are not full."""
    torch.manual_seed(2)
    weight, expected = packed(torch.randn(333, 131).mul(torch.rand(333, 1).mul(6).exp2()).to(dtype), double)
    source, flat = unpacked(weight), expected.flatten()
    assert (source.shape, numel(source)) == ((333, 131), 333 * 131)
    for begin, end in [*pairwise([0, 1, 63, 64, 130, 16383, 16385, 32768, 43600, len(flat)]), (20_000, 20_001)]:
        found = torch.frombuffer(source.read(begin, end), dtype=dtype)
        assert torch.equal(found, flat[begin:end]), (begin, end)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(40, 96), (13, 7)])
def test_a_weight_is_found_by_what_bitsandbytes_writes_beside_it(
    double: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    codes, state = packed_by_bitsandbytes(torch.randn(shape), "nf4", 64, double)
    beside = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    base = base_of(tmp_path, {"a.weight": codes, "b.weight": torch.ones(2), **beside})
    found = stored_format(IN_4_BITS, "mine").tensors(base)
    assert found.keys() == {"a.weight", "b.weight"}
    weight = found["a.weight"]
    assert isinstance(weight, PackedTensor)
    assert (weight.shape, weight.double, weight.made_of) == (shape, double, "float32")
    source = unpacked(weight)
    values = torch.frombuffer(source.read(0, numel(source)), dtype=torch.float32).view(shape)
    assert torch.equal(values, decoded(codes, state))


@pytest.mark.parametrize(("part", "size"), [("", 1919), ("", 1921), (".absmax", 59), (".absmax", 61)])
def test_a_part_of_a_packed_weight_that_has_other_bytes_than_its_shape_is_refused(
    part: str, size: int, tmp_path: Path
) -> None:
    codes, state = packed_by_bitsandbytes(torch.randn(40, 96), "nf4", 64, double=False)
    beside = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    beside[f"a.weight{part}"] = torch.zeros(size, dtype=torch.uint8 if not part else torch.float32)
    bytes_there, bytes_needed = (size, len(codes)) if not part else (4 * size, 4 * 60)
    base = base_of(tmp_path, {"a.weight": codes, **beside})
    with pytest.raises(ConfigError, match=rf"a\.weight{part} has {bytes_there} bytes in mine, {bytes_needed} by its"):
        stored_format(IN_4_BITS, "mine").tensors(base)


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]}


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (b"", "has 0 numbers. Allowed are 1 to 65536"),
        (bytes(2**16 + 1), "has 65537 numbers"),
        (bytes(2**16), "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (json.dumps({"quant_type": "nf4", "shape": []}), "it lacks blocksize, dtype"),
        (json.dumps(STATE | {"shape": 512}), "its shape is no list"),
        (json.dumps(STATE | {"nested_offset": 1}), "or its nested_offset no number"),
        (json.dumps(STATE | {"blocksize": 0}), "that are no sizes"),
        (json.dumps(STATE | {"shape": [8, -1]}), "that are no sizes"),
        (json.dumps(STATE | {"shape": [8, True]}), "that are no sizes"),
    ],
)
def test_a_quant_state_that_is_none_is_refused(written: bytes | str, why: str, tmp_path: Path) -> None:
    data = written.encode() if isinstance(written, str) else written
    state = torch.tensor(list(data), dtype=torch.uint8)
    base = base_of(tmp_path, {"a.weight": torch.zeros(256, 1).byte(), "a.weight.quant_state.bitsandbytes__nf4": state})
    with pytest.raises(ConfigError, match=why):
        stored_format(IN_4_BITS, "mine").tensors(base)


@pytest.mark.parametrize(("by", "block", "is_read"), [(1.0, 256, True), (0.5, 256, False), (1.0, 128, False)])
def test_scales_of_scales_are_read_by_the_map_of_bitsandbytes_alone(
    by: float, block: int, is_read: bool, tmp_path: Path
) -> None:
    said = json.dumps(STATE | {"nested_offset": 0.25, "nested_blocksize": block}).encode()
    parts = {
        "": torch.zeros(256, 1).byte(),
        ".absmax": torch.zeros(8).byte(),
        ".nested_absmax": torch.ones(1),
        ".nested_quant_map": by * nested_code(torch.device("cpu")),
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(said), dtype=torch.uint8),
    }
    base = base_of(tmp_path, {f"a.weight{name}": tensor for name, tensor in parts.items()})
    if is_read:
        found = stored_format(IN_4_BITS, "mine").tensors(base)
        assert found.keys() == {"a.weight"}
        assert cast(PackedTensor, found["a.weight"]).sources.mean == [0.25]
    else:
        with pytest.raises(
            ConfigError, match="the scales of a.weight in mine are not stored as bitsandbytes stores them"
        ):
            stored_format(IN_4_BITS, "mine").tensors(base)


@pytest.mark.parametrize(
    ("said", "kind", "double"), [({}, "fp4", False), ({"bnb_4bit_quant_type": "nf4"}, "nf4", False)]
)
def test_a_base_that_does_not_say_its_kind_of_4_bits_is_of_bitsandbytes_default(
    said: dict[str, Any], kind: str, double: bool, workshop: Workshop
) -> None:
    stored = stored_format({**IN_4_BITS, **said}, "mine")
    assert stored.mismatches(workshop.config("a", f"quant.type={kind}", "quant.double=false")) == []
    (mistake,) = stored.mismatches(workshop.config("a", f"quant.type={kind}", "quant.double=true"))
    assert mistake.endswith(f"Set quant.type: {kind} and quant.double: false.")


@pytest.mark.parametrize("double", [False, True])
def test_matrices_that_are_packed_one_by_one_are_a_stack_of_the_same_bytes(double: bool) -> None:
    torch.manual_seed(2)
    parts = [packed(torch.randn(8, 64), double)[0] for _ in range(3)]
    order = [2, 0, 1]
    found = join_packed(parts, [Stretch(index, 0, 512) for index in order], (3, 8, 64))
    assert found is not None
    assert (found.shape, found.double, found.block_size) == ((3, 8, 64), double, 64)
    means = [mean for index in order for mean in parts[index].sources.mean or ()]
    assert found.sources.mean == (means if double else None)
    assert found.sources.parts.keys() == parts[0].sources.parts.keys()
    for name, source in found.sources.parts.items():
        every = [parts[index].sources.parts[name] for index in order]
        assert source.read(0, numel(source)) == b"".join(one.read(0, numel(one)) for one in every), name


def test_two_halves_of_a_matrix_are_one_whose_blocks_are_theirs() -> None:
    """But 8-bit scales lie in blocks of their own, which may not end where a half does."""
    torch.manual_seed(2)
    halves = [Stretch(0, 0, 256), Stretch(1, 0, 256)]
    found = join_packed([packed(torch.randn(4, 64))[0] for _ in range(2)], halves, (1, 8, 64))
    assert found is not None
    assert [numel(source) for source in found.sources.parts.values()] == [256, 32]
    assert join_packed([packed(torch.randn(4, 64), double=True)[0] for _ in range(2)], halves, (1, 8, 64)) is None


def pair(*shape: int, **second: Any) -> list[PackedTensor | StoredTensor]:
    """Two packed weights of this shape, of which the second is packed by these options of `packed`."""
    return [packed(torch.randn(shape))[0], packed(torch.randn(shape), **second)[0]]


def one_plain() -> list[PackedTensor | StoredTensor]:
    return [pair(8, 64)[0], Bytes(torch.zeros(512, dtype=torch.uint8))]


WHOLE = [Stretch(0, 0, 512), Stretch(1, 0, 512)]
NOT_JOINED: dict[str, tuple[Callable[[], list[PackedTensor | StoredTensor]], list[Stretch], tuple[int, ...]]] = {
    "a matrix that is plain": (one_plain, WHOLE, (2, 8, 64)),
    "beginnings of matrices": (lambda: pair(8, 64), [Stretch(0, 0, 256), Stretch(1, 0, 256)], (2, 4, 64)),
    "ends of matrices": (lambda: pair(8, 64), [Stretch(0, 256, 256), Stretch(1, 256, 256)], (2, 4, 64)),
    "a block over two parts": (lambda: pair(3, 32), [Stretch(0, 0, 96), Stretch(1, 0, 96)], (1, 6, 32)),
    "a part over two matrices": (lambda: pair(8, 64), WHOLE, (4, 4, 64)),
    "no stack": (lambda: pair(8, 64), WHOLE, (16, 64)),
    "rows of a matrix": (lambda: pair(1, 64), [Stretch(0, 0, 64), Stretch(1, 0, 64)], (2, 64)),
    "made of two types": (
        lambda: [pair(8, 64)[0], packed(torch.randn(8, 64).bfloat16())[0]],
        WHOLE,
        (2, 8, 64),
    ),
    "blocks of two sizes": (lambda: pair(8, 64, block_size=128), WHOLE, (2, 8, 64)),
    "two kinds of codes": (lambda: pair(8, 64, quant_type="fp4"), WHOLE, (2, 8, 64)),
    "two kinds of scales": (lambda: pair(8, 64, double=True), WHOLE, (2, 8, 64)),
}


@pytest.mark.parametrize("case", NOT_JOINED)
def test_what_is_no_stack_of_whole_matrices_of_one_kind_is_not_joined_in_4_bits(case: str) -> None:
    parts, stretches, shape = NOT_JOINED[case]
    assert join_packed(parts(), stretches, shape) is None


@pytest.mark.parametrize("means", [1, 0])
def test_packed_weights_of_other_sizes_are_damage_and_their_means_are_taken(means: int) -> None:
    module: Any = SimpleNamespace(
        sizes={"weight": 4}, slices=2, form=SimpleNamespace(means=means), absmax_mean=torch.zeros(2 * means)
    )
    ranks: Any = SimpleNamespace(division=Division(1, 1), apart=False)
    made: Any = {"weight": Partition(torch.nn.Parameter(torch.zeros(4)), 0, 4, torch.zeros(4, dtype=torch.uint8))}
    right = [0.5, 2.0] if means else None

    def jobs(size: int, given: list[float] | None) -> list[Any]:
        parts: dict[str, StoredTensor] = {"weight": Bytes(torch.arange(size, dtype=torch.uint8))}
        return copy_packed(module, made, PackedSources(parts, given), ranks)

    (job,) = jobs(4, right)
    for piece in job.pieces():
        piece.place(piece.read())
    assert made["weight"].local.tolist() == [0, 1, 2, 3]
    assert module.absmax_mean.tolist() == (right or [])
    for size, given in ((5, right), (4, [1.0])):
        with pytest.raises(Damaged, match=f"packed weights of {{'weight': {size}}} bytes were found, where"):
            jobs(size, given)
