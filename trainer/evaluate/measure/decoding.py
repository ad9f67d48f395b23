"""One text that grows a token at a time.

It has what the layers keep of the tokens so far, and gives the logits of the next token.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from trainer.model.packed import PackedModel
from trainer.model.parts import body

# These names are used by bodies of transformers for what they keep, as an argument and in their output.
_KEPT = ("cache", "past_key_values", "cache_params")


@dataclass(eq=False)
class GrowingText:
    """One text. A base that keeps nothing reads the whole text again for each token.

    Attributes:
        tokens: (1, T) int64.
        keeps: whether the layers may keep anything. They may not if virtual tokens in the row are switched off: these
            are documents of their own then, which kept keys would not show.
        read: the number of tokens that have been read.
        kept: what the layers keep of them, keys and values or states, under transformers' name for it.
    """

    tokens: Tensor
    keeps: bool = True
    read: int = 0
    kept: tuple[str, Any] | None = None

    def to(self, device: torch.device) -> Self:
        self.tokens = self.tokens.to(device)
        return self

    def append(self, token: int) -> None:
        self.tokens = torch.nn.functional.pad(self.tokens, (0, 1), value=token)


def next_logits(model: PackedModel, text: GrowingText) -> Tensor:
    """Return the logits of the token after the text, (V,) fp32. From now on the text's tokens count as read."""
    tokens = torch.nn.functional.pad(text.tokens, (model.reserved, 0))
    length = tokens.shape[1]
    given = dict([text.kept]) if text.kept else {}
    borders = torch.tensor([[0, length - text.read], [0, length]], dtype=torch.int32, device=tokens.device)
    of_keys = (borders[1], length) if text.read else None
    result = body(model.model)(
        input_ids=tokens[:, text.read :],
        position_ids=torch.arange(text.read, length, device=tokens.device)[None],
        use_cache=text.keeps,
        **given,
        **model.attention.arguments(borders[0], length - text.read, of_keys),
    )
    kept = next(((name, found) for name in _KEPT if (found := getattr(result, name, None)) is not None), None)
    if text.keeps and kept is not None:
        text.kept, text.read = kept, length
    return model.head(result.last_hidden_state[:, -1])[0].float()
