"""What transformers has no public way for: each test fails where it no longer is as our code takes it to be."""

import inspect
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.bamba.modeling_bamba import causal_conv1d_fn as bambas_convolution
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from tests.material import KINDS, SIZES
from trainer.base.describe.meta import _is_handed_on
from trainer.model.rows.mixing import _CONVOLUTION, _OTHERS, _OVER_HEADS, divides, functions_of_module


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the two functions that `keep_documents_apart` replaces, as they are called."""
    found = list[str]()
    find, interface = masking_utils.find_packed_sequence_indices, AttentionInterface.get_interface

    def finding(*arguments: Any, **given: Any) -> Any:
        found.append("documents")
        return find(*arguments, **given)

    def getting(*arguments: Any, **given: Any) -> Any:
        found.append("attention")
        return interface(*arguments, **given)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", finding)
    monkeypatch.setattr(AttentionInterface, "get_interface", getting)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_look_for_documents_and_layers_for_their_attention_where_they_are_replaced(
    attention: str, asked: list[str]
) -> None:
    config = AutoConfig.for_model(**SIZES, **KINDS["llama"])
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model(input_ids=torch.arange(4)[None], position_ids=torch.arange(4)[None], use_cache=False)
    assert asked == ["documents", *["attention"] * config.num_hidden_layers]


def test_masks_count_chunks_by_the_function_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking_utils, "chunked_overlay", lambda *_given: lambda *_place: torch.tensor(False))
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    assert not chunked(*(torch.tensor(0),) * 4)


def test_layers_name_the_functions_that_ranks_exchange_heads_around() -> None:
    assert "ALL_ATTENTION_FUNCTIONS" in functions_of_module(LlamaAttention.forward)
    used = functions_of_module(Qwen3NextGatedDeltaNet.forward)
    assert used.keys() & {_CONVOLUTION, *_OVER_HEADS} == {_CONVOLUTION, "torch_chunk_gated_delta_rule"}
    assert not used.keys() & _OTHERS
    # The states of Mamba 1 have another layout: each rank has the whole row.
    for mixer in (MambaMixer, JambaMambaMixer):
        assert _CONVOLUTION in functions_of_module(mixer.forward)
        assert not divides(mixer.__new__(mixer))
    assert vars(sys.modules[BambaMixer.__module__])[_CONVOLUTION] is bambas_convolution


@pytest.mark.parametrize(
    ("family", "function", "argument"),
    [
        ("mamba2", "mamba2_chunk_scan", "hidden_states"),
        ("qwen3_next", "torch_chunk_gated_delta_rule", "value"),
        ("kimi_linear", "chunk_kimi_delta_attention", "value"),
    ],
)
def test_the_argument_that_is_as_wide_as_the_result_is_where_it_was(family: str, function: str, argument: str) -> None:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    assert list(inspect.signature(getattr(module, function)).parameters)[_OVER_HEADS[function]] == argument


def test_the_code_of_a_layer_with_a_fused_kernel_hands_a_weight_on() -> None:
    mixer = BambaMixer.__new__(BambaMixer)
    assert _is_handed_on(mixer, "out_proj")
    assert not _is_handed_on(mixer, "in_proj")
