"""Prompt tuning (arXiv:2104.08691): every document begins with virtual tokens, whose embeddings are learnt.

The prompt is (virtual_tokens, hidden). Its tokens take the first positions of each document in a packed row, so a
document sees its prompt as it sees its own tokens, with any attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.base.architecture import Architecture
from trainer.config import Model, Tuning
from trainer.tuning.method import ExportedFiles, VirtualTokens
from trainer.tuning.shared.linear_adapters import peft_files
from trainer.tuning.shared.virtual_tokens import PEFT_TENSOR, BesideBase

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

# The name in the model; see trainer/tuning/prompt/layer.py.
_WEIGHT = "prompt.weight"


@dataclass(frozen=True)
class PromptTuning(BesideBase):
    """Virtual tokens in the place of each document's first ones."""

    groups_by_end: ClassVar[Mapping[str, str]] = {"prompt": _WEIGHT}
    counts_activations: ClassVar[bool] = True

    @property
    def virtual(self) -> VirtualTokens:
        return VirtualTokens(self.tuning.virtual_tokens, in_row=True)

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {_WEIGHT: (self.tuning.virtual_tokens, architecture.hidden)}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """The prompt starts as the embeddings of tokens of the vocabulary. The embedding is gathered once for it."""
        import torch

        from trainer.state.zero.engine import gathered
        from trainer.tuning.prompt.layer import add_prompt

        embedding: Any = model.get_input_embeddings()
        tokens = self.first_tokens(model, seed)
        with gathered(embedding), torch.no_grad():
            start = embedding(tokens.to(embedding.weight.device)).to(dtype)
        add_prompt(model, start)

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder."""
        from peft import PromptTuningConfig

        (weight,) = weights.values()
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.tuning.virtual_tokens,
            token_dim=weight.shape[1],
            num_transformer_submodules=1,
        )
        return ExportedFiles("peft", "A prompt", peft_files(config, {PEFT_TENSOR: weight}, model, prefix=""))


METHODS: dict[str, Callable[[Tuning], PromptTuning]] = {"prompt": PromptTuning}
ABOUT = {"prompt": "virtual tokens before each document"}
