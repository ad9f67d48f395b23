"""Rows of the vocabulary that learn. They replace rows of a frozen embedding, or follow behind its last row."""

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """The base's embedding, with the rows of `ids` (tokens,) int64 replaced by `trainable_tokens_delta` (tokens, H).

    The parameter has PEFT's name but holds the rows themselves. An id may lie behind the last row of the base. `start`
    (tokens, H) has the first values of the rows, which are used again while `active` is false.
    """

    def __init__(self, base_layer: nn.Embedding, ids: Tensor, start: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active = True
        self.trainable_tokens_delta = nn.Parameter(start.clone())
        self.start = nn.Buffer(start, persistent=False)
        places = torch.full((max(base_layer.num_embeddings, int(ids.max()) + 1),), -1, device=ids.device)
        places[ids] = torch.arange(len(ids), device=ids.device)
        self.places = nn.Buffer(places, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., H)."""
        places = self.places[ids]
        ours = places >= 0
        theirs: Tensor = self.base_layer(ids.masked_fill(ours, 0))
        rows = self.trainable_tokens_delta if self.active else self.start
        found = nn.functional.embedding(places.clamp(min=0), rows)
        scale = dict(self.base_layer.named_buffers()).get("embed_scale")  # Gemma's, by which its embedding multiplies
        return torch.where(ours[..., None], found if scale is None else found * scale.to(found.dtype), theirs)
