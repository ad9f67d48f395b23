"""A text that grows a token at a time has the logits of the whole text, in every family: what its layers keep is enough."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.test_documents import KINDS, build
from trainer.model.attention import Attention
from trainer.model.decoding import GrowingText, next_logits
from trainer.model.head import LossHead
from trainer.model.packed import PackedModel

PASSES = [28, *[1] * 5]  # tokens of each pass; the first has more than any window


def packed(kind: str) -> PackedModel:
    model: Any = build(kind).eval()
    plain = model.get_output_embeddings()
    head = LossHead(plain.in_features, plain.out_features, bias=False)
    head.weight = plain.weight
    model.set_output_embeddings(head)
    return PackedModel(model, Attention("eager", ""))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_logits_are_those_of_the_whole_text_in_each_family(kind: str) -> None:
    """The control: a pass reads no more than the new tokens."""
    model = packed(kind)
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
        whole = model.logits(tokens[:, :length])[0, -1]
        assert (logits - whole).norm() < 1e-4 * whole.norm(), (length, passes)
    assert passes == PASSES
