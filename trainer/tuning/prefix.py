"""Prefix tuning (arXiv:2101.00190): keys and values before those of each document are learnt, in every attention layer.

A layer's prefix is (2, kv_heads, virtual_tokens, head): keys, then values. The paper trains them as the output of an MLP and keeps
the output alone; here they are the parameters themselves, which PEFT calls a prefix without projection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.base.architecture import Architecture
from trainer.config import Model, Optim, Tuning
from trainer.tuning.linear_adapters import flagged, peft_files
from trainer.tuning.method import ExportedFiles, VirtualTokens
from trainer.tuning.virtual_tokens import PEFT_TENSOR, BesideBase

if TYPE_CHECKING:
    import torch
    from peft import PrefixTuningConfig
    from torch import Tensor
    from transformers import PreTrainedModel

_NO_KEYS = "it takes no keys and values beside those of a row's own tokens"
_KERNELS = {"flash_attention_2": _NO_KEYS, "eager": _NO_KEYS}


def _name(layer: int) -> str:
    """The name in the model; see trainer/model/prefix.py."""
    return f"model.layers.{layer}.self_attn.prefix"


@dataclass(frozen=True)
class PrefixTuning(BesideBase):
    """Keys and values that every token of a document sees in every layer."""

    @property
    def virtual(self) -> VirtualTokens:
        return VirtualTokens(self.tuning.virtual_tokens, in_row=False, refused_kernels=_KERNELS)

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        shape = (2, architecture.key_value_heads, self.tuning.virtual_tokens, architecture.head_size)
        return {_name(layer): shape for layer in range(architecture.layers)}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """The prefixes start as the keys and values of a text, for which the base computes once, gathered layer by layer."""
        from trainer.model.prefix import add_prefixes, keys_and_values
        from trainer.zero.engine import gathered_in_turn

        body: Any = model.model
        tokens = self.first_tokens(model, seed).to(body.embed_tokens.weight.device)
        with gathered_in_turn([body.embed_tokens, *body.layers, body.norm]):
            starts = keys_and_values(model, tokens)
        add_prefixes(model, [start.to(dtype) for start in starts])

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        from trainer.model.prefix import attention_layers

        return [{"name": "prefix", "lr_ratio": 1.0, "params": [layer.prefix for layer in attention_layers(model)]}]

    def switched_off(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        from trainer.model.prefix import attention_layers

        return flagged(attention_layers(model), "attends_to_prefix", False)

    def peft_config(self, layers: int, key_value_heads: int, head_size: int) -> PrefixTuningConfig:
        """PEFT's description of the prefixes."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.tuning.virtual_tokens,
            num_layers=layers,
            num_attention_heads=key_value_heads,
            token_dim=key_value_heads * head_size,
            num_transformer_submodules=1,
        )

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder, whose one matrix is (virtual_tokens, layers * 2 * kv_heads * head)."""
        import torch

        every = torch.stack([weights[_name(layer)] for layer in range(len(weights))])
        layers, _, heads, tokens, size = every.shape
        matrix = every.permute(3, 0, 1, 2, 4).reshape(tokens, -1).contiguous()
        config = self.peft_config(layers, heads, size)
        return ExportedFiles("peft", "A prefix", peft_files(config, {PEFT_TENSOR: matrix}, model, prefix=""))


METHODS: dict[str, Callable[[Tuning], PrefixTuning]] = {"prefix": PrefixTuning}
