"""The stored log-probabilities of a reference: what is read is what was written, of the same facts, or it is damage."""

from typing import Any

import numpy as np
import pytest

from trainer.errors import Damaged, NotFound
from trainer.store.store import Store, open_store
from trainer.train.reference import References, read_references, references_key, write_references

FACTS = {"dataset": "d", "base": "b", "layers": None}
VALUES = -np.arange(14, dtype=np.float32).reshape(7, 2)


@pytest.fixture
def folder(tmp_path: Any) -> Store:
    return open_store(str(tmp_path))


@pytest.mark.parametrize("progress", [None, {"position": {"bin": 3}}])
def test_values_and_progress_are_read_as_they_were_written(folder: Store, progress: Any) -> None:
    values = VALUES.copy()
    if progress:
        values[4:] = np.nan
    write_references(folder, FACTS, References(values, progress))
    found = read_references(folder, FACTS, 7)
    assert found.progress == progress
    assert found.log_p.dtype == np.float32
    np.testing.assert_array_equal(found.log_p, values)


def test_other_facts_have_another_key(folder: Store) -> None:
    write_references(folder, FACTS, References(VALUES))
    with pytest.raises(NotFound):
        read_references(folder, FACTS | {"layers": 2}, 7)


def test_whatever_byte_changes_is_noticed(folder: Store) -> None:
    write_references(folder, FACTS, References(VALUES))
    (entry,) = folder.list()
    content = folder.get(entry.key)
    for place in range(len(content)):
        broken = bytearray(content)
        broken[place] ^= 1
        folder.put(entry.key, bytes(broken))
        with pytest.raises(Damaged, match=f"{entry.key} is damaged: "):
            read_references(folder, FACTS, 7)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_part_of_it_is_damage(folder: Store, cut: int) -> None:
    write_references(folder, FACTS, References(VALUES))
    key = references_key(FACTS)
    folder.put(key, folder.get(key)[:cut])
    with pytest.raises(Damaged):
        read_references(folder, FACTS, 7)


def test_another_data_sets_values_at_its_place_are_damage(folder: Store) -> None:
    other = FACTS | {"dataset": "e"}
    write_references(folder, other, References(VALUES))
    folder.put(references_key(FACTS), folder.get(references_key(other)))
    with pytest.raises(Damaged, match="it was computed from something else"):
        read_references(folder, FACTS, 7)
    with pytest.raises(Damaged, match="shape .7, 2. for 8 documents"):
        read_references(folder, other, 8)
