"""One forward pass serves the experts of every family: transformers' own eager one, over the weights that 4 bits
hold.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import FAMILIES as FAMILIES_OF_BASES
from tests.families import KINDS
from tests.families import SIZES as BASES
from tests.nf4 import packed_stack
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config import parse_config
from trainer.model.experts import IMPLEMENTATION, prepare_experts
from trainer.model.held.layers import HeldStack
from trainer.model.kernels.grouped import Groups
from trainer.model.parts import is_experts
from trainer.tuning.experts import StackUpdate, saved_as
from trainer.tuning.experts.layer import ExpertLora
from trainer.tuning.method import method_of

RUN = "run: {name: demo}\nmodel: {base: /m}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
EXPERTS, WIDE, INNER, TOKENS, EACH = 8, 64, 48, 50, 3
# The families call the same sizes by these names.
SIZES = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), WIDE),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INNER),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), EACH),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# model_type -> the class of its experts, or of the whole mixture where that is what has a forward pass of ours.
FAMILIES = {
    "mixtral": "MixtralExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "qwen3_next": "Qwen3NextExperts",
    "qwen3_5_moe_text": "Qwen3_5MoeExperts",
    "gpt_oss": "GptOssExperts",  # transposed stacks, biases, gate and up interleaved
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "glm4_moe": "Glm4MoeExperts",
    "glm4_moe_lite": "Glm4MoeLiteExperts",
    "minimax_m2": "MiniMaxM2Experts",
    "nemotron_h": "NemotronHExperts",  # no gate
    "ernie4_5_moe": "Ernie4_5_MoeExperts",
    "olmoe": "OlmoeExperts",
    "granitemoe": "GraniteMoeExperts",
    "granitemoehybrid": "GraniteMoeHybridExperts",
    "gemma4_text": "Gemma4TextExperts",
    "mimo_v2_flash": "MiMoV2FlashExperts",
    "kimi_linear": "KimiLinearExperts",
    "aria_text": "AriaExperts",  # transposed stacks
    "muse_spark_text": "MuseSparkExperts",  # a norm behind each expert
    "llama4_text": "Llama4TextMoe",  # no interface
}


def built(family: str, **sizes: int) -> Any:
    """The family's experts with random weights in fp32, as transformers computes them by default."""
    config = AutoConfig.for_model(family, **{**SIZES, **sizes})
    config._experts_implementation = "eager"
    module = import_module(type(config).__module__.replace("configuration", "modeling"))
    made: Any = getattr(module, FAMILIES[family])(config).float()
    torch.manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


@dataclass
class Twins:
    """Experts of ours and of transformers with the same weights, and the parameters that learn in each."""

    ours: Any
    theirs: Any
    our_learning: list[Tensor]
    their_learning: list[Tensor]


def pair(family: str, kind: str, **sizes: int) -> Twins:
    """`kind`: packed, double (packed, with double quantization) or plain, where the stacks learn themselves."""
    theirs = built(family, **sizes)
    ours = copy.deepcopy(theirs)
    prepare_experts(ours)
    learning: tuple[list[Tensor], list[Tensor]] = ([], [])
    for path, module in list(ours.named_modules()):
        if not is_experts(module):
            continue
        module.config = copy.deepcopy(getattr(module, "config", None))
        if module.config is not None:
            module.config._experts_implementation = IMPLEMENTATION
        for name, parameter in list(module.named_parameters(recurse=False)):
            reference = theirs.get_submodule(path)
            if parameter.ndim == 3 and kind != "plain":
                stack, whole = packed_stack(parameter.data, kind == "double")
                delattr(module, name)
                module.add_module(name, stack)
                getattr(reference, name).data = whole
            else:
                learning[0].append(parameter.requires_grad_())
                learning[1].append(getattr(reference, name).requires_grad_())
    return Twins(ours, theirs, *learning)


