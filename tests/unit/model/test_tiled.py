"""MLPs that take long rows tile by tile have the values and gradients of MLPs that do not, in a part of the memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import FAMILIES, KINDS, SIZES
from trainer.config.training import Train
from trainer.model import activations
from trainer.model.activations import arrange_activations, mlps, tile
from trainer.model.parts import is_layer

WIDTH, HIDDEN, TOKENS, TILE = 96, 32, 61, 16


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MLP_TILE", TILE)


class Gated(nn.Module):
    """A Llama's MLP of which the last weight learns."""

    def __init__(self, dtype: torch.dtype, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(HIDDEN, WIDTH, bias=False, dtype=dtype).requires_grad_(False) for _ in range(2))
        self.down, self.dropout = nn.Linear(WIDTH, HIDDEN, dtype=dtype), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(nn.functional.silu(self.gate(x)) * self.up(x)))


def step(mlp: Gated, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(1, TOKENS, HIDDEN).to(dtype).requires_grad_(True)
    gradient = torch.randn(1, TOKENS, HIDDEN).to(dtype)
    y = checkpoint(mlp, x, use_reentrant=False)
    assert isinstance(y, Tensor)
    return [y.detach(), *torch.autograd.grad(y, (x, mlp.down.weight, mlp.down.bias), gradient)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_input_gradients_are_the_same_to_the_last_bit(dtype: torch.dtype) -> None:
    whole, tiles = Gated(dtype, 0.0), Gated(dtype, 0.0)
    tile(tiles, TILE)
    expected, found = step(whole, dtype), step(tiles, dtype)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * other.norm()


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
def test_an_input_without_a_gradient_and_a_module_beside_the_mlp_are_no_trouble(again: bool) -> None:
    """As in the first layer, where nothing learns before it; and a bottleneck adapter is a child of the MLP and
    computed behind it.
    """
    gradients = []
    for tiles in (False, True):
        mlp = Gated(torch.float32, 0.0)
        mlp.adapter = nn.Linear(HIDDEN, HIDDEN)
        if tiles:
            tile(mlp, TILE)
        torch.manual_seed(1)
        x = torch.randn(1, TOKENS, HIDDEN)
        y = checkpoint(mlp, x, use_reentrant=False) if again else mlp(x)
        assert isinstance(y, Tensor)
        mlp.adapter(y).square().sum().backward()
        gradients.append([mlp.down.weight.grad, mlp.adapter.weight.grad])
    for found, expected in zip(*gradients, strict=True):
        assert found is not None
        assert expected is not None
        assert (found - expected).norm() < 1e-6 * expected.norm()


def test_dropout_is_drawn_again_as_it_was() -> None:
    """The gradient of an input is that of the very function that gave the output: the loss falls along it as it
    says.
    """
    mlp = Gated(torch.float32, 0.5)
    tile(mlp, TILE)

    def output(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return mlp(x)

    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float32, requires_grad=True)
    before = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(output(x).sum(), x)
    with torch.no_grad():
        moved = (output(x + 1e-3 * gradient).sum() - output(x).sum()) / 1e-3
    assert float(moved) == pytest.approx(float(gradient.square().sum()), rel=2e-2)
    torch.set_rng_state(before)
    torch.manual_seed(5)
    mlp(x).sum().backward()
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    mlp(x)
    assert torch.equal(torch.get_rng_state(), drawn), "a backward pass draws nothing"


class Watch(TorchDispatchMode):
    """The most values that one product returns, and the products that were made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "mm" in function.__name__:
            self.largest, self.products = max(self.largest, result.numel()), self.products + 1
        return result


def test_only_a_tile_is_wide_and_a_layer_that_is_computed_again_makes_few_more_products() -> None:
    found = {}
    for tiles in (False, True):
        mlp = Gated(torch.float32, 0.0)
        if tiles:
            tile(mlp, TILE)
        with Watch() as watch:
            step(mlp, torch.float32)
        found[tiles] = watch
    assert found[False].largest == TOKENS * WIDTH
    assert found[True].largest == max(TILE * WIDTH, HIDDEN * WIDTH)
    count = -(-TOKENS // TILE)
    # Without tiles the recomputation ends before the last product, and there 3 + 2 + 4 are made; by tile it is made
    # again.
    assert found[True].products == count * (found[False].products + 1)


@pytest.mark.parametrize("kind", sorted({**FAMILIES, **KINDS}))
def test_an_mlp_is_found_by_what_it_is_in_every_family(kind: str) -> None:
    """Its rows are independent; and whatever mixes tokens is none."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"tie_word_embeddings": False, **SIZES, **{**FAMILIES, **KINDS}[kind]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32).eval()
    layers = [module for module in model.modules() if is_layer(module)]
    found = [mlp for layer in layers for mlp in mlps(layer)]
    for mlp in found:
        width = next(part for part in mlp.modules() if isinstance(part, nn.Linear)).in_features
        x = torch.randn(1, 24, width)
        whole = mlp(x)
        assert whole.shape == x.shape
        torch.testing.assert_close(whole[:, :7], mlp(x[:, :7]), rtol=1e-4, atol=1e-5)
    if kind.startswith("llama") and "experts" not in kind and kind != "llama4":
        assert len(found) == len(layers)


@pytest.mark.parametrize(
    ("setting", "of_recomputed", "of_others"), [("auto", 2**14 - 1, None), (True, 4096, 4096), (False, None, None)]
)
def test_auto_tiles_long_rows_where_that_takes_no_time(setting: Any, of_recomputed: Any, of_others: Any) -> None:
    settings = Train(steps=1, tiled_mlp=setting)
    assert settings.longest_mlp(recomputed=True) == of_recomputed
    assert settings.longest_mlp(recomputed=False) == of_others


@pytest.mark.parametrize(
    ("setting", "made_again"),
    [("auto", [True, True, True]), (1, [True, True, False]), (3, [False] * 3), ("none", [False] * 3)],
)
def test_the_first_layers_are_computed_again_in_tiles_and_the_last_ones_keep_what_they_computed(
    setting: Any, made_again: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.config.training._LONG_ROW", TILE)
    config = AutoConfig.for_model(**{**SIZES, **FAMILIES["llama"], "num_hidden_layers": 3})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    layers: Any = [module for module in model.modules() if is_layer(module)]
    arrange_activations(model, Train(steps=1, activation_checkpointing=setting))
    attentions, tiles = [0] * 3, [0] * 3
    for place, layer in enumerate(layers):
        for counts, part in ((attentions, layer.self_attn), (tiles, layer.mlp.gate_proj)):

            def count(*_given: Any, counts: list[int] = counts, place: int = place) -> None:
                counts[place] += 1

            part.register_forward_pre_hook(count)
    model.get_input_embeddings().requires_grad_(False)  # as in a run with adapters
    embedded = list[bool]()
    layers[0].register_forward_pre_hook(lambda _, given: embedded.append(given[0].requires_grad))
    loss = model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits.sum()
    in_one_pass = list(tiles)
    loss.backward()
    assert embedded[0] is False, "the first layer has nothing to hand a gradient to"
    assert attentions == [1 + again for again in made_again]
    assert in_one_pass == [-(-TOKENS // TILE) if again else 1 for again in made_again]
