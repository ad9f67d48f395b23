"""transformers' own conversion of checkpoints, run on row numbers, tells which stored rows make up each parameter."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DeepseekV3Config
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from tests.composites import COMPOSITES, make_composite
from tests.families import FAMILIES, rows
from tests.material import byte_tokenizer, make_base
from tests.stored import read_index
from trainer.base.architecture import Linear
from trainer.base.describe.empty_model import unfilled_model
from trainer.base.describe.trial.small import small_settings
from trainer.base.find.check import LeftOutPart, check_weights_at_hand
from trainer.base.find.locate import resolve_base
from trainer.base.partitions.filling import as_tensor
from trainer.base.rows import conversion, parameters
from trainer.base.rows.conversion import Conversion, Converted, convert
from trainer.base.rows.parameters import find_all_weights, find_weights
from trainer.config import Model
from trainer.errors import ConfigError
from trainer.store.safetensors_index import Joined, PackedSources, PackedTensor, StoredTensor, numel
from trainer.store.store import open_store


@dataclass
class InMemory:
    """A stored tensor in memory; counts what is read of it."""

    values: Tensor
    dtype: str = "F32"
    read_elements: list[int] = field(default_factory=list[int])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def read(self, begin: int, end: int) -> bytearray:
        self.read_elements.append(end - begin)
        return bytearray(self.values.flatten()[begin:end].numpy().tobytes())


class OneParameter(torch.nn.Module):
    """One parameter of a shape, by name, to operations and to the renaming of tensors."""

    base_model_prefix = ""
    config = type("Settings", (), {"num_attention_heads": 2})()

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device="meta")))

    def get_parameter_or_buffer(self, name: str) -> Tensor:
        return self.get_parameter(name)


class Reversed(ConversionOps):
    """Turns rows round, which no test of whole rows may take for their order."""

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any) -> Any:  # type: ignore[override]
        return {target_patterns[0]: next(iter(input_dict.values()))[0].flip(-1)}


class Widened(ConversionOps):
    """Gives values another type than that of the files, and moves them, so that they are read by this operation."""

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any) -> Any:  # type: ignore[override]
        return {target_patterns[0]: next(iter(input_dict.values()))[0].flip(-1).float()}


class Increased(ConversionOps):
    """Adds to values, which no test of whole rows may take for the next row."""

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **_: Any) -> Any:  # type: ignore[override]
        return {target_patterns[0]: next(iter(input_dict.values()))[0] + 4}


def values(source: Any, step: int | None = None) -> Tensor:
    """All values of a source, read in parts of `step` elements, four at a time."""
    size = numel(source)
    step = step or size
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda at: source.read(at, min(size, at + step)), range(0, size, step))
        return as_tensor(bytearray(b"".join(parts)), source).view(source.shape)


def converted(
    monkeypatch: pytest.MonkeyPatch, converter: WeightConverter, stored: dict[str, Any], **shapes: tuple[int, ...]
) -> Conversion:
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [converter])
    model: Any = OneParameter(**shapes)
    return convert(model, stored)


EXPERTS = {f"e.{index}.{part}": (6, 9) for index in range(5) for part in ("a", "b")}
GATE_UP = [MergeModulelist(dim=0), Concatenate(dim=1)]
# Operations -> their patterns, the shapes of tensors that are stored, of the parameters, and the slices that values are
# made in.
OPERATIONS: dict[str, tuple[list[ConversionOps], Any, Any, dict[str, Any], dict[str, Any], int]] = {
    "experts, gate over up": (GATE_UP, ["e.*.a", "e.*.b"], "w", EXPERTS, {"w": (5, 12, 9)}, 0),
    "a projection split": ([Chunk(dim=0)], "qkv", ["q", "k"], {"qkv": (6, 9)}, {"q": (3, 9), "k": (3, 9)}, 0),
    "vectors joined": ([Concatenate(dim=0)], ["a", "b"], "w", {"a": (7,), "b": (5,)}, {"w": (12,)}, 0),
    "kernels joined": ([Concatenate(dim=0)], ["a", "b"], "w", {"a": (7, 1, 4), "b": (5, 1, 4)}, {"w": (12, 1, 4)}, 0),
    "rows in turn": ([Interleave(dim=1)], "s", "w", {"s": (5, 6, 9)}, {"w": (5, 6, 9)}, 0),
    "rows of heads": ([PermuteForRope()], "s", "w", {"s": (8, 9)}, {"w": (8, 9)}, 0),
    "a stack kept": ([Transpose(1, 2, check_dims=True)], "s", "w", {"s": (5, 6, 9)}, {"w": (5, 6, 9)}, 0),
    "a stack transposed": ([Transpose(1, 2, check_dims=True)], "s", "w", {"s": (5, 6, 9)}, {"w": (5, 9, 6)}, 5),
    "experts, transposed": ([*GATE_UP, Transpose(1, 2)], ["e.*.a", "e.*.b"], "w", EXPERTS, {"w": (5, 9, 12)}, 5),
    "slices mixed": ([Transpose(0, 1)], "s", "w", {"s": (5, 6, 9)}, {"w": (6, 5, 9)}, 0),
    "slices and columns mixed": ([Transpose(0, 2)], "s", "w", {"s": (5, 6, 9)}, {"w": (9, 6, 5)}, 1),
    "a matrix transposed": ([Transpose(0, 1)], "s", "w", {"s": (6, 9)}, {"w": (9, 6)}, 1),
    "columns split": ([Chunk(dim=1)], "qk", ["q", "k"], {"qk": (6, 8)}, {"q": (6, 4), "k": (6, 4)}, 1),
    "columns turned": ([Reversed()], "s", "w", {"s": (6, 9)}, {"w": (6, 9)}, 1),
    "other values": ([Increased()], "s", "w", {"s": (6, 9)}, {"w": (6, 9)}, 1),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_every_operation_gives_transformers_own_values_read_whole_or_in_parts(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations, sources, targets, stored_shapes, shapes, slices = OPERATIONS[case]
    stored = {name: InMemory(torch.randn(shape)) for name, shape in stored_shapes.items()}
    found = converted(monkeypatch, WeightConverter(sources, targets, operations), stored, **shapes)
    assert (found.failed, found.others, found.sources.keys()) == ({}, {}, shapes.keys())

    spare: Any = WeightConverter(sources, targets, operations)
    for name, held in stored.items():
        spare.collected_tensors[spare.rename_source_key(name)[1]].append(held.values)
    expected = spare.convert(next(iter(shapes)), model=OneParameter(**shapes), config=OneParameter.config)
    for name, source in found.sources.items():
        assert source.shape == shapes[name]
        assert getattr(source, "slices", 0) == slices
        assert torch.equal(values(source), expected[name])
        assert torch.equal(values(source, step=7), expected[name])


def test_a_slice_that_needs_values_is_read_once_however_many_pieces_it_is_read_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = InMemory(torch.randn(5, 6, 9))
    converter = WeightConverter("s", "w", [Transpose(1, 2)])
    source = converted(monkeypatch, converter, {"s": stack}, w=(5, 9, 6)).sources["w"]
    assert isinstance(source, Converted)
    assert torch.equal(values(source, step=10), stack.values.transpose(1, 2))
    assert stack.read_elements == [54] * 5
    source.read(54 * 3 + 1, 54 * 3 + 2)
    assert len(stack.read_elements) == 5  # these few are still kept


def test_what_does_not_fit_together_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failure(**stored: Any) -> str:
        (reason,) = converted(monkeypatch, converter, stored, w=(8, 9)).failed.values()
        return reason

    converter = WeightConverter(["a", "b"], "w", [Concatenate(dim=0)])
    whole, narrow, half = InMemory(torch.randn(4, 9)), InMemory(torch.randn(4, 8)), InMemory(torch.randn(4, 9), "F16")
    packed = PackedTensor((4, 9), PackedSources({"weight": whole, "absmax": whole}, None), "nf4", 64, "bfloat16")
    assert "2 tensors such as a: Sizes of tensors must match" in failure(a=whole, b=narrow)
    assert failure(a=whole, b=half) == "2 tensors such as a: they are of several types"
    assert failure(a=packed, b=whole) == "2 tensors such as a: they are of several types"
    short = converted(monkeypatch, converter, {"a": whole}, w=(8, 9)).sources["w"]
    assert short.shape == (4, 9)


def test_of_two_tensors_for_one_weight_the_first_is_taken_and_the_other_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [WeightRenaming("old", "w")])
    model: Any = OneParameter(w=(4, 9))
    stored: Any = {"w": InMemory(torch.zeros(4, 9)), "old": InMemory(torch.ones(4, 9)), "else": InMemory(torch.ones(1))}
    found = convert(model, stored)
    assert found.sources == {"w": stored["old"]}
    assert found.others == {"w": "w", "else": "else"}


def test_a_weight_that_cannot_be_made_or_is_in_4_bits_where_the_run_needs_16_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base: Any = SimpleNamespace(
        name="mine",
        stored=SimpleNamespace(quantized=False),
        architecture=SimpleNamespace(linear_layers=tuple, quantizable=tuple),
    )
    model: Any = OneParameter(w=(4, 9))
    monkeypatch.setattr(parameters, "_convert", lambda *_: Conversion(failed={"w": "sizes do not match"}))
    with pytest.raises(
        ConfigError, match=r"^model\.base: w cannot be made of what mine has for it \(sizes do not match\)"
    ):
        find_weights(base, model)
    part = InMemory(torch.zeros(1))
    packed = PackedTensor((4, 9), PackedSources({"weight": part, "absmax": part}, None), "nf4", 64, "bfloat16")
    with pytest.raises(
        ConfigError, match=r"^model\.base: w is in 4 bits in mine, but the run computes with it in 16\."
    ):
        parameters._checked(base, "w", model.w, packed)


@pytest.mark.parametrize("kind", rows(FAMILIES))
def test_files_give_the_weights_and_the_family_gives_the_buffers_and_types_that_transformers_loads(
    kind: str, tmp_path: Path
) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(make_base(tmp_path, kind), dtype=torch.bfloat16)
    model = unfilled_model(AutoConfig.from_pretrained(tmp_path), torch.bfloat16)
    stored, expected = model.state_dict(), loaded.state_dict()
    assert all(tensor.is_meta for tensor in stored.values())
    assert {name: tensor.dtype for name, tensor in stored.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    computed = dict(loaded.named_non_persistent_buffers())
    assert computed.keys() == dict(model.named_non_persistent_buffers()).keys()
    for name, buffer in model.named_non_persistent_buffers():
        assert buffer.dtype == computed[name].dtype, name
        assert torch.equal(buffer, computed[name]), name

    found = convert(model, read_index(open_store(str(tmp_path))))
    assert (found.failed, found.others) == ({}, {})
    assert expected.keys() - found.sources.keys() <= loaded.all_tied_weights_keys.keys()
    for name, source in found.sources.items():
        assert torch.equal(values(source).to(expected[name].dtype), expected[name]), name
        assert torch.equal(values(source, 1001), values(source)), name


# A model that sees -> the parts of it that its language model is without.
LEFT_OUT = {
    "gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    "gemma4": {"model.vision_tower", "model.embed_vision"},
    "qwen3_5": {"model.visual"},
    "qwen3_5_moe": {"model.visual"},
    "mistral3": {"model.vision_tower", "model.multi_modal_projector"},
    "llama4": {"vision_model", "multi_modal_projector"},
    "kimi_k25": {"model.vision_tower", "model.mm_projector"},
}


@pytest.mark.parametrize("kind", COMPOSITES)
def test_the_language_model_in_a_model_that_sees_is_found_and_nothing_else(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_composite(tmp_path, kind)
    base = resolve_base(Model(base=str(tmp_path)))
    found = find_all_weights(base)
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    prefix = "" if hasattr(decoder, "lm_head") else "model."
    expected = {f"{prefix}{name}": value for name, value in decoder.state_dict().items()} | {
        "lm_head.weight": head.weight
    }
    assert len(base.tensors) > len(found.sources)
    # All weights of the whole model are in one of its parts: the language model, or one that is left out and named.
    every = sum(value.numel() for value in {value.data_ptr(): value for value in whole.state_dict().values()}.values())
    taken = sum(math.prod(source.shape) for source in found.sources.values())
    assert taken + sum(part.weights for part in found.left_out) == every
    assert {part.path for part in found.left_out} == LEFT_OUT[kind]
    with monkeypatch.context() as without_cache:
        without_cache.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert check_weights_at_hand(Model(base=str(tmp_path))) == found.left_out
    assert expected.keys() - base.architecture.tied.keys() == found.sources.keys()
    for name, source in found.sources.items():
        assert torch.equal(values(source), expected[name].to(values(source).dtype)), name

    file = min(tmp_path.glob("*.safetensors"))
    tensors = load_file(file) | {"model.layers.0.self_attn.odd": torch.ones(2)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has the tensor model\.layers\.0\.self_attn\.odd, .* \(1 such"):
        find_all_weights(resolve_base(Model(base=str(tmp_path))))


def test_a_layer_that_files_hold_transposed_is_a_linear_one(tmp_path: Path) -> None:
    base = resolve_base(Model(base=str(make_base(tmp_path, model_type="gpt2", hidden_size=60))))
    assert sorted(base.architecture.linear_names) == ["c_attn", "c_fc", "c_proj"]
    assert base.architecture.linear_layers()["transformer.h.0.attn.c_attn"] == Linear(inputs=60, outputs=180)
    stored = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    layers = {f"{path}.weight" for path in base.architecture.linear_layers()}
    for name, source in find_all_weights(base).sources.items():
        expected = stored[name].t() if name in layers else stored[name]
        assert torch.equal(values(source), expected.to(values(source).dtype)), name
        assert torch.equal(values(source, 1001), values(source)), name


def test_values_that_an_operation_widens_are_read_in_the_type_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = InMemory(torch.randn(6, 9).half(), "F16")
    source = converted(monkeypatch, WeightConverter("s", "w", [Widened()]), {"s": stored}, w=(6, 9)).sources["w"]
    assert torch.equal(values(source), stored.values.flip(-1))


def test_layers_that_predict_several_tokens_are_left_out_and_named(tmp_path: Path) -> None:
    file = min(make_base(tmp_path, "qwen3-next").glob("*.safetensors"))
    several = {"mtp.fc.weight": torch.ones(3, 5), "mtp.layers.0.norm.weight": torch.ones(7)}
    save_file(load_file(file) | several, file, metadata={"format": "pt"})
    assert find_all_weights(resolve_base(Model(base=str(tmp_path)))).left_out == [LeftOutPart("mtp", 2, 22)]


@dataclass(frozen=True)
class Named:
    """A stored tensor of which only the header is known."""

    shape: tuple[int, ...]
    dtype: str = "BF16"

    def read(self, begin: int, end: int) -> bytearray:
        raise AssertionError("a weight was read")


def test_the_index_of_a_model_of_671_billion_weights_takes_seconds_and_its_rows_are_shared_by_its_layers() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(), dtype=torch.bfloat16)
    stored: dict[str, StoredTensor] = {}
    for name, tensor in model.state_dict().items():
        path, shape = name.rpartition(".")[0], tuple(tensor.shape)
        if name.endswith("gate_up_proj"):
            for expert in range(shape[0]):
                for part in ("gate_proj", "up_proj"):
                    stored[f"{path}.{expert}.{part}.weight"] = Named((shape[1] // 2, shape[2]))
        elif name.endswith("experts.down_proj"):
            stored |= {f"{path}.{expert}.down_proj.weight": Named(shape[1:]) for expert in range(shape[0])}
        else:
            stored[name] = Named(shape)
    assert len(stored) > 45_000
    started = time.process_time()
    found = convert(model, stored)
    assert time.process_time() - started < 30
    assert not found.failed
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        name: source.shape for name, source in found.sources.items()
    }
    stacks = [source for source in found.sources.values() if isinstance(source, Joined)]
    assert len(stacks) == 2 * 58
    assert len({id(stack.stretches) for stack in stacks}) == 2
    assert all(sum(stretch.numel for stretch in stack.stretches) == math.prod(stack.shape) for stack in stacks)


def test_experts_that_compute_nothing_may_be_in_the_files_or_not(tmp_path: Path) -> None:
    """transformers writes a matrix for each of LongCat's experts without weights, which no published file has."""
    config: Any = CONFIG_MAPPING["longcat_flash"]()
    made: Any = type(config)(**{**small_settings(config), "zero_expert_num": 2})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    name, count = "model.layers.0.mlp.experts.gate_up_proj", made.n_routed_experts
    source: Any = find_all_weights(resolve_base(Model(base=str(tmp_path)))).sources[name]
    first = source.read(0, math.prod(source.shape))
    (file,) = tmp_path.glob("*.safetensors")
    idle = tuple(f".experts.{count + number}." for number in range(2))
    stored = load_file(file)
    assert any(part in key for key in stored for part in idle)
    published = {key: value for key, value in stored.items() if not any(part in key for part in idle)}
    save_file(published, file, {"format": "pt"})
    source = find_all_weights(resolve_base(Model(base=str(tmp_path)))).sources[name]
    assert source.shape[0] == count
    assert source.read(0, math.prod(source.shape)) == first
