"""A survey of the calls of a step that get 2**31 numbers or more: six large mixtures on `meta`, each with one dense and
one sparse layer of its real sizes.

bitsandbytes and the kernels of attention count in 32 bits, and no call of them gets more. PyTorch's operators that do
get more are listed with the reason why they may.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.unit.model.held.test_blockwise import ENTRIES, LIMIT, counted, on_meta
from trainer.base.load.load import empty_model
from trainer.config import parse_config
from trainer.model.attention import choose_attention
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldStack, hold
from trainer.model.kernels.attention import AttentionNeeds
from trainer.model.micro_batch import MicroBatch
from trainer.model.packed import PackedModel
from trainer.model.parts import is_experts
from trainer.tuning.experts.layer import ExpertLora

META = torch.device("meta")
MIXTURES = {
    "GLM-4.6": "zai-org/GLM-4.6",
    "MiniMax-M2": "MiniMaxAI/MiniMax-M2",
    "Qwen3-Coder-480B": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    "ERNIE-4.5-300B": "baidu/ERNIE-4.5-300B-A47B-PT",
    "DeepSeek-V3": "deepseek-ai/DeepSeek-V3",
    "Kimi-K2": "moonshotai/Kimi-K2.5",
}
ATTENTION = ("_varlen_attn", "_varlen_attn_backward")
MAY_HAVE_MORE = {
    **dict.fromkeys(("empty", "empty_like", "new_empty", "_unsafe_view"), "no kernel"),
    **dict.fromkeys(
        "_to_copy copy_ clone mul mul_ add add_ sum index zeros new_zeros silu silu_backward slice_backward".split(),
        "TensorIterator divides a call into parts whose places have 32 bits (with_32bit_indexing)",
    ),
    "cat": "it copies each tensor by TensorIterator where one has more (all32BitIndexable)",
    "mm": "rows and columns are far below 2**31 each, and cuBLAS computes places of them in 64 bits",
    "_grouped_mm": "strides and the groups' addresses have 64 bits (GroupMMCommon.cuh)",
}


class Survey(TorchDispatchMode):
    """The largest number of elements that each operator reads or writes. Views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.most: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            touched = list[Tensor]()
            tree_map_only(Tensor, touched.append, (args, kwargs, result))
            name = function.overloadpacket.__name__
            self.most[name] = max([self.most[name], *(tensor.numel() for tensor in touched)])
        return result


def model_of(base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> PackedModel:
    """Its first layers as a GPU's rank has them, without weights: NF4, and adapters of the experts."""
    (entry,) = (entry for entry in ENTRIES if base in entry["ids"])
    tree = entry["config"].get("text_config", entry["config"])
    tree = {"architectures": entry["config"].get("architectures"), **tree}
    tree |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_layer_start_index": 1}
    (folder / "config.json").write_text(json.dumps(tree))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    attention = choose_attention("varlen", torch.device("cuda"), torch.bfloat16, AttentionNeeds())
    facts = SimpleNamespace(logit_factor=1.0, logit_divisor=1.0, softcap=None, head="lm_head.weight")
    given: Any = SimpleNamespace(name=base, directory=folder, architecture=facts)
    run = "run: {name: a}\nmodel: {base: /b, dtype: bf16}\ndata: {train: [{path: a}]}\ntrain: {steps: 1}"
    model: Any = empty_model(given, parse_config(run, ["train.activation_checkpointing=false"]), attention)
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        linear = type(owner) is nn.Linear and name.endswith(".weight")
        if linear or (is_experts(owner) and parameter.ndim == 3):
            on_meta(hold(model, name, parameter, Blocks("nf4"), torch.bfloat16))
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(module, name, None)
            if isinstance(stack, HeldStack):
                stack.at_once = 2 * stack.slices * stack.numel  # all of it, as with enough room
                (rows, columns), count = stack.slice_shape, stack.slices
                a, b = (torch.empty(count, *shape, dtype=torch.bfloat16) for shape in ((16, columns), (rows, 16)))
                module.adapters[name] = ExpertLora(a, b, 2.0, swapped=False)
    model.enable_input_require_grads()  # what adapters of the first layer's attention would do
    return PackedModel(model.to(META), attention)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        pytest.param(name, tokens, marks=[] if (name, tokens) == ("MiniMax-M2", 4096) else pytest.mark.long)
        for tokens in (4096, 65_536)
        for name in MIXTURES
    ],
)
def test_only_operators_that_count_in_64_bits_get_as_many_numbers(
    name: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(MIXTURES[name], tmp_path, monkeypatch)
    row = MicroBatch.of_text(torch.zeros(1, tokens, dtype=torch.int64)).input.to(META)
    labels, places = torch.zeros(1, tokens, dtype=torch.int64, device=META), torch.arange(tokens, device=META)
    with counted() as most, Survey() as survey:
        model.head(model.hidden(row), labels, places).backward()
    assert 2**28 < most() < LIMIT  # of bitsandbytes
    assert all(0 < survey.most[kernel] < LIMIT for kernel in ATTENTION)
    more = {operator for operator, numel in survey.most.items() if numel >= LIMIT}
    assert more <= set(MAY_HAVE_MORE)
    assert "_grouped_mm" in more or tokens == 4096  # the survey sees the experts
