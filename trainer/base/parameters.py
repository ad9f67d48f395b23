"""Which stored tensors make each parameter of the model, and whether the base is one that this project can train.

Everything here is read without torch and before any rank starts, so that a wrong base costs seconds.
"""

import re
from collections.abc import Iterable

from trainer.base.architecture import mismatches, read_architecture, stored_names
from trainer.base.description import tokenizer_size
from trainer.base.locate import Base
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.safetensors_index import Source, Stacked, TensorSource

WEIGHT_DTYPES = ("BF16", "F16", "F32")


def check_base(base: Base, config: Config) -> None:
    """Everything about the base and the run's settings that can be wrong before a byte of weights is read."""
    wrong = mismatches(config, base.config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    architecture = read_architecture(base.config, config.model.layers)
    find_source(base, "model.embed_tokens.weight", (architecture.vocabulary, architecture.hidden))
    if not base.quantized:
        for name, shape in architecture.weight_shapes().items():
            find_source(base, name, shape)
    tokens = tokenizer_size(base.directory, base.name)
    if tokens > architecture.vocabulary:
        raise ConfigError(
            f"model.base: the tokenizer of {base.name} has {tokens} tokens, the embedding {architecture.vocabulary} rows. "
            "Use the tokenizer that belongs to this model, or resize the embedding with resize_token_embeddings()."
        )


def find_source(base: Base, name: str, shape: tuple[int, ...]) -> Source:
    """What the files hold of the model's parameter `name`.

    Raises:
        ConfigError: they lack it, have it in another shape, or in a type that cannot be read.
    """
    names = (name,) if name in base.tensors else stored_names(base.config, name)
    slices = shape[0] if len(shape) == 3 else 1
    # Experts that are stored singly: (experts, rows, columns) of files that have rows / parts of each.
    part_shape = shape if len(names) == 1 else (shape[1] * slices // len(names), shape[2])
    parts = tuple(_checked(base, stored, part_shape) for stored in names)
    if len({part.dtype for part in parts}) > 1:
        raise ConfigError(
            f"model.base: the experts of {name} are of several types in {base.name}. Copy the model again."
        )
    return parts[0] if len(parts) == 1 else Stacked(parts, shape)


def _checked(base: Base, name: str, shape: tuple[int, ...]) -> TensorSource:
    source = base.tensors.get(name)
    if source is None:
        raise ConfigError(
            f"model.base: {base.name} has no tensor {name}, which its architecture needs. Copy the model again."
        )
    if source.shape != shape:
        raise ConfigError(
            f"model.base: {name} is {list(source.shape)} in {base.name}/{source.key}, {list(shape)} by config.json. "
            "Copy the model again."
        )
    if source.dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"model.base: {name} is of type {source.dtype}. Readable are {', '.join(WEIGHT_DTYPES)}.")
    return source


def check_no_other(base: Base, names: Iterable[str], ignored: Iterable[str], layers: int | None) -> None:
    """Raises `ConfigError` when the files have a tensor that is no part of the model's parameters `names`.

    Such a model is not the one that config.json describes: a bias or a layer would be left out without a word. `ignored`
    are patterns that transformers ignores as well; with `layers` the rest of the base is left out on purpose.
    """
    known = set(names)
    for name in list(known):
        known.update(stored_names(base.config, name))
    left_out = [*ignored, r"rotary_emb\.inv_freq$"]
    if base.config.get("tie_word_embeddings", True):
        left_out.append(r"^lm_head\.weight$")
    if layers:
        left_out.append(r"^model\.layers\.")
    others = [
        name for name in base.tensors if name not in known and not any(re.search(pattern, name) for pattern in left_out)
    ]
    if others:
        raise ConfigError(
            f"model.base: {base.name} has the tensor {others[0]}, which the architecture of its config.json has not "
            f"({len(others)} such tensors). Give the config.json that belongs to these files."
        )
