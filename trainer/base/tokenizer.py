"""The type of a run's tokenizer, for whoever only names it: transformers takes seconds to import, and `plan` does
without.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any
