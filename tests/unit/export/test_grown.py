"""A file of a merge whose embedding has rows for new tokens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from trainer.export.write.merged import Change, _changed_file
from trainer.store.safetensors_index import read_header
from trainer.store.store import open_store


class _Adds:
    """Adds the number of each row to its values."""

    shape = (5, 2)

    def apply_to(self, rows: Tensor, first: int) -> None:
        values = rows.view(-1, 2)
        values.add_(torch.arange(first, first + len(values))[:, None])


def test_only_the_embedding_gets_rows_and_what_follows_it_moves(tmp_path: Path) -> None:
    tensors = {"beside": torch.zeros(0, 2), "embedding": torch.full((3, 2), 10.0), "norm": torch.tensor([7.0, 8.0])}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    store, key = open_store(str(tmp_path)), "model.safetensors"
    size = store.head(key).size
    found = read_header(store, key, size)
    assert found["beside"].offset == found["embedding"].offset  # so a place alone does not tell which one grows
    change = Change(found["embedding"], 0, 6, _Adds(), 0, more=2)
    base: Any = SimpleNamespace(store=store)
    file = _changed_file(base, key, size, [change])
    content = b"".join(file.chunks())
    written = load(content)
    assert len(content) == file.size
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        "beside": (0, 2),
        "embedding": (5, 2),
        "norm": (2,),
    }
    assert written["embedding"].tolist() == [[10.0, 10.0], [11.0, 11.0], [12.0, 12.0], [3.0, 3.0], [4.0, 4.0]]
    assert written["norm"].tolist() == [7.0, 8.0]
