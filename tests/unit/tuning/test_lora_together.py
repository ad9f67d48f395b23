"""On a GPU the adapted layers that read one input have one product with their A, and one gradient of the input: what
each by itself has, with fewer kernels. On a CPU each is by itself."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import FAMILIES, KINDS, SIZES
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import Tuning
from trainer.model import activations
from trainer.model.held.blockwise import quantize_blocks
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldLinear
from trainer.tuning.lora import layer as lora
from trainer.tuning.lora.layer import LoraLinear
from trainer.tuning.method import find_method

TOKENS = torch.arange(3, 40)[None]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are added within their kernel."""
    monkeypatch.setattr(lora, "_is_rounded_once", lambda total: True)


def adapted(targets: list[str] = ALL, dropout: float = 0.0) -> Any:
    """A small Llama of 4 bits with adapters that change what it computes."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **KINDS["llama"]))
    model.requires_grad_(False)
    for path, linear in [
        (path, module) for path, module in model.model.named_modules() if isinstance(module, nn.Linear)
    ]:
        packed = HeldLinear(linear.in_features, linear.out_features, Blocks("nf4", 64, False), torch.float32)
        codes, absmax = quantize_blocks(linear.weight.data.flatten(), "nf4", 64)
        packed.weight = nn.Parameter(codes, requires_grad=False)
        packed.absmax = nn.Parameter(absmax.view(torch.uint8), requires_grad=False)
        model.model.set_submodule(path, packed)
    method = find_method(Tuning(rank=4, alpha=12, targets=targets, dropout=dropout))
    method.attach(model, read_architecture({**SIZES, **KINDS["llama"]}), torch.float32, seed=3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return model.train()


def layers(model: nn.Module) -> Iterator[LoraLinear]:
    return (module for module in model.modules() if isinstance(module, LoraLinear))


def apart(model: Any) -> Any:
    """The same model, whose layers are each by itself."""
    for layer in layers(model):
        layer.beside = ()
    return model


class Kernels(TorchDispatchMode):
    """Counts the products with low-rank factors by their inputs' sizes, and all that a device would be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        views = (
            "view",
            "_unsafe_view",
            "t",
            "transpose",
            "detach",
            "slice",
            "split",
            "split_with_sizes",
            "expand",
            "unsqueeze",
        )
        if function.overloadpacket.__name__ not in (*views, "new_empty", "empty", "empty_like", "alias"):
            given = [one for value in args for one in (value if isinstance(value, list) else [value])]
            self.count += 1
            self.bytes += sum(one.nbytes for one in [*given, result] if isinstance(one, Tensor))
        return result


def step(model: Any) -> tuple[list[Tensor], Kernels]:
    """The predictions of a pass and the gradients of what learns and of its input, and what it took."""
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(5)
    inputs = model.get_input_embeddings()(TOKENS).requires_grad_()
    with Kernels() as kernels:
        logits = model(inputs_embeds=inputs).logits
        found = [logits.detach(), *torch.autograd.grad(logits.square().mean(), [inputs, *learning.values()])]
    return found, kernels


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("_on_gpu")
def test_layers_that_read_one_input_have_the_gradients_of_each_by_itself_in_fewer_kernels() -> None:
    model = adapted()
    found, kernels = step(model)
    expected, before = step(apart(model))
    assert distance(found, expected) < 1e-5
    # Of three layers two products by A each are gone there, for the gradient of A and for that of the input, and the
    # sums of those; of two layers one each. What is new puts A together, there and back, and the gradients of x A^T.
    fewer = (4 * 2 - 3) + (4 * 1 - 3)
    assert before.count - kernels.count == SIZES["num_hidden_layers"] * fewer
    assert kernels.bytes < before.bytes


def test_on_a_cpu_each_is_by_itself_to_the_last_bit() -> None:
    model = adapted()
    found, kernels = step(model)
    expected, before = step(apart(model))
    assert all(map(torch.equal, found, expected))
    assert (kernels.count, kernels.bytes) == (before.count, before.bytes)


