"""The features that a base's tower makes of pictures. All runs over the same base and pictures read them.

They lie beside the bases that are kept in a store:

    bases/features-<hash of the facts>/
        facts.json                      what decides the values: the base's weights, its processor, type and device
        class.json                      the weights of the class that a run over features still computes with
        1f/1f0c....safetensors          the features of the pictures of one document, and their SHA-256
        whole-<data set>.json           written last: all of the data set's pictures are there

An object is called by the hashes and sizes of the document's pictures, in their order, because a class may make
something else of a picture beside another one. Each object is whole or not there, so a pass that was killed keeps what
it wrote.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save

from trainer.data.dataset.manifest import Count, SealedRecord, read_record
from trainer.errors import NOT_JSON, Damaged, NotFound, shown
from trainer.store.json_text import canonical, digest_of
from trainer.store.store import Store, read_twice

Tensors = Mapping[str, torch.Tensor]
_FEATURE = re.compile(r"features/(video\.|audio\.)?[A-Za-z]\w*(/\d{1,6})*", re.ASCII)


class FactsRecord(SealedRecord):
    """Everything that decides the values."""

    format: Literal[1] = 1
    facts: dict[str, Any]


class ClassRecord(SealedRecord):
    """The names of the `weights` of the class that a run over features still computes with."""

    weights: list[str]


class WholeRecord(SealedRecord):
    """The record that the features of a data set are there. It has so many `documents` with pictures."""

    documents: Count


def pictures_key(entries: NDArray[np.void]) -> str:
    """The name of the features of a document with the pictures of these entries (trainer/data/dataset/pictures.py)."""
    named = [[one["sha256"].tobytes().hex(), int(one["height"]), int(one["width"])] for one in entries]
    return digest_of(named)


def features_name(facts: Mapping[str, Any]) -> str:
    """The name of the folder. Different facts give a different one."""
    return digest_of(facts)[:20]


class FeatureFiles:
    """Features that were computed with the same `facts`, in their `folder`."""

    def __init__(self, folder: Store, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self._facts = dict(facts)

    def weights(self, dataset: str) -> frozenset[str] | None:
        """The weights that a run over the data set still needs. None if not all of its features are there."""
        try:
            read_record(WholeRecord, self.folder, f"whole-{dataset}.json")
            return self.weights_so_far()
        except NotFound:
            return None

    def weights_so_far(self) -> frozenset[str]:
        try:
            return frozenset(read_record(ClassRecord, self.folder, "class.json").weights)
        except NotFound:
            return frozenset()

    def keep_weights(self, names: Iterable[str]) -> None:
        """Call it before the features are written that need these weights."""
        if not self.folder.exists("facts.json"):
            self.folder.put("facts.json", FactsRecord(facts=self._facts).sealed())
        self.folder.put("class.json", ClassRecord(weights=sorted(names)).sealed())

    def finish(self, dataset: str, documents: int) -> None:
        self.folder.put(f"whole-{dataset}.json", WholeRecord(documents=documents).sealed())

    def has(self, key: str) -> bool:
        return self.folder.exists(_path(key))

    def write(self, key: str, tensors: Tensors) -> int:
        """Write the features of a document's pictures. Returns their bytes."""
        host = {name: value.cpu().contiguous() for name, value in tensors.items()}
        content = save(host, {"sha256": _digest(key, host)})
        self.folder.put(_path(key), content)
        return len(content)

    def read(self, key: str, inputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Raises `StorageError` if they are not there, or not what was written, or have other names than features and
        some of the `inputs` of the class have."""
        try:
            found = _read(self.folder, key)
            if strange := strange_name(found, inputs):
                raise Damaged(
                    f"{self.folder.uri}/{_path(key)} has {shown(strange)}, which is no feature of a picture and no"
                    " input of the base's class: another program has written it."
                )
            return found
        except (NotFound, Damaged) as error:
            raise Damaged(f"{error} Delete {self.folder.uri}, and the features are computed again.") from error


def strange_name(names: Iterable[str], inputs: Collection[str]) -> str | None:
    """The first of `names` that is neither one of the `inputs` nor a field of features, which may be lists of lists.

    A list has the numbers from 0 on, and nothing is a list and a tensor at once."""
    numbers = dict[str, set[int]]()
    every = sorted(names)
    for name in every:
        if name in inputs:
            continue
        if not _FEATURE.fullmatch(name):
            return name
        around, _, last = name.rpartition("/")
        while last.isdecimal():
            if around in every or last != str(int(last)):
                return name
            numbers.setdefault(around, set()).add(int(last))
            around, _, last = around.rpartition("/")
    gaps = (around for around, found in numbers.items() if found != set(range(len(found))))
    return next(gaps, None)


@read_twice
def _read(folder: Store, key: str) -> dict[str, torch.Tensor]:
    content = folder.get(_path(key))
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        if json.loads(content[8 : 8 + size])["__metadata__"]["sha256"] != _digest(key, tensors):
            raise ValueError("their SHA-256 differs")
        return tensors
    except (*NOT_JSON, SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder.uri}/{_path(key)} has damaged features of pictures: {error}.") from error


def _digest(key: str, tensors: Tensors) -> str:
    found = hashlib.sha256(key.encode())
    for name in sorted(tensors):
        value = tensors[name]
        found.update(canonical([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _path(key: str) -> str:
    return f"{key[:2]}/{key}.safetensors"
