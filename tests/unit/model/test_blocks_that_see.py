"""Tokens of a picture see each other in blocks, which a family finds by the places of tokens in the row; packed documents
see no blocks but their own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.families import SIZES
from trainer.model.documents import keep_documents_apart
from trainer.model.rows.row import AtWork, Prefixes, described, lengths_known

_TEXT = {**SIZES, "num_hidden_layers": 2, "head_dim": 16}
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SEES = {"image_size": 8, "patch_size": 4}
# A family that makes blocks of pictures -> its settings, and the name and the values of the token types by which it
# tells the tokens of a picture from others.
FAMILIES: dict[str, tuple[dict[str, Any], str, tuple[int, int]]] = {
    "gemma3": (
        {"text_config": {**_TEXT, **_MIXED}, "vision_config": {**_TOWER, **_SEES}, "mm_tokens_per_image": 4},
        *("token_type_ids", (1, 0)),
    ),
    "gemma4": (
        {
            "text_config": {**_TEXT, **_MIXED, "use_bidirectional_attention": "vision", "global_head_dim": 16}
            | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
            "vision_config": {**_TOWER, "head_dim": 8, "num_key_value_heads": 2},
        },
        *("mm_token_type_ids", (1, 0)),
    ),
    "paligemma": (
        {"text_config": {**_TEXT, "model_type": "gemma"}, "vision_config": {**_TOWER, **_SEES}, "projection_dim": 64},
        *("token_type_ids", (0, 1)),
    ),
    "molmo2": (
        {
            "text_config": _TEXT,
            "vision_config": {**_TOWER, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4},
            "adapter_config": {"vision_feature_layer": [3, 1], "hidden_size": 16, "num_attention_heads": 2}
            | {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "text_hidden_size": 64},
        },
        *("mm_token_type_ids", (1, 0)),
    ),
}
# The tokens of each document, and where its picture begins and ends: at different places, behind text and before it.
PICTURES = ((23, (3, 9)), (30, (14, 24)), (11, (1, 5)), (4, (0, 0)))
LENGTHS = tuple(length for length, _ in PICTURES)


def build(kind: str, kernel: str) -> Any:
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **FAMILIES[kind][0])
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation=kernel)
    keep_documents_apart(model)
    return model.eval()


def types(kind: str, pictures: tuple[tuple[int, tuple[int, int]], ...]) -> Tensor:
    """(1, T) the token types of documents with one picture each."""
    _, _, (seen, text) = FAMILIES[kind]
    every = [torch.full((1, length), text) for length, _ in pictures]
    for one, (_, (begin, end)) in zip(every, pictures, strict=True):
        one[:, begin:end] = seen
    return torch.cat(every, 1)


def hidden(
    model: Any, kind: str, ids: Tensor, marks: Tensor, lengths: tuple[int, ...], prefixes: Prefixes = ()
) -> Tensor:
    """(T, H) of a row of documents, by the whole class: it makes its masks before its decoder."""
    begins = [tokens for _, tokens in prefixes] or [0] * len(lengths)
    places = torch.cat([torch.arange(begin, begin + own) for begin, own in zip(begins, lengths, strict=True)])[None]
    with lengths_known(lengths, prefixes=prefixes), AtWork(described(places, are_told=True)):
        given = {FAMILIES[kind][1]: marks, "position_ids": places}
        return model.base_model(input_ids=ids, use_cache=False, **given).last_hidden_state[0]


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_document_with_blocks_is_what_it_is_alone(kind: str, kernel: str) -> None:
    model = build(kind, kernel)
    ids = torch.randint(3, 250, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    marks = types(kind, PICTURES)
    alone = [
        hidden(model, kind, one, mark, (one.shape[1],))
        for one, mark in zip(ids.split(LENGTHS, 1), marks.split(LENGTHS, 1), strict=True)
    ]
    packed = hidden(model, kind, ids, marks, LENGTHS)
    assert close(packed, torch.cat(alone))
    without = torch.full_like(marks, FAMILIES[kind][2][1])
    assert not close(hidden(model, kind, ids, without, LENGTHS), packed), "blocks change nothing, so nothing is tested"


@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
@torch.no_grad()
def test_an_answer_goes_on_from_a_prefix_with_a_block(kind: str) -> None:
    """The prompt is in the row once; the second answer sees it as if it lay directly before."""
    model, prompt, first, second = build(kind, "sdpa"), 12, 9, 20
    lengths = (5, prompt + first, second)
    ids = torch.randint(3, 250, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    marks = types(kind, ((5, (0, 3)), (prompt + first, (2, 7)), (second, (0, 0))))
    row = hidden(model, kind, ids, marks, lengths, ((0, 0), (0, 0), (5, prompt)))
    copied = torch.cat([torch.arange(5, 5 + prompt), torch.arange(5 + prompt + first, sum(lengths))])
    alone = hidden(model, kind, ids[:, copied], marks[:, copied], (prompt + second,))
    assert close(row[-second:], alone[prompt:])