@pytest.mark.usefixtures("_on_gpu")
@pytest.mark.parametrize(
    ("targets", "dropout", "together"), [(["q_proj", "v_proj", "up_proj"], 0.0, 1), (["k_proj"], 0.0, 0), (ALL, 0.2, 0)]
)
def test_layers_without_an_adapter_or_with_dropout_are_by_themselves(
    targets: list[str], dropout: float, together: int
) -> None:
    model = adapted(targets, dropout)
    found, kernels = step(model)
    expected, before = step(apart(model))
    assert distance(found, expected) < 1e-5
    assert (kernels.count < before.count) == bool(together)


@pytest.mark.usefixtures("_on_gpu")
def test_layers_that_compute_again_and_in_tiles_are_together_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MLP_TILE", 8)
    model = adapted()
    expected, _ = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        activations.tile(layer.mlp, 8)
    asked = list[int]()
    plain = lora.multiply_adapted
    monkeypatch.setattr(lora, "multiply_adapted", lambda *given: asked.append(len(given[2])) or plain(*given))
    assert distance(step(model)[0], expected) < 1e-5
    assert set(asked) == {1, 2, 3}, "o and down; gate and up; q, k and v"


@pytest.mark.usefixtures("_on_gpu")
def test_a_layer_that_is_given_another_input_computes_it() -> None:
    attention = adapted().model.layers[0].self_attn
    x = torch.randn(1, 5, SIZES["hidden_size"])
    first, second = attention.q_proj(x), attention.k_proj(x)
    assert attention.k_proj._made is None, "what was handed out is held no longer"
    attention.q_proj(x)
    assert torch.equal(attention.k_proj(x.view_as(x)), second), "a view, as ZeRO-3's hooks hand on"
    attention.q_proj(x)
    other = attention.k_proj(-x)
    torch.testing.assert_close(other, -second)
    attention.q_proj(x)
    torch.testing.assert_close(attention.k_proj(x.neg_()), other)
    attention.q_proj(x)
    attention.k_proj._disable_adapters = True
    assert torch.equal(attention.k_proj(x), attention.k_proj.base_layer(x)), "switched off in between"
    assert attention.q_proj.beside == (attention.k_proj, attention.v_proj)
    assert first.shape != second.shape, "the control: they are different layers"


@pytest.mark.usefixtures("_on_gpu")
def test_ranks_scalings_and_biases_may_differ() -> None:
    torch.manual_seed(0)
    bases = [nn.Linear(12, outputs, bias=outputs > 8) for outputs in (8, 16, 24)]
    ranks = (2, 5, 3)
    matrices = [
        (torch.randn(rank, 12), torch.randn(len(base.weight), rank)) for base, rank in zip(bases, ranks, strict=True)
    ]
    for base in bases:
        base.weight.requires_grad_(False)
    x = torch.randn(2, 7, 12, requires_grad=True)
    found = list[list[Tensor]]()
    for together in (True, False):
        sides = [
            lora.AdaptedLinear(base, nn.Parameter(down), nn.Parameter(up), 0.7 + place, None)
            for place, (base, (down, up)) in enumerate(zip(bases, matrices, strict=True))
        ]
        calls = [sides] if together else [[side] for side in sides]
        results = [result for call in calls for result in lora.multiply_adapted(x, None, call)]
        learning = [part for side in sides for part in (side.down, side.up)] + [base.bias for base in bases[1:]]
        found.append(
            [*results, *torch.autograd.grad(torch.cat([one.sin().flatten() for one in results]).sum(), [x, *learning])]
        )
    assert distance(*found) < 1e-5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        pytest.param("phi3", set[tuple[str, ...]](), marks=pytest.mark.long),
        pytest.param(
            "deepseek-v3", {("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj")}, marks=pytest.mark.long
        ),
    ],
)
def test_layers_that_read_one_input_are_found_by_their_use(kind: str, expected: set[tuple[str, ...]]) -> None:
    found = read_architecture({**SIZES, **(KINDS | FAMILIES)[kind]}).read_together
    assert {tuple(path.rpartition(".")[2] for path in paths) for paths in found} == expected
    assert {path.rpartition(".")[0] for path in found[0]} if found else not expected