def adapt(both: Twins, rank: int) -> None:
    """LoRA on every stack, in transformers' experts by weights that are W + 2 * B @ A."""
    for path, module in both.ours.named_modules():
        if not is_experts(module):
            continue
        reference = both.theirs.get_submodule(path)
        declared = getattr(reference, "is_transposed", False)  # as PEFT sees it
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if not hasattr(module, name):
                continue
            whole = getattr(reference, name).detach()
            count, rows, columns = whole.shape
            inputs, outputs = (rows, columns) if declared else (columns, rows)
            a, b = 0.1 * torch.randn(count, rank, inputs), 0.1 * torch.randn(count, outputs, rank)
            module.adapters[name] = ExpertLora(a, b, 2.0, swapped=module.is_transposed != declared)
            both.our_learning += [module.adapters[name].lora_A, module.adapters[name].lora_B]
            a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
            both.their_learning += [a, b]
            change = 2.0 * b @ a
            delattr(reference, name)
            setattr(reference, name, whole + (change.mT if declared else change))


def passes(module: Any, learning: list[Tensor], wide: int = WIDE) -> list[Tensor]:
    """What the experts make of some tokens, and the gradients of the tokens, of the routing weights and of what
    learns.
    """
    torch.manual_seed(1)
    x = torch.randn(TOKENS, wide).requires_grad_()
    weights, index = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(EACH)
    index[index == 5] = 4  # nobody visits expert 5, and some come twice to expert 4
    weights = weights.detach().requires_grad_()
    if hasattr(module, "router"):  # a whole mixture, which routes by itself
        out, of = module(x)[0], [x, *learning]
    else:
        out, of = module(x, index, weights), [x, weights, *learning]
    return [out.detach(), *torch.autograd.grad((out * torch.randn_like(out)).sum(), of)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """So small products are faster without a second one."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("packed", "plain"):
        both = pair(family, kind)
        expected = passes(both.theirs, both.their_learning)
        assert distance(passes(both.ours, both.our_learning), expected) < 1e-6, kind
    both = pair(family, "packed")
    expected = passes(both.theirs, both.their_learning)
    monkeypatch.setattr(HeldStack, "at_once", 3 * 4 * WIDE * 2 * INNER)
    assert distance(passes(both.ours, both.our_learning), expected) < 1e-6, "three experts at a time"
    stack: Any = next(module for module in both.ours.modules() if hasattr(module, "slice_shape"))
    stack.weight.data[: stack.numel // 2] ^= 1
    assert distance(passes(both.ours, both.our_learning), expected) > 1e-3, "the control: another bit in one expert"


@pytest.mark.parametrize(
    ("family", "rank"),
    [*((family, 4) for family in FAMILIES), ("qwen3_moe", 3), ("llama4_text", 3)],  # 3 is no whole 16 bytes
)
def test_lora_of_every_expert_is_that_of_weights_with_it_in_them(family: str, rank: int) -> None:
    both = pair(family, "packed")
    adapt(both, rank)
    expected = passes(both.theirs, both.their_learning)
    assert distance(passes(both.ours, both.our_learning), expected) < 2e-6
    for module in both.ours.modules():
        if isinstance(module, ExpertLora):
            module.active = False
    plain = pair(family, "packed")
    assert torch.equal(passes(both.ours, [])[0], passes(plain.ours, [])[0]), "switched off"
    assert distance(passes(plain.ours, [])[:1], expected[:1]) > 1e-2, "the control: it changes what comes out"


@pytest.mark.parametrize(("wide", "inner"), [(35, 43), (128, 64)])
def test_any_sizes_and_double_quantization_are_those_of_transformers(
    wide: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """35 and 43 are no whole 16 bytes, and no whole blocks; matrices of 128 x 128 are whole blocks of scales too."""
    for kind in ("packed", "double", "plain"):
        both = pair("mixtral", kind, hidden_size=wide, intermediate_size=inner)
        expected = passes(both.theirs, both.their_learning, wide)
        for budget in (2**29, 3 * 4 * wide * 2 * inner):
            monkeypatch.setattr(HeldStack, "at_once", budget)
            assert distance(passes(both.ours, both.our_learning, wide), expected) < 1e-6


class Counted(TorchDispatchMode):
    """How often a number is copied to the host, which waits for a GPU; a list of them is one copy and counted by
    `tolist`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tensors that were asked for as lists."""
    asked: list[int] = []
    plain: Callable[[Tensor], Any] = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: asked.append(tensor.numel()) or plain(tensor))
    return asked


def test_the_host_does_not_wait_where_a_stack_fits_and_once_a_pass_where_not(
    lists: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = pair("qwen3_moe", "packed")
    with Counted() as eager:
        passes(both.theirs, [])
    assert eager.waits > EXPERTS, "the control: transformers asks for each expert"
    for budget, expected in ((2**29, 0), (3 * 4 * WIDE * 2 * INNER, 1)):
        monkeypatch.setattr(HeldStack, "at_once", budget)
        lists.clear()
        with Counted() as ours:
            passes(both.ours, [])
        assert (ours.waits, len(lists)) == (0, expected)


def test_a_stack_is_dequantized_in_portions_and_not_where_nobody_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    both = pair("mixtral", "packed")
    asked: list[tuple[int, int]] = []
    stack = both.ours.down_proj
    plain = stack.matrices
    monkeypatch.setattr(stack, "matrices", lambda first, last, by: asked.append((first, last)) or plain(first, last))
    monkeypatch.setattr(HeldStack, "at_once", 2 * 4 * WIDE * INNER)
    x, index = torch.randn(6, WIDE), torch.tensor([[0, 1, 7]] * 6)
    both.ours(x, index, torch.rand(6, 3))
    assert asked == [(0, 2), (6, 8)]


def test_the_visits_to_each_expert_are_counted_on_the_device(lists: list[int]) -> None:
    both = pair("mixtral", "packed")
    index = torch.tensor([[0, 1, 7]] * 6 + [[1, 2, 3]])
    for _ in range(2):
        with Counted() as counted:
            both.ours(torch.randn(7, WIDE), index, torch.rand(7, 3))
        assert (counted.waits, lists) == (0, [])
    assert torch.equal(both.ours.visits, 2 * torch.bincount(index.flatten(), minlength=EXPERTS))
    assert both.ours.each == 3


def test_the_same_bits_come_out_every_time_and_autograd_keeps_no_weight() -> None:
    both = pair("gpt_oss", "packed")
    adapt(both, 3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        first = passes(both.ours, both.our_learning)
    again = passes(both.ours, both.our_learning)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert saved
    assert not any(len(tensor) == EXPERTS and tensor.ndim == 3 for tensor in saved)
    assert not any(tensor.dtype == torch.uint8 for tensor in saved)


def test_experts_without_rows_have_no_gradient_where_the_kernel_leaves_theirs_unwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = torch.nn.functional.grouped_mm

    def leaves_unwritten(rows: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
        result = plain(rows, matrices, offs=offs)
        result[torch.diff(offs, prepend=offs.new_zeros(1)) == 0] = torch.nan
        return result

    groups = Groups(torch.tensor([[0, 1, 7]] * 6), EXPERTS)
    left, right = torch.randn(18, 8), torch.randn(18, 16)
    expected = groups.outer(left, right)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_unwritten)
    assert torch.equal(groups.outer(left, right), expected)
    assert not expected[2:7].any()


@pytest.mark.parametrize("kind", ["llama4", "gpt-oss", "qwen3-moe", "mimo-v2-flash"])
def test_adapters_of_experts_have_the_names_and_shapes_that_peft_gives_them(kind: str) -> None:
    settings = {"tie_word_embeddings": False, **BASES, **{**FAMILIES_OF_BASES, **KINDS}[kind]}
    architecture = read_architecture(settings)
    config = parse_config(RUN, ("tuning.rank=4", "tuning.experts=true", "tuning.experts_rank=3"))
    method: Any = method_of(config)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    described = method.described(architecture)
    lora = method.method.adapting(method.method.ends(architecture))
    for key, value in described.items():
        setattr(lora, key, value)
    theirs = {
        name.replace(".default", ""): tuple(part.shape)
        for name, part in inject_adapter_in_model(lora, model, low_cpu_mem_usage=True).named_parameters()
        if ".lora_" in name
    }
    ours: dict[str, tuple[int, ...]] = {
        name.replace(".default", ""): shape for name, shape in method.method.shapes(architecture).items()
    }
    shapes = method.shapes(architecture)
    for name, saved in saved_as(architecture).items():
        path, _, leaf = name.rpartition(".")
        a, b = (shapes[f"{path}.adapters.{leaf}.{part}"] for part in ("lora_A", "lora_B"))
        (count, rank, inputs), (_, outputs, _) = a, b
        assert rank == 3
        ours[f"{saved.a}.weight"], ours[f"{saved.b}.weight"] = (count * rank, inputs), (outputs, rank * count)
    assert sum("experts" in name for name in ours) >= 4
    assert ours == theirs


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_by_moved_codes_are_products_by_the_stack_with_the_adapter_in_it(
    transposed: bool, swapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with codes have matrices (in, out) where `transposed`. A class that is `swapped` has them unsaid."""
    drawn = torch.Generator().manual_seed(1)
    inputs, outputs = 4, 6
    by_inputs = transposed != swapped  # the class multiplies by matrices (in, out)
    stack = torch.randn(3, *((inputs, outputs) if by_inputs else (outputs, inputs)), generator=drawn)
    ends = (outputs, inputs) if swapped else (inputs, outputs)
    a, b = torch.randn(3, 2, ends[0], generator=drawn), torch.randn(3, ends[1], 2, generator=drawn)
    adapter, groups = ExpertLora(a, b, 0.5, swapped=swapped), Groups(torch.tensor([[0, 2], [2, 1], [0, 1]]), 3)
    adapter.compute_through("stack", transposed=transposed)
    rows, sign = (torch.randn(6, size, generator=drawn) for size in (inputs, outputs))
    rows.requires_grad_()

    def moved(rows: Tensor, stack: Tensor, groups: Groups, by_inputs: bool, by: Any) -> Tensor:
        changed = stack + by.change(0, len(stack) * stack.shape[1]).view(stack.shape)
        return groups.product(rows, changed if by_inputs else changed.mT)

    monkeypatch.setattr("trainer.tuning.experts.layer.grouped_product", moved)
    learning = [rows, adapter.lora_A, adapter.lora_B]
    found = adapter.through(rows, groups, stack, by_inputs)
    of_expert = torch.repeat_interleave(torch.arange(3), 2)
    product = adapter.lora_B @ adapter.lora_A * 0.5  # as PEFT adds it to matrices of its own layout
    whole = stack + (product.mT if transposed else product)
    expected = torch.stack(
        [row @ (one if by_inputs else one.mT) for row, one in zip(rows, whole[of_expert], strict=True)]
    )
    torch.testing.assert_close(found, expected)
    for of_found, of_expected in zip(
        *(torch.autograd.grad((one * sign).sum(), learning) for one in (found, expected)), strict=True
    ):
        torch.testing.assert_close(of_found, of_expected)


@pytest.mark.parametrize(("first", "rows"), [(0, 12), (0, 4), (3, 5), (7, 2), (11, 1)])
def test_an_update_of_a_stack_is_added_to_any_rows_as_plain_products_are(first: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(3, *shape, generator=generator) for shape in ((4, 2), (2, 5)))
    stack, update = torch.randn(12, 5, generator=generator), StackUpdate(up, down, 0.5)
    whole = stack + (0.5 * up @ down).view(12, 5)
    given = stack[first : first + rows].clone()
    update.apply_to(given, first)
    torch.testing.assert_close(given, whole[first : first + rows])
    torch.testing.assert_close(update.change(first, rows), (whole - stack)[first : first + rows])
