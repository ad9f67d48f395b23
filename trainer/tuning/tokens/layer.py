"""Rows of the vocabulary that learn, in the place of rows of a frozen embedding and behind its end."""

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """The base's embedding, but `trainable_tokens_delta` (tokens, H) for the ids (tokens,) int64.

    The parameter has PEFT's name, but is the rows themselves. An id may lie behind the last row of the base. `start`
    (tokens, H) are the rows to begin with, which come back where `active` is off.
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
