"""The base class of methods that learn virtual tokens before each document, over a frozen base.

It has their settings and their start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.base.unreadable import read_by_transformers
from trainer.errors import ConfigError
from trainer.tuning.method import OfSettings
from trainer.tuning.shared.linear_adapters import PEFT_FILES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# The name of the only tensor in PEFT's file, for all of these methods.
PEFT_TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class BesideBase(OfSettings):
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
