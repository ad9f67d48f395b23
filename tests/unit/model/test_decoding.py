"""A text that grows a token at a time has the logits of the whole text, in every family: what its layers keep is
enough.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tests.families import QUICK, rows
from tests.unit.model.test_documents import KINDS, build
from trainer.base.find.processor import PROMPTS
from trainer.evaluate.generation import GrowingText, _grown, next_logits
from trainer.model.attention import VARLEN, Attention, no_mask, varlen_attention
from trainer.model.head import LossHead
from trainer.model.kernels.attention import FLASH
from trainer.model.micro_batch import Seen
from trainer.model.packed import PackedModel

PASSES = [28, *[1] * 5]  # tokens of each pass; the first has more than any window


def packed(kind: str, train: bool = False) -> PackedModel:
    model: Any = build(kind).train(train)
    plain = model.get_output_embeddings()
    head = LossHead(plain.in_features, plain.out_features, bias=False)
    head.weight = plain.weight
    head.train(train)
    model.set_output_embeddings(head)
    return PackedModel(model, Attention("eager", ""))


@pytest.mark.parametrize("kind", rows(KINDS, [*QUICK, "mistral", "minimax"]))
def test_the_logits_are_those_of_the_whole_text_in_each_family(kind: str) -> None:
    """The control: a pass reads no more than the new tokens."""
    model = packed(kind)
    grow(model, model)


@torch.no_grad()
def grow(model: PackedModel, reference: PackedModel) -> None:
    """Have a text grow by passes of `model`, and compare its logits with those of the whole text by the `reference`."""
    tokens = torch.randint(3, 200, (1, sum(PASSES)), generator=torch.Generator().manual_seed(1))
    read = list[int]()
    embed: nn.Module = model.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _module, given: read.append(given[0].shape[1]))
    text, found = GrowingText(tokens[:, :0]), dict[int, Tensor]()
    for size in PASSES:
        text.tokens = tokens[:, : text.tokens.shape[1] + size]
        found[text.tokens.shape[1]] = next_logits(model, text)
    passes = list(read)
    for length, logits in found.items():
        whole = reference.logits(tokens[:, :length])[0, -1]
        assert (logits - whole).norm() < 1e-4 * whole.norm(), (length, passes)
    assert passes == PASSES


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    borders_k: Tensor,
    longest: int,
    longest_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """PyTorch's kernel for one text, in plain operations, with what the kernel asserts or else reads from where nothing
    is: see CHECK_CONTIGUOUS(cu_seqlens_q) in csrc/flash_attn/flash_api.cpp of Dao-AILab/flash-attention, of which
    PyTorch has a copy."""
    for part, lengths, most in ((query, borders, longest), (key, borders_k, longest_k)):
        assert lengths.is_contiguous()
        assert lengths.dtype == torch.int32
        assert lengths.tolist() == [0, len(part)] == [0, most]
    back = torch.arange(len(key) - len(query), len(key))[:, None] - torch.arange(len(key))
    seen = (back >= 0) & ((back <= window_size[0]) if window_size[0] >= 0 else True)
    parts = (part.transpose(0, 1) for part in (query, key, value))
    attend = nn.functional.scaled_dot_product_attention
    return attend(*parts, attn_mask=seen, scale=scale, enable_gqa=enable_gqa).transpose(0, 1)


varlen_attn.__signature__ = inspect.signature(varlen.varlen_attn)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_varlen_kernel_is_told_of_the_keys_that_are_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistral's layers keep no more keys of a text than their window has."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, no_mask)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    model: Any = packed(kind)
    model.model.config._attn_implementation = VARLEN
    grow(PackedModel(model.model, Attention(VARLEN, "")), packed(kind))


@pytest.mark.parametrize("name", FLASH)
def test_flash_attn_goes_by_the_keys_that_are_there(name: str) -> None:
    """transformers' call of it for one text, which the first pass is no different from."""
    borders = torch.tensor([0, 5], dtype=torch.int32)
    assert Attention(name, "").arguments(borders[:1], 1, (borders, 5)) == {}
    assert Attention(name, "").arguments(borders, 5)["cu_seq_lens_k"] is borders, (
        "the control: a packed row has borders"
    )


@pytest.mark.parametrize("answer", [0, 1])
def test_new_tokens_behind_pictures_are_of_text_and_of_an_answer_where_types_tell(answer: int) -> None:
    other, pixels = "mm_token_type_ids", torch.ones(2, 3)
    given = {name: torch.tensor([[1, 1, 0]]) for name in (PROMPTS, other)}
    found = _grown(Seen(0, {"pixel_values": pixels, **given}), 5, answer).inputs
    assert found[PROMPTS].tolist() == [[1, 1, 0, answer, answer]]
    assert found[other].tolist() == [[1, 1, 0, 0, 0]]
    assert found["pixel_values"] is pixels
