"""LoRA's layer in one function has the values and gradients of PEFT's, keeps no more for the backward pass, and makes
no pass of its own over what it returns."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import KINDS, SIZES
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import Tuning
from trainer.model.held import layers as held_layers
from trainer.model.held.blockwise import quantize_blocks
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear
from trainer.tuning.lora import layer as lora
from trainer.tuning.lora.layer import LoraLinear
from trainer.tuning.method import find_method

INPUTS, OUTPUTS, RANK, TOKENS = 96, 160, 8, 37


def base_layer(stored: str, bias: bool, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype).requires_grad_(False)
    if stored == "16 bits":
        return layer
    packed = HeldLinear(INPUTS, OUTPUTS, Blocks("nf4", 32, False), dtype)
    weight, absmax = quantize_blocks(layer.weight.reshape(-1), "nf4", 32)
    packed.weight = nn.Parameter(weight, requires_grad=False)
    packed.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
    packed.bias = layer.bias
    return packed


def adapted(base: nn.Linear, alpha: int = 16, dropout: float = 0.0, *, ours: bool) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"])
    if ours:
        config._register_custom_module({nn.Linear: LoraLinear})
    layer: Any = inject_adapter_in_model(config, nn.Sequential(base))[0]  # type: ignore[index]
    assert isinstance(layer, LoraLinear) is ours
    torch.manual_seed(1)
    for adapter in (layer.lora_A, layer.lora_B):
        matrix = adapter["default"].weight
        matrix.data = (0.1 * torch.randn(matrix.shape)).to(base.bias.dtype if base.bias is not None else matrix.dtype)
    return layer


def step(layer: Any, dtype: torch.dtype) -> list[Tensor]:
    """Of one pass and back: the output, and the gradients of the input, of A and of B."""
    torch.manual_seed(2)
    x = torch.randn(1, TOKENS, INPUTS).to(dtype).requires_grad_(True)
    gradient = torch.randn(1, TOKENS, OUTPUTS).to(dtype)
    down, up = (adapter["default"].weight for adapter in (layer.lora_A, layer.lora_B))
    torch.manual_seed(3)  # of dropout
    output = layer(x)
    output += 0  # in place, as the code of families may add to it
    return [output.detach(), *torch.autograd.grad(output, (x, down, up), gradient)]


@pytest.mark.parametrize("stored", ["4 bits", "16 bits"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("alpha", "dropout"), [(16, 0.0), (16, 0.3), (12, 0.0), (12, 0.3)])
def test_values_and_gradients_are_pefts(
    monkeypatch: pytest.MonkeyPatch, stored: str, bias: bool, dtype: torch.dtype, alpha: int, dropout: float
) -> None:
    """To the last bit on a CPU; where products are added within their kernel, as on a GPU, but for rounding."""
    base = base_layer(stored, bias, dtype)
    layers = [adapted(base, alpha, dropout, ours=ours).to(dtype) for ours in (True, False)]
    ours, theirs = (step(layer, dtype) for layer in layers)
    assert all(map(torch.equal, ours, theirs))

    monkeypatch.setattr(lora, "_is_rounded_once", lambda total: True)
    once = step(layers[0], dtype)
    assert dtype == torch.float32 or not torch.equal(once[0], ours[0]), "the control: it is another way"
    for one, other in zip(once, theirs, strict=True):
        assert (one - other).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * other.norm()


def test_it_keeps_no_more_for_the_backward_pass() -> None:
    """PEFT's layer keeps its input, A x and, as views of what is gathered, A and B."""

    def kept(ours: bool) -> set[tuple[int, ...]]:
        base = base_layer("4 bits", False, torch.float32)
        layer, shapes = adapted(base, ours=ours), set[tuple[int, ...]]()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.add(tuple(t.flatten(0, -2).shape)) or t, lambda t: t
        ):
            layer(torch.randn(1, TOKENS, INPUTS, requires_grad=True))
        return shapes

    ours, theirs = kept(True), kept(False)
    assert ours == {(TOKENS, INPUTS), (TOKENS, RANK)}
    assert ours < theirs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_last_product_of_a_layer_is_not_made_again_and_gradients_are_those_of_kept_activations(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    config = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=["up", "down"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: LoraLinear})
    linears = {"up": nn.Linear(INPUTS, OUTPUTS, bias=False), "down": nn.Linear(OUTPUTS, INPUTS, bias=False)}
    model: Any = inject_adapter_in_model(config, nn.ModuleDict(linears))
    plain, made = lora.multiply, list[str]()

    def counted(x: Tensor, linear: nn.Linear, bias: Tensor | None) -> Tensor:
        made.append("up" if linear.in_features == INPUTS else "down")
        return plain(x, linear, bias)

    def decoder_layer(x: Tensor) -> Tensor:
        return x + model["down"](nn.functional.silu(model["up"](x)))

    monkeypatch.setattr(lora, "multiply", counted)
    found, products = list[list[Tensor]](), list[list[str]]()
    for again in (False, True):
        made.clear()
        x = torch.linspace(-1, 1, TOKENS * INPUTS).view(TOKENS, INPUTS).requires_grad_()
        torch.manual_seed(5)  # of dropout
        y = checkpoint(decoder_layer, x, use_reentrant=False) if again else decoder_layer(x)
        learning = [x, *(one for one in model.parameters() if one.requires_grad)]
        found.append(list(torch.autograd.grad(y.square().sum(), learning)))
        products.append(list(made))
    assert products == [["up", "down"], ["up", "down", "up"]]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Passes(TorchDispatchMode):
    """Counts what is neither a product nor a view and returns as many elements as the layer does or gets a gradient
    for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        views = ("view", "_unsafe_view", "t", "detach", "transpose", "reshape", "empty_like")
        if isinstance(result, Tensor) and result.numel() in (TOKENS * INPUTS, TOKENS * OUTPUTS) and "mm" not in name:
            self.names += [] if name in views else [name]
        return result


def test_no_pass_over_its_result_or_its_gradient_is_left_where_products_are_added_within_their_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "_is_rounded_once", lambda total: True)
    found = {}
    for ours in (True, False):
        layer = adapted(base_layer("16 bits", False, torch.float32), ours=ours)
        x = torch.randn(1, TOKENS, INPUTS, requires_grad=True)
        gradient = torch.ones(1, TOKENS, OUTPUTS)
        with Passes() as passes:
            layer(x).backward(gradient)
        found[ours] = passes.names
    assert found[True] == []
    assert len(found[False]) == 4, f"the control: scaling and sum, forward and back, and not {found[False]}"


@pytest.mark.parametrize("alpha", [12, 16])
def test_through_codes_a_and_b_have_pefts_gradients_and_the_input_that_of_the_codes(
    monkeypatch: pytest.MonkeyPatch, alpha: int
) -> None:
    base = base_layer("16 bits", True, torch.float32)
    moved = torch.randn(OUTPUTS, INPUTS)
    monkeypatch.setattr(held_layers, "_moved", lambda linear, by: moved)
    ours, theirs = (adapted(base, alpha, ours=ours) for ours in (True, False))
    ours.through = "weight"
    (_, of_x, *mine), (*_, down, up) = step(ours, torch.float32), step(theirs, torch.float32)
    torch.testing.assert_close(mine, [down, up])
    torch.manual_seed(2)
    _, gradient = torch.randn(1, TOKENS, INPUTS), torch.randn(1, TOKENS, OUTPUTS)
    torch.testing.assert_close(of_x, gradient @ moved)


def test_what_is_switched_off_is_the_base() -> None:
    base = base_layer("4 bits", True, torch.bfloat16)
    layer, x = adapted(base, ours=True).to(torch.bfloat16), torch.randn(2, 5, INPUTS).bfloat16()
    assert not torch.equal(layer(x), base(x))
    layer._disable_adapters = True
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_another_start_is_the_base_too_and_that_of_peft(start: str) -> None:
    """Of PEFT's start the deviations: it draws other numbers, for each layer anew."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **KINDS["llama"]))
    tokens = torch.arange(5)[None]
    plain = model(tokens).logits
    tuning = Tuning(rank=4, targets=["q_proj"], init=start)  # type: ignore[call-arg]  # a setting of the method's own
    find_method(tuning).attach(model, read_architecture({**SIZES, **KINDS["llama"]}), torch.float32, seed=3)
    torch.testing.assert_close(model(tokens).logits, plain)
    theirs: Any = get_peft_model(
        nn.Sequential(nn.Linear(SIZES["hidden_size"], SIZES["hidden_size"])),  # type: ignore[arg-type]  # any module does
        LoraConfig(r=4, init_lora_weights=start, target_modules=["0"]),  # type: ignore[arg-type]  # annotated without it
    )
    expected = {name.split(".")[-3]: part for name, part in theirs.named_parameters() if "lora_" in name}
    for name, found in model.named_parameters():
        if ".lora_" in name:
            deviation = expected[name.split(".")[-3]].std()
            assert float(found.detach().std()) == pytest.approx(float(deviation.detach()), rel=0.5), name
            assert bool(found.any()) == (".lora_A." in name or start == "orthogonal")


@pytest.mark.parametrize(
    "given",
    [{}, {"method": "dora"}, {"init": "gaussian"}, {"init": "orthogonal", "rank": 4}],
    ids=lambda given: str(given),
)
def test_adapters_begin_by_the_seed_alone(given: dict[str, Any]) -> None:
    """Each rank makes all of them and keeps its share, so all ranks have to draw the same."""

    def begun(seed: int) -> list[Tensor]:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **KINDS["llama"]))  # draws, too
        tuning = Tuning.model_validate({"targets": ["q_proj"], **given})
        find_method(tuning).attach(model, read_architecture({**SIZES, **KINDS["llama"]}), torch.float32, seed=seed)
        return [part for name, part in model.named_parameters() if "lora_A" in name]

    one, same, other = begun(3), begun(3), begun(4)
    assert len(one) == SIZES["num_hidden_layers"]
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))
