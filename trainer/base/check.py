"""Whether the base is one that this project can train with these settings.

Everything here is read without torch and before any rank starts, so that a wrong base costs seconds.
"""

from trainer.base.base import Base
from trainer.base.config_json import tokenizer_size
from trainer.base.parameters import find_source
from trainer.config import Config
from trainer.errors import ConfigError


def check_base(base: Base, config: Config) -> None:
    """Everything about the base and the run's settings that can be wrong before a byte of weights is read."""
    wrong = base.description.mismatches(config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    vocabulary = base.architecture.vocabulary
    find_source(base, base.architecture.embedding, (vocabulary, base.architecture.hidden))
    base.stored.check(base, config)
    tokens = tokenizer_size(base.directory, base.name)
    if tokens > vocabulary:
        raise ConfigError(
            f"model.base: the tokenizer of {base.name} has {tokens} tokens, the embedding {vocabulary} rows. "
            "Use the tokenizer that belongs to this model, or resize the embedding with resize_token_embeddings()."
        )
