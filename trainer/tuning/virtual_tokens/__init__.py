"""Methods that learn virtual tokens before each document, over a frozen base. They share their settings and start.

Prompt tuning (arXiv:2104.08691): every document begins with virtual tokens, whose embeddings are learnt. The prompt is
(virtual_tokens, hidden). Its tokens take the first positions of each document in a packed row, so a document sees its
prompt as it sees its own tokens, with any attention kernel.

Prefix tuning (arXiv:2101.00190): every attention layer learns keys and values that stand before each document. A
layer's prefix is (2, kv_heads, virtual_tokens, head): keys, then values. The paper trains an MLP that outputs them, and
keeps only its output. Here they are parameters themselves, which PEFT calls a prefix without projection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.errors import ConfigError
from trainer.model.kernels.attention import FLASH
from trainer.tuning.linear_adapters import PEFT_FILES, peft_files
from trainer.tuning.method import ExportedFiles, MethodOfSettings, VirtualTokens, flagged

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Model, Tuning


# The name of the only tensor in PEFT's file, for all of these methods.
PEFT_TENSOR = "prompt_embeddings"
# The prompt's name in the model; see trainer/tuning/virtual_tokens/layer.py.
_WEIGHT = "prompt.weight"
_NO_KEYS = "it takes no keys and values beside those of a row's own tokens"
_KERNELS: dict[str, str] = dict.fromkeys((*FLASH, "flex_attention", "eager"), _NO_KEYS)


@dataclass(frozen=True)
class BesideBase(MethodOfSettings):
    """A method with virtual tokens, which a subclass feeds into the base."""

    settings: ClassVar[Collection[str]] = ("virtual_tokens", "init_text")
    defaults: ClassVar[Mapping[str, Any]] = {"init_text": None}
    unmergeable: ClassVar[str | None] = (
        "virtual tokens stand before a document's own, and no weight of the base can hold them"
    )
    file_names: ClassVar[Collection[str]] = PEFT_FILES
    adapts_4_bits: ClassVar[bool] = True

    def first_tokens(self, model: PreTrainedModel, seed: int) -> Tensor:
        """The ids of the tokens from which the virtual ones start, (virtual_tokens,) int64. Equal on every rank.

        Raises `ConfigError` if `init_text` has no token.
        """
        import torch
        from transformers import AutoTokenizer

        from trainer.base.unreadable import read_by_transformers

        count, vocabulary = self.tuning.virtual_tokens, model.config.get_text_config().vocab_size
        if self.tuning.init_text is None:
            return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
        folder = model.name_or_path
        assert folder
        with read_by_transformers(folder, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokens = tokenizer(self.tuning.init_text)["input_ids"]  # as the base's own begins a document with them
        if not tokens:
            raise ConfigError("tuning.init_text: the base's tokenizer makes no token of it. Write some words.")
        return torch.tensor((tokens * count)[:count])


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
        from trainer.tuning.virtual_tokens.layer import add_prompt

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


@dataclass(frozen=True)
class PrefixTuning(BesideBase):
    """Keys and values that every token of a document sees in every layer."""

    groups_by_end: ClassVar[Mapping[str, str]] = {"prefix": "prefix"}

    @property
    def virtual(self) -> VirtualTokens:
        return VirtualTokens(self.tuning.virtual_tokens, in_row=False, refused_kernels=_KERNELS)

    def mismatches(self, architecture: Architecture) -> list[str]:
        with_keys = {layer.layer: (layer.key_value_heads, layer.head_size) for layer in architecture.attention}
        if len(with_keys) == architecture.layers and None not in [
            size for sizes in with_keys.values() for size in sizes
        ]:
            return []
        return [
            "tuning.method: prefix needs keys and values of the same heads and width in every layer, which this base"
            " has not. Choose prompt."
        ]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {
            f"{layer.path}.prefix": (2, layer.key_value_heads or 0, self.tuning.virtual_tokens, layer.head_size or 0)
            for layer in architecture.attention
        }

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """The prefixes start as the keys and values of a text. One forward pass of the base computes these.

        ZeRO-3 gathers the base layer by layer for it.
        """
        from trainer.model.parts import in_order
        from trainer.state.zero.engine import gathered_in_turn
        from trainer.tuning.virtual_tokens.layer import add_prefixes, keys_and_values

        layers = [model.get_submodule(layer.path) for layer in architecture.attention]
        embedding: Any = model.get_input_embeddings()
        tokens = self.first_tokens(model, seed).to(embedding.weight.device)
        with gathered_in_turn(in_order(model)):
            starts = keys_and_values(model, tokens)
        add_prefixes(model, layers, [start.to(dtype) for start in starts])

    def switched_off(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        layers = [module for module in model.modules() if hasattr(module, "attends_to_prefix")]
        return flagged(layers, "attends_to_prefix", False)

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder, whose one matrix is (virtual_tokens, layers * 2 * kv_heads * head)."""
        import torch
        from peft import PrefixTuningConfig

        every = torch.stack([weights[name] for name in sorted(weights, key=_layer)])
        layers, _, heads, tokens, size = every.shape
        matrix = every.permute(3, 0, 1, 2, 4).reshape(tokens, -1).contiguous()
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.tuning.virtual_tokens,
            num_layers=layers,
            num_attention_heads=heads,
            token_dim=heads * size,
            num_transformer_submodules=1,
        )
        return ExportedFiles("peft", "A prefix", peft_files(config, {PEFT_TENSOR: matrix}, model, prefix=""))


def _layer(name: str) -> int:
    """The number of the decoder layer that a parameter is in."""
    return int(next(part for part in name.split(".") if part.isdigit()))


METHODS: dict[str, Callable[[Tuning], BesideBase]] = {"prefix": PrefixTuning, "prompt": PromptTuning}
ABOUT = {
    "prefix": "learnt keys and values of virtual tokens in every layer",
    "prompt": "learnt virtual tokens before each document",
}
