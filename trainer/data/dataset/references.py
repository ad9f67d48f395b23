"""The reference's log-probabilities of a data set's answers: one object beside the data, which any run may read.

    data/<fingerprint>/reference-<hash of the facts>.safetensors

Its tensor `log_p` is (documents, answers) F32, in nats, with NaN for an answer that is not computed yet. The metadata
are JSON: the `facts` that decide the values, `progress`, which is null once all values are there, and a `sha256` of the
three.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from trainer.errors import NOT_JSON, Damaged
from trainer.store.canonical_json import canonical, digest_of
from trainer.store.store import Store, read_twice

_TENSOR = "log_p"


@dataclass(frozen=True, eq=False)
class References:
    """`log_p` (documents, answers) fp32; `progress` is where the computation goes on, or None."""

    log_p: NDArray[np.float32]
    progress: Mapping[str, Any] | None = None


def references_key(facts: Mapping[str, Any]) -> str:
    """The key in the folder of the data set. Different facts give a different object."""
    return f"reference-{digest_of(facts)[:20]}.safetensors"


def write_references(folder: Store, facts: Mapping[str, Any], references: References) -> None:
    """Write or replace them; they become visible whole or not at all."""
    texts = {"facts": canonical(facts), "progress": canonical(references.progress)}
    values = np.ascontiguousarray(references.log_p, np.float32)
    folder.put(references_key(facts), save({_TENSOR: values}, {**texts, "sha256": _digest(texts, values)}))


@read_twice
def read_references(folder: Store, facts: Mapping[str, Any], documents: int) -> References:
    """Read the references that were written with the same facts.

    Raises:
        NotFound: there are none.
        Damaged: they are not what was written, or have another number of documents.
    """
    key = references_key(facts)
    data = folder.get(key)
    try:
        values = load(data)[_TENSOR]
        size = int.from_bytes(data[:8], "little")
        texts: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
        digest = texts.pop("sha256")
        if digest != _digest(texts, values):
            raise ValueError("its content does not match its sha256")
        if texts["facts"] != canonical(facts):
            raise ValueError("it was computed from something else")
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != documents:
            raise ValueError(f"it has {values.dtype} values of shape {values.shape} for {documents} documents")
        return References(values, json.loads(texts["progress"]))
    except (*NOT_JSON, SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder.uri}/{key} is damaged: {error}.") from error


def _digest(texts: Mapping[str, str], values: NDArray[np.float32]) -> str:
    return hashlib.sha256(canonical([texts["facts"], texts["progress"]]).encode() + values.tobytes()).hexdigest()
