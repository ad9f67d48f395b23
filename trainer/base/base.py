"""A base as other packages see it: its parts, and the protocol of the formats in which its files store them.

The seam of stored formats: a format is one class that says which settings suit it, and gives the weights that the files
hold by name, each as a tensor that can be read in parts. The code that makes parameters of these, quantizes and places
them knows nothing of it. A file of trainer/base/stored, or the `format.py` of a folder there, names its class in
`STORED`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from trainer.base.architecture import Architecture, Parameter, mismatches
from trainer.base.weight_samples import sample_weights
from trainer.config import Config
from trainer.config.model import Tokens
from trainer.model.held.codes import Kept
from trainer.store.safetensors_index import FileHeader, PackedTensor, StoredTensor, TensorSource, read_headers
from trainer.store.store import Store


@dataclass(frozen=True)
class StoredFormat(ABC):
    """How the files of a base store its weights. The defaults hold for most formats. It is made from the
    quantization_config of config.json, or from {} if there is none.
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
        """Whether this quantization_config is of this format. At most one format says so."""

    def mismatches(self, config: Config) -> list[str]:
        """A sentence for each setting that contradicts what config.json says of the format."""
        return []

    def kept(self, parameter: Parameter) -> Kept | None:
        """How the files hold a weight that may stay as stored (`quant.type: stored`), from config.json alone; None for
        other weights. A load asks the tensors themselves.
        """
        return None

    @abstractmethod
    def tensors(self, base: "Base") -> Mapping[str, StoredTensor | PackedTensor]:
        """The weights of the files under the names of a plain base, as they are read: a weight in fewer bits and its
        scales are one tensor. Reads headers and facts beside weights, but no weights. Raises `ConfigError` if a part of
        a weight is missing, or has another shape or type than expected.
        """

    # Most formats have one form, so there is nothing to check.
    def check(self, base: "Base", config: Config) -> None:  # noqa: B027
        """Raises `ConfigError` if the files have another form of the format than `config` asks for. Reads no
        weights.
        """


@dataclass(frozen=True)
class Description:
    """The facts about a base that config.json alone gives."""

    architecture: Architecture
    stored: StoredFormat
    unrecognised: tuple[str, ...] = ()
    """A sentence for each thing that config.json names and these facts lack; see
    trainer/base/describe/unrecognised.py.
    """

    @property
    def in_4_bits(self) -> bool:
        """Whether the base is published in 4 bits, in a form in which it can stay."""
        return any(part.kept and part.kept.code.bits == 4 for part in self.architecture.parameters)

    def mismatches(self, config: Config) -> list[str]:
        """A sentence for each setting of `config` that the base cannot meet."""
        return [*mismatches(config, self.architecture), *self.stored.mismatches(config)]


@dataclass(frozen=True)
class Base:
    """A Hugging Face model with safetensors files.

    `name` is where it is, for messages; `directory` holds config.json and the tokenizer's files, `store` the weights;
    `config` is the parsed config.json, `description` what it says. `tokens` is how the run's tokenizer differs from
    that.
    """

    name: str
    directory: Path
    store: Store
    config: dict[str, Any]
    description: Description
    tokens: Tokens = field(default_factory=Tokens)

    @property
    def architecture(self) -> Architecture:
        return self.description.architecture

    @property
    def stored(self) -> StoredFormat:
        return self.description.stored

    @cached_property
    def headers(self) -> dict[str, FileHeader]:
        """The header of each file of weights."""
        return read_headers(self.store)

    @cached_property
    def tensors(self) -> dict[str, TensorSource]:
        return {name: tensor for header in self.headers.values() for name, tensor in header.tensors.items()}

    @cached_property
    def weights(self) -> Mapping[str, StoredTensor | PackedTensor]:
        """The weights as the stored format reads them, under the names of a plain base."""
        return self.stored.tensors(self)

    @cached_property
    def versions(self) -> list[tuple[str, int, str]]:
        """Name, size and version (ETag, or time of change) of each file of weights."""
        entries = (entry for entry in self.store.list() if entry.key.endswith(".safetensors") and "/" not in entry.key)
        return [(entry.key, entry.size, entry.version) for entry in entries]

    @cached_property
    def samples(self) -> dict[str, str]:
        """A value for each file that changes when the file's weights do, as far as trainer/base/weight_samples.py
        samples them.
        """
        return sample_weights(self.store, self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """A value that changes when the architecture or the tensors' names, shapes, types or places change. It does not
        depend on weights.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.key} {tensor.dtype} {tensor.shape} {tensor.offset}\n".encode())
        return digest.hexdigest()[:16]
