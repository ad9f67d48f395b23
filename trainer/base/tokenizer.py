"""The type of a run's tokenizer, for code that only names it.

transformers takes seconds to import, and `plan` does not import it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any
