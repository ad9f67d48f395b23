"""Bottleneck adapters sit behind the blocks of every family that can be trained, and start as nothing."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import KINDS, SIZES, rows
from trainer.base.architecture import Architecture
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import Model, Tuning
from trainer.tuning.bottleneck.layer import Bottleneck
from trainer.tuning.bottleneck.load_in_transformers import ACTIVATIONS, PARTS, load_bottleneck
from trainer.tuning.method import Method, find_method

TOKENS = torch.arange(3, 40)[None]
# Written down by hand: the two blocks of a decoder layer in transformers' models, whatever the family.
BLOCKS = ("self_attn", "mlp")
FORMULAS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5)),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "tanh": lambda z: (torch.exp(2 * z) - 1) / (torch.exp(2 * z) + 1),
}


# A kind of base for each family; "speck" is too small for a bottleneck.
OF_FAMILY = {settings["model_type"]: kind for kind, settings in KINDS.items() if kind != "speck"}


def model_of(kind: str) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(**{"tie_word_embeddings": False, **SIZES, **KINDS[kind]})
    options: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)


def architecture_of(model: Any) -> Architecture:
    return read_architecture(model.config.to_dict())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def adapted(kind: str, **settings: Any) -> tuple[Any, Method]:
    model = model_of(kind)
    method = find_method(Tuning.model_validate({"method": "bottleneck", "reduction": 7, **settings}))
    method.attach(model, architecture_of(model), torch.float32, seed=3)
    return model, method


@pytest.mark.parametrize("activation", FORMULAS)
def test_an_adapter_is_the_papers_formula(activation: str) -> None:
    layer, x = Bottleneck(12, 5, activation, torch.device("cpu"), torch.float32), torch.randn(2, 7, 12)
    assert torch.equal(layer(x), x), "it does not start as the identity"
    assert (layer.down.weight != 0).all(), "with both matrices zero nothing would ever learn"
    assert not any(zero.any() for zero in (layer.down.bias, layer.up.weight, layer.up.bias))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    down, up = layer.down, layer.up
    inner = torch.stack([FORMULAS[activation](down.weight @ token + down.bias) for token in x.view(-1, 12)])
    expected = x + (inner @ up.weight.T + up.bias).view_as(x)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), expected - x)
    layer.active = False
    assert torch.equal(layer(x), x)
    torch.testing.assert_close(ACTIVATIONS[activation](x), FORMULAS[activation](x))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("kind", rows(OF_FAMILY.values(), ["ragged", "phi3", "gpt-oss", "qwen3-moe"]))
def test_adapters_are_where_the_placement_says_and_start_as_the_base(kind: str, placement: str) -> None:
    plain = logits(model_of(kind))
    model, method = adapted(kind, placement=placement)
    blocks = BLOCKS if placement == "houlsby" else BLOCKS[1:]
    width = model.config.hidden_size // 7
    learning = {name: tuple(part.shape) for name, part in model.named_parameters() if part.requires_grad}
    assert learning == method.shapes(architecture_of(model))
    assert {name.partition(".adapter.")[0] for name in learning} == {
        f"model.layers.{layer}.{block}" for layer in range(model.config.num_hidden_layers) for block in blocks
    }
    assert {shape for name, shape in learning.items() if name.endswith("down.weight")} == {
        (width, model.config.hidden_size)
    }
    assert torch.equal(logits(model), plain)

    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    changed = logits(model)
    assert not torch.allclose(changed, plain, atol=1e-2)
    with method.switched_off(model):
        assert torch.equal(logits(model), plain)
    # The same by hand: the block's own function, with the adapter of its parameters behind it.
    by_hand = model_of(kind)
    for layer, trained in zip(by_hand.model.layers, model.model.layers, strict=True):
        for name in blocks:
            put_behind(getattr(layer, name), getattr(trained, name).adapter)
    torch.testing.assert_close(logits(by_hand), changed)


def put_behind(block: Any, layer: Any) -> None:
    forward = block.forward

    def behind(*inputs: Any, **named: Any) -> Any:
        output = forward(*inputs, **named)
        x = output[0] if isinstance(output, tuple) else output
        inner = (x @ layer.down.weight.T + layer.down.bias).clamp(min=0)
        x = x + inner @ layer.up.weight.T + layer.up.bias
        return (x, *output[1:]) if isinstance(output, tuple) else x

    block.forward = behind


def test_the_start_is_the_seeds() -> None:
    starts = [adapted("llama")[0].state_dict() for _ in range(2)]
    assert all(torch.equal(values, starts[1][name]) for name, values in starts[0].items())
    other, method = model_of("llama"), find_method(Tuning.model_validate({"method": "bottleneck", "reduction": 7}))
    method.attach(other, architecture_of(other), torch.float32, seed=4)
    name = "model.layers.0.mlp.adapter.down.weight"
    assert not torch.equal(other.state_dict()[name], starts[0][name])
    assert not torch.equal(starts[0][name], starts[0][name.replace(".0.", ".1.")])


def test_a_bottleneck_without_a_unit_is_refused() -> None:
    architecture = architecture_of(model_of("llama"))
    (sentence,) = find_method(Tuning.model_validate({"method": "bottleneck", "reduction": 65})).mismatches(architecture)
    assert sentence == "tuning.reduction: 65 leaves nothing of the base's hidden size of 64. Lower it."
    assert find_method(Tuning.model_validate({"method": "bottleneck", "reduction": 64})).mismatches(architecture) == []


def test_an_identity_has_every_setting() -> None:
    assert find_method(Tuning.model_validate({"method": "bottleneck", "placement": "pfeiffer"})).identity == {
        "method": "bottleneck",
        "reduction": 16,
        "activation": "relu",
        "placement": "pfeiffer",
    }


def test_the_page_shows_the_very_code_that_loads_an_adapter() -> None:
    root = Path(__file__).parents[3]
    section = (root / "docs/methods.md").read_text().partition("\n## bottleneck\n")[2].partition("\n## ")[0]
    shown = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    code = (root / "trainer/tuning/bottleneck/load_in_transformers.py").read_text()
    assert shown == code
    imported = {name.partition(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE)}
    assert imported == {"json", "pathlib", "typing", "torch", "safetensors"}


def test_a_base_whose_layers_have_not_two_blocks_is_refused() -> None:
    method = find_method(Tuning(method="bottleneck"))
    one: Any = SimpleNamespace(blocks=lambda: {0: ["a", "b"], 1: ["c"]}, width=64)
    (sentence,) = method.mismatches(one)
    assert sentence.startswith("tuning.method: bottleneck needs decoder layers of two blocks")
    two: Any = SimpleNamespace(blocks=lambda: {0: ["a", "b"]}, width=16)
    assert method.mismatches(two) == []
    two.width = 15
    (sentence,) = method.mismatches(two)
    assert sentence.startswith("tuning.reduction: 16 leaves nothing of the base's hidden size of 15.")


def test_an_export_says_what_it_is_and_is_the_same_adapter_on_another_copy_of_the_base(tmp_path: Path) -> None:
    model, method = adapted("llama", activation="tanh", placement="pfeiffer")
    learning = {name: part for name, part in model.named_parameters() if part.requires_grad}
    for part in learning.values():
        nn.init.normal_(part, std=0.3)
    exported = method.export({name: part.detach() for name, part in learning.items()}, Model(base="/m", revision="r"))
    said = json.loads(exported.files["bottleneck.json"])
    assert said.pop("blocks") == [f"model.layers.{layer}.mlp" for layer in range(model.config.num_hidden_layers)]
    settings = {"reduction": 7, "activation": "tanh", "placement": "pfeiffer"}
    assert said == {"base_model": "/m", "revision": "r", **settings}
    for name, content in exported.files.items():
        (tmp_path / name).write_bytes(content)
    other = model_of("llama")
    plain = logits(other)
    inside = method.load_exported(other, tmp_path)
    assert inside is not None
    with inside:
        assert torch.equal(logits(other), plain), "it is the base's own inside"
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)


def test_weights_of_no_block_are_not_loaded(tmp_path: Path) -> None:
    weights = {f"0.adapter.{part}": torch.zeros(2, 2) if "weight" in part else torch.zeros(2) for part in PARTS}
    save_file({**weights, "1.adapter.up.bias": torch.zeros(2)}, tmp_path / "bottleneck.safetensors")
    (tmp_path / "bottleneck.json").write_text('{"blocks": ["0"], "activation": "relu"}')
    with pytest.raises(ValueError, match=r"belong to no block of bottleneck.json: \['1.adapter.up.bias'\]"):
        load_bottleneck(nn.Sequential(nn.Linear(2, 2)), tmp_path)
