"""The layers of a proof that have their weights only for their turn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.material import make_base
from trainer.config import Quant
from trainer.export.proof.plain import load_plain
from trainer.export.proof.streamed import PackedWeight, StreamedLayers
from trainer.model.parts import decoder_layers


def test_a_layer_has_its_weights_at_its_turn_and_at_no_other_time(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    model: Any = load_plain(base, torch.float32, torch.float32, streamed=StreamedLayers(tmp_path / "scratch"))
    layers: list[Any] = list(decoder_layers(model) or ())
    held = list[list[int]]()

    def having_weights() -> list[int]:
        weights = [layer.self_attn.q_proj.weight for layer in layers]
        return [n for n, weight in enumerate(weights) if weight.untyped_storage().nbytes() > weight.dtype.itemsize]

    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: held.append(having_weights()))
    assert having_weights() == []
    with torch.no_grad():
        model(torch.arange(3, 9)[None])
    assert held == [[number] for number in range(len(layers))]
    assert len(layers) > 1
    assert having_weights() == []


def test_a_model_that_is_read_a_layer_at_a_time_is_the_one_that_is_read_whole(tmp_path: Path) -> None:
    """Also one with a tied head, whose files have another type than it is read in."""
    base, tokens = make_base(tmp_path / "base", "llama-tied", torch.float32), torch.arange(3, 9)[None]
    whole: Any = load_plain(base, torch.bfloat16, torch.bfloat16)
    streamed = StreamedLayers(tmp_path / "scratch")
    model: Any = load_plain(base, torch.bfloat16, torch.bfloat16, streamed=streamed)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not hasattr(model, "hf_device_map"), "or PEFT would move the weights itself"
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
    types = {name: parameter.dtype for name, parameter in whole.named_parameters()}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == types
    assert {supply().dtype for supply in streamed._supplies.values()} == {torch.bfloat16}


def test_a_weight_comes_in_the_type_that_it_is_asked_in_whatever_its_file_has(tmp_path: Path) -> None:
    streamed, cpu = StreamedLayers(tmp_path), torch.device("cpu")
    for later in (True, False):
        given = nn.Parameter(torch.empty(2, 3, device="meta"))
        streamed._supplies[given] = lambda: torch.full((2, 3), 1.5)
        placed = streamed._placed(given, later, torch.bfloat16, cpu)
        assert (placed.shape, placed.dtype, placed.requires_grad) == ((2, 3), torch.bfloat16, False)
        values = streamed._supplies[placed]() if later else placed
        assert torch.equal(values.detach(), torch.full((2, 3), 1.5, dtype=torch.bfloat16))
        assert given not in streamed._supplies


class _Fails(nn.Module):
    """Fails for negative numbers."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self.inner, self.done = nn.Linear(1, 1), done

    def forward(self, x: Tensor) -> Tensor:
        self.done.append("computes")
        if float(x) < 0:
            raise RuntimeError("a negative number")
        return x


def test_a_change_lasts_for_the_turn_of_its_layer_even_if_that_fails(tmp_path: Path) -> None:
    done = list[str]()
    layer, elsewhere = _Fails(done), nn.Linear(1, 1)
    streamed = StreamedLayers(tmp_path)
    streamed._layers = [nn.Linear(1, 1), layer]
    assert streamed.at_each_turn(layer.inner, lambda: done.append("merged"), lambda: done.append("as before"))
    assert not streamed.at_each_turn(elsewhere, lambda: done.append("never"), lambda: done.append("never"))
    layer(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="a negative number"):
        layer(torch.tensor(-1.0))
    assert done == ["merged", "computes", "as before"] * 2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_each_matrix_of_a_weight_is_quantized_by_itself_as_the_model_has_it(kind: str) -> None:
    quant = Quant.model_validate({"type": kind} | ({"double": False} if kind == "nf4" else {}))
    weights = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0))
    single = [PackedWeight(weight, quant, torch.float32).values() for weight in weights]
    for weight, values in zip(weights, single, strict=True):
        assert 0 < float((values - weight).norm() / weight.norm()) < 0.15
        transposed = PackedWeight(weight.t().contiguous(), quant, torch.float32, is_transpose=True).values()
        assert torch.equal(transposed.t(), values)
    assert torch.equal(PackedWeight(weights, quant, torch.float32).values(), torch.stack(single))


def test_the_named_weights_get_what_quantizing_leaves_of_them_and_those_of_a_layer_at_its_turn(tmp_path: Path) -> None:
    """A matrix that the model has as its transpose is quantized as the others are."""
    quant, names = Quant.model_validate({"type": "nf4", "double": False}), ("linear", "turned", "later", "norm")
    model: Any = nn.ModuleDict({name: Conv1D(64, 128) if name == "turned" else nn.Linear(128, 64) for name in names})
    before: dict[str, Any] = {name: model[name].weight.detach().clone() for name in names}
    matrix = {name: before[name].t().contiguous() if name == "turned" else before[name] for name in names}
    expected = {name: PackedWeight(matrix[name], quant, torch.float32).values() for name in names}
    streamed, later = StreamedLayers(tmp_path), model["later"].weight
    streamed._supplies[later] = lambda: before["later"]
    streamed.quantize(model, quant, torch.float32, [f"{name}.weight" for name in names[:3]])
    assert torch.equal(model["linear"].weight, expected["linear"])
    assert torch.equal(model["turned"].weight, expected["turned"].t())
    assert torch.equal(model["norm"].weight, before["norm"])
    assert (later.shape, later.untyped_storage().nbytes()) == (before["later"].shape, 4)
    assert torch.equal(streamed._supplies[later](), expected["later"])
