"""A file of a merge whose embedding has rows for new tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from trainer.base.rows.parameters import FoundWeights
from trainer.errors import ConfigError
from trainer.export.write import merged
from trainer.export.write.as_stored import CodesMoved, OfPart, _is_of_rows, changes_in_codes
from trainer.export.write.merged import (
    Change,
    _changed_file,
    changes_of_values,
    files_with,
    merged_config,
    put_index,
    write_files,
)
from trainer.model.held import dither
from trainer.store.safetensors_index import Joined, Stretch, TensorSource, read_header
from trainer.store.store import open_store


class _Adds:
    """Adds the number of each row to its values."""

    shape = (5, 2)

    def apply_to(self, rows: Tensor, first: int) -> None:
        values = rows.view(-1, 2)
        values.add_(torch.arange(first, first + len(values))[:, None])


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "in another order"])
def test_only_the_embedding_gets_rows_and_what_follows_it_moves(tmp_path: Path, order: int) -> None:
    """In whatever order the header names the tensors."""
    tensors = {"beside": torch.zeros(0, 2), "embedding": torch.full((3, 2), 10.0), "norm": torch.tensor([7.0, 8.0])}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    stored = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(stored[:8], "little")
    header = dict([*json.loads(stored[8 : 8 + length]).items()][::order])
    again = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (tmp_path / "model.safetensors").write_bytes(stored[:8] + again + stored[8 + length :])
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


@pytest.mark.parametrize("whole", [{"vocab_size": 3, "other": 1}, {"text_config": {"vocab_size": 3}, "other": 1}])
def test_the_settings_count_the_new_rows_where_the_language_model_has_its_own(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(whole))
    base: Any = SimpleNamespace(directory=tmp_path, architecture=SimpleNamespace(vocabulary=3))

    def settings(more: int) -> bytes:
        file: Any = SimpleNamespace(changes=[SimpleNamespace(more=more), SimpleNamespace(more=0)])
        return merged_config(base, [file])

    assert settings(0) == (tmp_path / "config.json").read_bytes()
    grown = json.loads(settings(2))
    assert grown.get("text_config", grown)["vocab_size"] == 5
    assert grown["other"] == 1


def test_several_files_have_an_index_with_the_bytes_of_their_tensors(tmp_path: Path) -> None:
    destination = open_store(str(tmp_path))
    put_index(destination, {"a": "model.safetensors"}, 10)
    assert list(tmp_path.iterdir()) == []
    alone = open_store(str(tmp_path / "alone"))
    put_index(alone, {"a": "model-00001-of-00001.safetensors"}, 10)
    assert alone.exists("model.safetensors.index.json"), "transformers finds a file of this name by the index alone"
    put_index(destination, {"b": "model-2.safetensors", "a": "model-1.safetensors"}, 10)
    assert json.loads(destination.get("model.safetensors.index.json")) == {
        "metadata": {"total_size": 10},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    }


def test_the_bytes_of_all_tensors_are_with_those_of_new_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(3, 2)}, tmp_path / "model-1.safetensors")
    store, key, config = open_store(str(tmp_path)), "model-1.safetensors", None
    base: Any = SimpleNamespace(tensors=read_header(store, key, store.head(key).size))

    def chunks(report: Any) -> Any:
        yield bytearray(3)
        report(3)

    files: Any = [SimpleNamespace(key=f"{name}.bin", size=3, more_bytes=8, chunks=chunks) for name in "ab"]
    monkeypatch.setattr(merged, "complete_model", lambda *_: None)
    monkeypatch.setattr(merged, "merged_config", lambda *_: None)
    destination, told = open_store(str(tmp_path / "made")), list[tuple[int, int]]()
    write_files(base, config, files, destination, lambda *given: told.append(given))  # type: ignore[arg-type]
    assert json.loads(destination.get("model.safetensors.index.json"))["metadata"] == {"total_size": 3 * 2 * 4 + 16}
    assert told == [(3, 6), (6, 6)]


def test_each_copy_of_a_tied_weight_in_the_files_is_changed(tmp_path: Path) -> None:
    save_file({"head": torch.zeros(5, 2), "embedding": torch.zeros(5, 2)}, tmp_path / "model.safetensors")
    store, key = open_store(str(tmp_path)), "model.safetensors"
    found = read_header(store, key, store.head(key).size)
    base: Any = SimpleNamespace(
        architecture=SimpleNamespace(parameters=()),
        tensors=found,
        store=store,
        versions=[(key, store.head(key).size, "")],
    )
    (file,) = files_with(base, FoundWeights({"w": found["embedding"]}, {"w": [found["head"]]}, []), {"w": _Adds()})
    added = [[float(row)] * 2 for row in range(5)]
    assert {name: values.tolist() for name, values in load(b"".join(file.chunks())).items()} == {
        "embedding": added,
        "head": added,
    }


def test_a_weight_that_the_files_hold_in_parts_is_changed_part_by_part(tmp_path: Path) -> None:
    save_file({"gate": torch.zeros(2, 2), "both": torch.zeros(4, 2)}, tmp_path / "model.safetensors")
    store, key = open_store(str(tmp_path)), "model.safetensors"
    found = read_header(store, key, store.head(key).size)
    joined = Joined((found["both"], found["gate"]), (Stretch(0, 4, 4), Stretch(1, 0, 4)), (4, 2))
    base: Any = SimpleNamespace(name="b")
    changes = list(changes_of_values(base, "w", joined, _Adds(), 0))
    assert [(change.source, change.first, change.numel, change.begin) for change in changes] == [
        (found["both"], 4, 4, 0),
        (found["gate"], 0, 4, 4),
    ]
    size = store.head(key).size
    written = load(b"".join(_changed_file(SimpleNamespace(store=store), key, size, changes).chunks()))  # type: ignore[arg-type]
    assert written["both"].tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]], "the first rows of the weight, behind others"
    assert written["gate"].tolist() == [[2, 2], [3, 3]]
    (whole,) = changes_of_values(base, "w", found["both"], _Adds(), 2)
    assert (whole.first, whole.numel, whole.begin, whole.more, whole.more_bytes) == (0, 8, 0, 2, 16)
    for source, more in ((joined, 2), (object(), 0)):
        with pytest.raises(ConfigError, match="b stores w in another layout than the model has it in"):
            list(changes_of_values(base, "w", source, _Adds(), more))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Codes:
    """Codes of a byte each, which move by the change of their weight."""

    codes: TensorSource
    by_columns = False
    dtype = "F32"
    unit = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read(self, begin: int, end: int) -> bytearray:
        return bytearray(4 * (end - begin))

    def move(self, units: Tensor, first: int, change: Any) -> int:
        units.add_(change.of_rows(first, len(units), lambda: torch.zeros(len(units), 2)).to(torch.uint8))
        return units.numel()


@pytest.mark.parametrize(
    ("begin", "numel", "columns", "by_columns", "fits"),
    [
        *((8, 16, 8, False, True), (4, 16, 8, False, False), (8, 12, 8, False, False), (0, 32, 4, False, False)),
        *((0, 32, 8, True, True), (0, 24, 8, True, False), (8, 24, 8, True, False)),
    ],
)
def test_codes_are_changed_in_whole_rows_or_whole_parts(
    begin: int, numel: int, columns: int, by_columns: bool, fits: bool
) -> None:
    part: Any = SimpleNamespace(shape=(4, 8), by_columns=by_columns)
    assert _is_of_rows(part, Stretch(0, begin, numel), columns) is fits


def test_codes_of_a_weight_that_the_files_hold_in_parts_move_by_the_change_of_their_own_rows(tmp_path: Path) -> None:
    parts = {"both": torch.zeros(5, 2, dtype=torch.uint8), "gate": torch.zeros(2, 2, dtype=torch.uint8)}
    save_file(parts, tmp_path / "model.safetensors")
    store, key = open_store(str(tmp_path)), "model.safetensors"
    size = store.head(key).size
    found = {name: _Codes(source) for name, source in read_header(store, key, size).items()}
    joined = Joined((found["gate"], found["both"]), (Stretch(0, 0, 4), Stretch(1, 2, 6)), (5, 2))
    base: Any = SimpleNamespace(name="b", store=store)
    changes = list(changes_in_codes("nearest")(base, "w", joined, _Adds(), 0))
    written = load(b"".join(_changed_file(base, key, size, changes).chunks()))
    assert written["gate"].tolist() == [[0, 0], [1, 1]], "the first rows of the weight"
    assert written["both"].tolist() == [[0, 0], [2, 2], [3, 3], [4, 4], [0, 0]], "its others, between rows of no one's"


def test_a_weight_of_which_the_files_hold_a_part_in_codes_is_changed_in_both(tmp_path: Path) -> None:
    save_file(
        {"plain": torch.full((3, 2), 0.5), "codes": torch.zeros(2, 2, dtype=torch.uint8)}, tmp_path / "a.safetensors"
    )
    store, key = open_store(str(tmp_path)), "a.safetensors"
    size = store.head(key).size
    found = read_header(store, key, size)
    joined = Joined((found["plain"], _Codes(found["codes"])), (Stretch(0, 0, 6), Stretch(1, 0, 4)), (5, 2))
    base: Any = SimpleNamespace(name="b", store=store)
    changes = list(changes_in_codes("nearest")(base, "w", joined, _Adds(), 0))
    written = load(b"".join(_changed_file(base, key, size, changes).chunks()))
    assert written["plain"].tolist() == [[0.5, 0.5], [1.5, 1.5], [2.5, 2.5]]
    assert written["codes"].tolist() == [[3, 3], [4, 4]]
    with pytest.raises(ConfigError, match="w in codes that cannot be changed: it has 2 more rows"):
        list(changes_in_codes("nearest")(base, "w", joined, _Adds(), 2))


class _ByColumns(_Codes):
    by_columns = True


@pytest.mark.parametrize(
    ("rounding", "said"),
    [
        ("gptq", "rounding: gptq rounds the columns .* and b stores the transpose of w. Leave rounding out"),
        ("dither", "b stores w in codes .* its transpose, in which this method cannot change a single row"),
    ],
)
def test_a_transpose_in_codes_has_no_columns_that_follow_each_other_and_no_rows(
    tmp_path: Path, rounding: Any, said: str
) -> None:
    save_file({"codes": torch.zeros(5, 2, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    store, key = open_store(str(tmp_path)), "a.safetensors"
    source = _ByColumns(read_header(store, key, store.head(key).size)["codes"])
    base: Any = SimpleNamespace(name="b", store=store)
    with pytest.raises(ConfigError, match=said):
        list(changes_in_codes(rounding)(base, "w", source, _Adds(), 0))


def test_the_codes_that_moved_are_counted_over_all_pieces() -> None:
    moved = CodesMoved()
    assert moved.sentence() == "0 of 0 codes (0.00%) are others than the base's."
    for codes, differing in ((3000, 50), (1000, 30)):
        moved.add(codes, differing)
    assert moved.facts("dither") == {"rounding": "dither", "codes": 4000, "codes_changed": 80}
    assert moved.sentence() == "80 of 4,000 codes (2.00%) are others than the base's."


def test_a_stored_part_moves_by_its_own_rows_of_the_change_and_by_the_places_of_the_whole_weight() -> None:
    class Product(_Adds):
        def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
            return (10.0 * torch.arange(first, first + rows)[:, None] + torch.arange(4))[:, columns]

    added = OfPart("w", 5, (2, 3, 4), Product(), "dither")
    nothing: Any = None
    assert added.of_rows(1, 2, nothing).tolist() == [[60, 61, 62, 63], [70, 71, 72, 73]]
    assert added.of_columns(1, 1, 3).tolist() == [[81, 91, 101], [82, 92, 102]], "of the second matrix"
    changed = OfPart("w", 1, (2, 2), _Adds(), "nearest")
    values = torch.full((2, 2), 0.5)
    assert changed.of_rows(1, 2, lambda: values).tolist() == [[2, 2], [3, 3]]
    assert values.tolist() == [[0.5, 0.5]] * 2
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3])
    expected = dither.thresholds("w", torch.tensor([5, 7]), columns)
    for rounding in ("dither", "gptq"):
        found = OfPart("w", 5, (2, 3, 4), Product(), rounding).thresholds(rows, columns)  # type: ignore[arg-type]
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    assert changed.thresholds(rows, columns) is None
