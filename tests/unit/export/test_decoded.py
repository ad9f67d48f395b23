"""The plain files that a base in fewer bits stands for, which are laid out and never written."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load

from trainer.errors import NotFound
from trainer.export.write import decoded
from trainer.store.safetensors_index import INDEX_FILE


@dataclass(frozen=True)
class _Numbers:
    """A weight in 16 bits whose elements count on from `first`."""

    first: int
    shape: tuple[int, ...]
    dtype: str = "BF16"

    def read(self, begin: int, end: int) -> bytearray:
        values = torch.arange(self.first + begin, self.first + end, dtype=torch.bfloat16)
        return bytearray(values.view(torch.uint8).numpy().tobytes())


WEIGHTS = {"a": _Numbers(0, (3, 2)), "b": _Numbers(6, (1, 5)), "c": _Numbers(11, (2,))}


def files(monkeypatch: pytest.MonkeyPatch, most: int) -> Any:
    monkeypatch.setattr(decoded, "_FILE_BYTES", most)
    base: Any = SimpleNamespace(store=SimpleNamespace(uri="/models/b"), weights=dict(reversed(WEIGHTS.items())))
    return decoded._DecodedFiles(base)


def test_any_range_of_a_file_is_that_of_the_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    made = files(monkeypatch, 10**9)
    (entry,) = made.list()
    assert entry.key == "model.safetensors"
    with pytest.raises(NotFound):
        made.get(INDEX_FILE)
    content = bytes(made.get_range(entry.key, 0, entry.size))
    read = load(content)
    assert {name: tensor.flatten().tolist() for name, tensor in read.items()} == {
        "a": [0, 1, 2, 3, 4, 5],
        "b": [6, 7, 8, 9, 10],
        "c": [11, 12],
    }
    header = entry.size - 2 * 13
    for begin in range(header - 3, entry.size):
        for end in range(begin + 1, entry.size + 1):
            assert made.get_range(entry.key, begin, end) == content[begin:end], (begin - header, end - header)


def test_a_large_model_is_in_several_files_with_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    made = files(monkeypatch, 14)  # bytes: the first weight has 12, the others have 10 and 4
    names = [entry.key for entry in made.list()]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert json.loads(made.get(INDEX_FILE)) == {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}}
    sizes = {entry.key: entry.size for entry in made.list()}
    assert [sorted(load(bytes(made.get_range(name, 0, sizes[name])))) for name in names] == [["a"], ["b", "c"]]
    alone = files(monkeypatch, 5)
    assert len(alone.list()) == 3, "a weight that is larger than a file is a file of its own"
