"""Noise on the embeddings of tokens in training (NEFTune, arXiv:2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.micro_batch import ModelInput


@contextmanager
def noise_on(embedding: nn.Module, row: ModelInput, alpha: float) -> Iterator[None]:
    """Add uniform noise in [-a, a] to the embeddings inside the context, with a = alpha / sqrt(L * H).

    L is the number of tokens of the document, H the size of an embedding. transformers takes L from the longest text of
    a batch, with its padding. Here a document's noise does not depend on its neighbours.
    """

    def add_noise(module: nn.Module, given: Any, found: Tensor) -> Tensor:
        lengths = torch.tensor(row.segments.lengths)
        tokens = lengths.repeat_interleave(lengths)[row.first : row.first + found.shape[1]]
        most = alpha / (tokens.to(found.device) * found.shape[2]).float().sqrt()
        return found + torch.empty_like(found).uniform_(-1, 1) * most.to(found.dtype)[:, None]

    with embedding.register_forward_hook(add_noise):
        yield
