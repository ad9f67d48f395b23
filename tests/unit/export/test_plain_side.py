"""The side of a proof that plain libraries compute: how an adapter is merged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config import Quant
from trainer.errors import ConfigError
from trainer.export.proof import plain
from trainer.export.proof.plain import merge_and_round
from trainer.export.proof.streamed import PackedWeight


def test_an_adapter_is_merged_in_fp32_and_rounded_once_to_what_the_files_hold() -> None:
    torch.manual_seed(0)
    inner = nn.Linear(64, 48, bias=False).bfloat16()
    base, before = nn.ModuleDict({"inner": inner}), inner.weight.detach().clone()
    config = LoraConfig(r=16, lora_alpha=24, target_modules=["inner"], init_lora_weights=False)
    adapted: Any = get_peft_model(base, config)  # type: ignore[arg-type]  # any module does
    layer = adapted.base_model.model["inner"]
    down, up = (getattr(layer, name)["default"].weight.bfloat16().float() for name in ("lora_A", "lora_B"))
    adapted.bfloat16()
    merge_and_round(adapted, {"inner.weight": torch.bfloat16, "embedding": torch.float16}, "embedding")
    expected = (before.float() + 1.5 * up @ down).bfloat16()
    assert torch.equal(layer.base_layer.weight.bfloat16(), expected)


class Seeing(nn.Module):
    """A class whose tower says in which type it is when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.decoder = nn.Linear(3, 2).bfloat16(), nn.Linear(2, 2).bfloat16()

    def forward(self, input_ids: Any = None, use_cache: Any = None, pixels: Any = None) -> torch.dtype:
        assert self.decoder.weight.dtype == torch.bfloat16
        return self.tower.weight.dtype


def test_a_tower_is_in_fp32_from_the_first_picture_on_and_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "beside_decoder", lambda whole: whole.tower.state_dict(keep_vars=True))
    whole = Seeing()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    with plain._seeing_in_fp32(whole):
        assert whole(input_ids=1, use_cache=False) == torch.bfloat16
        assert whole(input_ids=1, pixels=2) == whole(input_ids=1) == torch.float32
        assert torch.equal(whole.tower.weight, before["tower.weight"].float())
    assert whole(input_ids=1, pixels=2) == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def _values(weight: Any) -> torch.Tensor:
    """What bitsandbytes makes of a weight that it has packed."""
    return bnb.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_is_quantized_as_for_the_training_where_bitsandbytes_has_a_layer_and_by_its_values_elsewhere(
    kind: str,
) -> None:
    quant = Quant.model_validate({"type": kind} | ({"double": False} if kind == "nf4" else {}))
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({name: nn.Linear(64, 128) for name in ("packed", "adapted", "head")})
    model["turned"], model["short"] = Conv1D(128, 64), nn.Linear(48, 4)
    model["experts"] = nn.ParameterDict({"up": torch.randn(2, 64, 64), "scale": torch.randn(64, 64)})
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    names = [f"{name}.weight" for name in ("packed", "adapted", "turned", "short")]
    plain.quantize(model, quant, torch.float32, [*names, "experts.up", "experts.scale"], unpacked=("adapted.weight",))

    def left(name: str, **how: Any) -> torch.Tensor:
        return PackedWeight(before[name], quant, torch.float32, **how).values()

    found: Any = model["packed"]
    assert isinstance(found, Linear4bit) is (kind == "nf4")
    assert torch.equal(_values(found.weight) if kind == "nf4" else found.weight, left("packed.weight"))
    assert torch.equal(found.bias, before["packed.bias"])
    assert type(model["adapted"]) is nn.Linear
    assert torch.equal(model["adapted"].weight, left("adapted.weight"))
    assert torch.equal(model["short"].weight, left("short.weight")), "rows that are no whole blocks"
    turned: Any = model["turned"]
    transposed = left("turned.weight", is_transpose=True)
    assert torch.equal(_values(turned.weight).t() if kind == "nf4" else turned.weight, transposed)
    assert torch.equal(model["experts"]["up"], left("experts.up"))
    for name in ("head.weight", "experts.scale"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_an_embedding_grows_for_added_tokens_and_never_shrinks() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = 8, "a head of 8"

        def get_input_embeddings(self) -> Any:
            return SimpleNamespace(num_embeddings=self.rows)

        def get_output_embeddings(self) -> str:
            return self.head

        def set_output_embeddings(self, head: str) -> None:
            self.head = head

        def resize_token_embeddings(self, rows: int, mean_resizing: bool) -> None:
            assert not mean_resizing
            self.rows, self.head = rows, f"a head of {rows}"

    language, whole = Language(), Language()
    language.__dict__["whole_class"] = plain._Partner(whole)
    for asked, rows in ((7, 8), (8, 8), (11, 11)):
        assert plain.grow(language, asked) is language
        assert (language.rows, whole.head) == (rows, f"a head of {rows}")


def test_constants_are_those_of_a_model_in_the_type_of_the_training() -> None:
    """Also inside of what PEFT has put around a module, and in a model whose constants come from files."""
    model, meta = nn.Module(), torch.empty(2, dtype=torch.bfloat16, device="meta")
    model.layer = nn.Module()
    model.layer.base_layer = nn.Module()
    third = torch.tensor([1 / 3, 2 / 3])
    for owner, name in ((model, "scale"), (model, "of_files"), (model, "own"), (model.layer.base_layer, "inner")):
        owner.register_buffer(name, third.clone())
    model.register_buffer("count", torch.tensor([1, 2]))
    rounded = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)
    alike = {"scale": rounded, "of_files": meta, "layer.inner": rounded, "count": torch.tensor([7, 8])}
    plain.round_buffers(model, alike)
    assert {name: buffer.tolist() for name, buffer in model.named_buffers()} == {
        "scale": [0.5, 0.25],
        "of_files": third.bfloat16().tolist(),
        "own": third.tolist(),
        "layer.base_layer.inner": [0.5, 0.25],
        "count": [1, 2],
    }
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32, torch.int64}


def test_weights_that_an_adapter_adds_to_are_named_by_its_own_settings(tmp_path: Path) -> None:
    assert plain.adapted_weights(tmp_path) == ()
    for given, found in ((["a.weight", "up_proj"], ("a.weight", "up_proj")), (None, ())):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"target_parameters": given}))
        assert plain.adapted_weights(tmp_path) == found


def test_whatever_a_library_raises_is_one_sentence_of_a_bounded_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised, plain._reading("PEFT", tmp_path):
        raise RuntimeError("Error(s) in loading:\n\tsize mismatch  for q_proj" + " and more" * 200)
    begin = (
        f"--verify: PEFT cannot read {tmp_path} (RuntimeError: Error(s) in loading: size mismatch for q_proj and more"
    )
    assert str(raised.value).startswith(begin)
    assert str(raised.value).endswith("), so nothing is proven of the export.")
    assert len(str(raised.value)) < 800
