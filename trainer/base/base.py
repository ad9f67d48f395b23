"""The interface of a base to other packages, and the interface of the formats in which its files store weights.

A stored format is one class. It checks the settings that it can serve, and maps the names of the weights in the files
to tensors that can be read in parts. The code that makes parameters of these tensors, quantizes and places them does
not depend on the format. A file of trainer/base/stored names its class in `STORED`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.base.architecture import Architecture, Parameter, architecture_mismatches
from trainer.base.weight_samples import sample_weights
from trainer.config import Config
from trainer.config.model import Tokens
from trainer.model.held.codes import KeptWeight
from trainer.store.safetensors_index import (
    FileHeader,
    HeaderText,
    PackedTensor,
    StoredTensor,
    TensorSource,
    read_headers,
)
from trainer.store.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # for code that only names the type: transformers takes seconds to import, and `plan` does not import it
    Tokenizer = Any


@dataclass(frozen=True)
class StoredFormat(ABC):
    """How the files of a base store its weights. The defaults hold for most formats.

    It is made from the quantization_config of config.json, or from {} if there is none.
    """

    quantization: dict[str, Any]

    readable: ClassVar[str]
    """The words for it in a sentence that lists what can be read."""
    unmergeable: ClassVar[str | None] = None
    """Why no weights with an adapter merged in can be written in this format, as a clause; None if they can."""
    quantized: ClassVar[bool] = False
    """Whether the weights are loaded in the 4 bits that they are stored in."""
    decoded: ClassVar[bool] = True
    """Whether they are stored in fewer bits and become 16-bit values as they are read."""
    dequantizes: ClassVar[bool] = False
    """Whether transformers by itself gives the same values, where it is told to dequantize; a proof reads them here
    otherwise.
    """

    @staticmethod
    @abstractmethod
    def stores(quantization: dict[str, Any]) -> bool:
        """Whether this quantization_config describes this format. At most one format may say so."""

    def mismatches(self, config: Config) -> list[str]:
        """One sentence for each setting that contradicts what config.json says about the format."""
        return []

    def kept(self, parameter: Parameter) -> KeptWeight | None:
        """How the files hold a weight that may stay as stored (`quant.type: stored`). None for other weights.

        It uses only config.json. A load asks the tensors themselves.
        """
        return None

    @abstractmethod
    def tensors(self, base: "Base") -> Mapping[str, StoredTensor | PackedTensor]:
        """The weights of the files, under the names of a plain base. A quantized weight and its scales are one tensor.

        Reads headers, and small facts stored beside weights, but no weights. Raises `ConfigError` if a part of a weight
        is missing, or has an unexpected shape or type.
        """

    # Most formats have one form, so there is nothing to check.
    def check(self, base: "Base", config: Config) -> None:  # noqa: B027
        """Raises `ConfigError` if the files have another form of the format than `config` needs. Reads no weights."""


@dataclass(frozen=True)
class Description:
    """The facts about a base that follow from config.json alone."""

    architecture: Architecture
    stored: StoredFormat
    unrecognised: tuple[str, ...] = ()
    """A sentence for each thing that config.json names and these facts lack; see
    trainer/base/describe/description.py.
    """

    @property
    def in_4_bits(self) -> bool:
        """Whether the base is published in 4 bits, in a form that can stay as it is."""
        return any(part.kept and part.kept.code.bits == 4 for part in self.architecture.parameters)

    def mismatches(self, config: Config) -> list[str]:
        """One sentence for each setting of `config` that the base cannot meet."""
        return [*architecture_mismatches(config, self.architecture), *self.stored.mismatches(config)]


@dataclass(frozen=True)
class Base:
    """A Hugging Face model with safetensors files.

    `name` says in messages where the base is. `directory` holds config.json and the tokenizer's files, `store` the
    weights. `config` is the parsed config.json, `description` the facts in it. `tokens` says how the run's tokenizer
    differs from the base's. `header_texts` has the headers' bytes and `told_versions` the files' versions if another
    rank has read them.
    """

    name: str
    directory: Path
    store: Store
    config: dict[str, Any]
    description: Description
    tokens: Tokens = field(default_factory=Tokens)
    header_texts: Mapping[str, HeaderText] | None = None
    told_versions: list[tuple[str, int, str]] | None = None

    @property
    def architecture(self) -> Architecture:
        return self.description.architecture

    @property
    def stored(self) -> StoredFormat:
        return self.description.stored

    @cached_property
    def headers(self) -> dict[str, FileHeader]:
        """Name -> header, for each file of weights."""
        return read_headers(self.store, self.header_texts)

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        return {name: tensor for header in self.headers.values() for name, tensor in header.tensors.items()}

    @cached_property
    def weights(self) -> Mapping[str, StoredTensor | PackedTensor]:
        """The weights as the stored format reads them, by their names in a plain base."""
        return self.stored.tensors(self)

    @cached_property
    def versions(self) -> list[tuple[str, int, str]]:
        """Name, size and version (ETag, or time of change) of each file of weights."""
        return file_versions(self.store) if self.told_versions is None else self.told_versions

    @cached_property
    def samples(self) -> dict[str, str]:
        """For each file a value that changes when the weights that trainer/base/weight_samples.py samples change."""
        return sample_weights(self.store, self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """A value that changes with the architecture and with the tensors' names, shapes, types and places.

        It does not depend on the weights' values.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.key} {tensor.dtype} {tensor.shape} {tensor.offset}\n".encode())
        return digest.hexdigest()[:16]


def file_versions(store: Store) -> list[tuple[str, int, str]]:
    """Name, size and version of each file of weights in `store`."""
    entries = (entry for entry in store.list() if entry.key.endswith(".safetensors") and "/" not in entry.key)
    return [(entry.key, entry.size, entry.version) for entry in entries]
