"""Whether the base is one that this project can train with these settings.

Everything here is read without torch and before any rank starts, so that a wrong base costs seconds.
"""

from trainer.base.base import Base
from trainer.base.config_json import tokenizer_size
from trainer.config import Config
from trainer.errors import ConfigError


def check_base(base: Base, config: Config) -> None:
    """Everything about the base and the run's settings that can be wrong before a byte of weights is read."""
    wrong = base.description.mismatches(config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    vocabulary = base.architecture.vocabulary
    _check_embedding(base)
    base.stored.check(base, config)
    tokens = tokenizer_size(base.directory, base.name)
    if tokens > vocabulary:
        raise ConfigError(
            f"model.base: the tokenizer of {base.name} has {tokens} tokens, the embedding {vocabulary} rows. "
            "Use the tokenizer that belongs to this model, or resize the embedding with resize_token_embeddings()."
        )


def _check_embedding(base: Base) -> None:
    """Raises `ConfigError` unless the files have an embedding as config.json says, under whatever name.

    Every weight is checked by the ranks, which have transformers (trainer/base/parameters.py).
    """
    wide = [part for part in base.architecture.parameters if part.kind in ("embedding", "head")]
    name, shape = wide[0].name, wide[0].shape
    named = [tensor.shape for stored, tensor in base.weights.items() if stored.endswith(name)]
    needed = sum(part.shape == shape for part in wide)
    if not named and sum(tensor.shape == shape for tensor in base.weights.values()) < needed:
        raise ConfigError(
            f"model.base: {base.name} has no tensor {name}, which its architecture needs. Copy the model again."
        )
    if named and shape not in named:
        raise ConfigError(
            f"model.base: {name} is {list(named[0])} in {base.name}, {list(shape)} by config.json. Copy the model again."
        )
