"""The base model's directory: where it is, what it says of itself, and whether this project can train it.

Everything here is read without torch and before any rank starts, so that a wrong base costs seconds.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.architecture import ARCHITECTURES, mismatches, read_architecture
from trainer.config import Config, Model
from trainer.errors import ConfigError
from trainer.safetensors_index import TensorSource, read_index
from trainer.store import Store, open_store

WEIGHT_DTYPES = ("BF16", "F16", "F32")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # a path that begins with a dot is none
# What decides what a tokenizer does.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]


@dataclass(frozen=True)
class Base:
    """A Hugging Face model directory with safetensors files; `config` is its parsed config.json."""

    directory: Path
    config: dict[str, Any]

    @cached_property
    def store(self) -> Store:
        return open_store(str(self.directory))

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        return read_index(self.store)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the architecture, the tensors' names, shapes, types or places change. Weights are not hashed."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.key} {tensor.dtype} {tensor.shape} {tensor.offset}\n".encode())
        return digest.hexdigest()[:16]


def resolve_base(model: Model) -> Base:
    """Find the base: a directory, or a Hub id (downloaded through huggingface_hub's cache).

    Raises:
        ConfigError: it is missing, has no config.json, or is of an architecture that is not supported.
    """
    directory = Path(model.base).expanduser()
    if not directory.is_dir():
        directory = _from_hub(model)
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"model.base: {directory} has no config.json. Give a Hugging Face model directory."
        ) from error
    except ValueError as error:
        raise ConfigError(f"model.base: {path} is not JSON ({error}). Copy the model again.") from error
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(f"model.base: {directory} is a {kind!r} model. Supported are {', '.join(ARCHITECTURES)}.")
    if config.get("quantization_config"):
        raise ConfigError(
            f"model.base: {directory} is quantized already. Give the 16-bit model; quant.type quantizes it."
        )
    return Base(directory, config)


def _from_hub(model: Model) -> Path:
    if not _HUB_ID.fullmatch(model.base):
        raise ConfigError(
            f"model.base: the directory {model.base!r} does not exist. Give a Hugging Face model directory or a Hub id."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.base, revision=model.revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.base: {model.base!r} is no directory here, and the Hub did not give it ({reason}). "
            "Check the name, HF_TOKEN for a gated model, or download it to a directory first."
        ) from error


def check_base(base: Base, config: Config) -> None:
    """Everything about the base and the run's settings that can be wrong before a byte of weights is read."""
    wrong = mismatches(config, base.config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    for name, shape in read_architecture(base.config, config.model.layers).linear_shapes().items():
        check_tensor(base, name, shape)
    embedding = base.tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ConfigError(
            f"model.base: {base.directory} has no tensor model.embed_tokens.weight. Copy the model again."
        )
    rows, tokens = embedding.shape[0], tokenizer_size(base.directory)
    if tokens > rows:
        raise ConfigError(
            f"model.base: the tokenizer of {base.directory} has {tokens} tokens, the embedding {rows} rows. "
            "Use the tokenizer that belongs to this model, or resize the embedding with resize_token_embeddings()."
        )


def check_tensor(base: Base, name: str, shape: tuple[int, ...]) -> None:
    """Raises `ConfigError` unless the files have the tensor, of this shape and a type that can be read."""
    source = base.tensors.get(name)
    if source is None:
        raise ConfigError(
            f"model.base: {base.directory} has no tensor {name}, which its architecture needs. Copy the model again."
        )
    if source.shape != shape:
        raise ConfigError(
            f"model.base: {name} is {list(source.shape)} in {source.key}, {list(shape)} by config.json. "
            "Copy the model again."
        )
    if source.dtype not in WEIGHT_DTYPES:
        raise ConfigError(f"model.base: {name} is of type {source.dtype}. Readable are {', '.join(WEIGHT_DTYPES)}.")


def tokenizer_size(directory: Path) -> int:
    """One more than the largest token id, from the tokenizer's own files."""
    ids = [-1]
    if (directory / "tokenizer.json").is_file():
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        ids.append(len(vocabulary) - 1 if isinstance(vocabulary, list) else max(vocabulary.values(), default=-1))
        ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    elif (directory / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        ids.append(SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size() - 1)
    else:
        raise ConfigError(
            f"model.base: {directory} has neither tokenizer.json nor tokenizer.model. Copy the tokenizer's files there."
        )
    return max(ids) + 1
