"""What an export may find where it writes, and what it leaves there."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.export.destination import (
    CARD,
    TRAINED,
    DestinationTaken,
    check_destination,
    holds_export,
    nothing_left_by_a_refusal,
)
from trainer.export.proof import verify
from trainer.export.proof.verify import ComparedStore
from trainer.store.store import Store, open_store


@pytest.fixture
def destination(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "export"))


def put(store: Store, *names: str, card: str = TRAINED) -> None:
    for name in names:
        store.put(name, card.encode() if name == CARD else b"x")


@pytest.mark.parametrize(
    ("there", "card", "taken"),
    [
        ((), "", False),
        ((CARD,), f"A model {TRAINED}.", False),
        ((CARD, "tokenizer.json"), f"A model {TRAINED}.", False),
        ((CARD, "model.bin"), f"A model {TRAINED}.", True),
        ((CARD, "tokenizer.json"), "my notes", True),
        (("tokenizer.json",), "", True),
    ],
)
def test_an_export_overwrites_nothing_but_the_half_of_a_killed_one(
    there: tuple[str, ...], card: str, taken: bool, destination: Store
) -> None:
    put(destination, *there, card=card)
    assert holds_export(destination, "tokenizer*") is ("model.bin" in there)
    refused = pytest.raises(DestinationTaken, match="is not empty. Name a new folder") if taken else nullcontext()
    with refused:
        check_destination(destination, "tokenizer*")


@pytest.mark.parametrize(
    ("before", "error", "left"),
    [
        ((), ConfigError("refused"), set()),
        ((CARD,), ConfigError("refused"), {CARD, "config.json", "a/b.json"}),
        ((), StorageError("away"), {"config.json", "a/b.json"}),
    ],
)
def test_a_refusal_leaves_an_empty_destination_empty_and_a_store_that_fails_leaves_a_half(
    before: tuple[str, ...], error: Exception, left: set[str], destination: Store, tmp_path: Path
) -> None:
    put(destination, *before)

    def export() -> None:
        with nothing_left_by_a_refusal(destination):
            put(destination, "config.json", "a/b.json")
            (tmp_path / "export/model.safetensors#1").write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        export()
    assert {entry.key for entry in destination.list()} == left
    assert len(destination.half_written()) == bool(left)


def test_what_a_killed_export_has_half_written_goes_with_the_next_one(destination: Store, tmp_path: Path) -> None:
    put(destination, CARD)
    half = tmp_path / "export/model-00001.safetensors#1"
    half.write_bytes(b"half")
    with nothing_left_by_a_refusal(destination):
        (tmp_path / "export/other.safetensors#1").write_bytes(b"somebody writes it now")
        put(destination, "config.json")
    assert [entry.key for entry in destination.half_written()] == ["other.safetensors#1"]
    assert destination.exists("config.json")


def test_an_export_that_is_there_is_compared_to_the_last_byte(
    destination: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PART_BYTES", 4)
    destination.put("a.bin", b"0123456789")
    put(destination, CARD, "config.json")
    compared = ComparedStore(destination)
    assert compared.list() == [], "it looks empty to a format that writes"
    compared.put(CARD, b"with the evaluations that there are by now")
    compared.put_chunks("a.bin", [b"012", b"3456789"], 10)
    with pytest.raises(CapstanError, match=r"/config.json is no part of the export\. It is not what was trained"):
        compared.check_nothing_else()
    compared.create("config.json", b"x")
    compared.check_nothing_else()
    for given, said in (
        ([b"01234567"], "has 10 bytes instead of 8"),
        ([b"0123456789", b"a"], "has 10 bytes instead of 11"),
        ([b"012345x789"], "differs from what was trained between bytes 4 and 8"),
        ([b"012", b"3456x89"], "differs from what was trained between bytes 7 and 10"),
    ):
        with pytest.raises(CapstanError, match=f"/a.bin {said}"):
            compared.put_chunks("a.bin", given, sum(map(len, given)))
    with pytest.raises(CapstanError, match="/b.bin is missing"):
        compared.put("b.bin", b"")
    assert destination.get("a.bin") == b"0123456789"


def test_only_a_folder_of_a_disk_is_local(destination: Store, tmp_path: Path) -> None:
    assert destination.local_folder == tmp_path / "export"
    assert Store("memory://x", None).local_folder is None
