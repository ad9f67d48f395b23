"""A prompt of virtual tokens (arXiv:2104.08691): every document begins with them, and their embeddings are learnt."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.model.parts import body
from trainer.model.rows.row import set_documents_apart


class Prompt(nn.Module):
    """The embeddings of P virtual tokens. Parameter: weight (P, hidden)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        self.active = True

    def forward(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """(1, T, hidden) and (1, T): a token at position i < P of its document becomes virtual token i."""
        tokens = len(self.weight)
        chosen = nn.functional.embedding(position_ids.clamp(max=tokens - 1), self.weight)
        return torch.where((position_ids < tokens).unsqueeze(-1), chosen, embeddings)


def add_prompt(model: PreTrainedModel, start: Tensor) -> Prompt:
    """Make `model` put a prompt into the first P positions of each document. It starts as `start` (P, hidden).

    While the prompt is not `active`, these positions are documents of their own that no other token sees. The rest of
    the row is then computed as if they were not there.
    """
    prompt, tokens = Prompt(start), len(start)
    model.add_module("prompt", prompt)

    def enter(_module: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = given["position_ids"]
        if prompt.active:
            embeddings = model.get_input_embeddings()(given.pop("input_ids"))
            return arguments, {**given, "inputs_embeds": prompt(embeddings, positions)}
        set_documents_apart(tokens)
        given["position_ids"] = torch.where(positions < tokens, positions, positions - tokens)
        if "cu_seq_lens_q" in given:
            given["cu_seq_lens_q"] = given["cu_seq_lens_k"] = _apart(given["cu_seq_lens_q"], tokens)
        return arguments, given

    body(model).register_forward_pre_hook(enter, with_kwargs=True)
    return prompt


def _apart(borders: Tensor, tokens: int) -> Tensor:
    """Add a border behind the first `tokens` of each document, or at its end if it is shorter.

    (documents + 1,) -> (2 * documents + 1,).
    """
    begins, ends = borders[:-1], borders[1:]
    inside = torch.minimum(begins + tokens, ends)
    return torch.cat([torch.stack([begins, inside], dim=1).flatten(), borders[-1:]])
