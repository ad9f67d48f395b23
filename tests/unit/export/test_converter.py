"""llama.cpp's converter: what it says becomes a sentence, and its files arrive whole where there is room."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.errors import CapstanError, ConfigError, StorageError
from trainer.export.gguf import converter
from trainer.export.gguf.converter import check_room, convert, deliver
from trainer.store.store import PART_BYTES, open_store


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        ("BPE pre-tokenizer was not recognized - update", ConfigError, converter.UNKNOWN_TOKENIZER),
        ("ERROR: Model XForCausalLM is not supported", ConfigError, converter.UNKNOWN_ARCHITECTURE),
        ("ERROR: X not supported!", ConfigError, converter.UNKNOWN_ARCHITECTURE),
        ("Traceback\nValueError: no room", CapstanError, "llama.cpp's converter failed: ValueError: no room"),
    ],
)
def test_an_error_of_the_converter_is_one_sentence(
    said: str, kind: type[CapstanError], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[str]]()

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(returncode=int(len(asked) > 1), stderr=f"{said}\n")

    monkeypatch.setattr(converter.children, "run", run)
    convert(tmp_path, "bf16", tmp_path / "made.gguf", "one")
    command = " ".join(asked[0])
    assert command.endswith(f"--outfile {tmp_path}/made.gguf --outtype bf16 --model-name one")
    with pytest.raises(kind) as found:
        convert(tmp_path, "bf16", tmp_path / "made.gguf", "one")
    assert type(found.value) is kind
    assert str(found.value).startswith(sentence)


@pytest.mark.parametrize("own", [False, True])
def test_a_file_arrives_whole_and_only_at_its_name(own: bool, tmp_path: Path) -> None:
    destination = open_store(str(tmp_path / "export"))
    folder = tmp_path / ("export" if own else "elsewhere")
    folder.mkdir(exist_ok=True)
    content = bytes(range(256)) * (PART_BYTES // 256) + b"end"
    (folder / "half").write_bytes(content)
    deliver(folder / "half", destination, "model.gguf")
    assert destination.get("model.gguf") == content
    assert not (folder / "half").exists()


def test_folders_of_one_disk_need_room_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    check_room([(tmp_path / "new" / "below", 60), (tmp_path, 40)])
    with pytest.raises(StorageError, match=r"has 0\.0 GB free, and this export needs 0\.0 GB there"):
        check_room([(tmp_path / "new" / "below", 61), (tmp_path, 40)])
