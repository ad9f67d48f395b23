"""Headers of safetensors files are read without their data, and lies are found before a weight is read."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.stored import read_index
from trainer.errors import ConfigError
from trainer.store.safetensors_index import INDEX_FILE, Joined, Stretch, as_bytes, header_bytes, header_of, read_header
from trainer.store.store import open_store

TENSORS = {"a": torch.arange(12, dtype=torch.float32).view(3, 4), "b": torch.arange(6, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_ranges_of_elements_are_what_safetensors_wrote(folder: Path) -> None:
    found = read_index(open_store(str(folder)))
    assert {name: source.shape for name, source in found.items()} == {"a": (3, 4), "b": (6,)}
    assert torch.equal(torch.frombuffer(found["a"].read(5, 9), dtype=torch.float32), TENSORS["a"].view(-1)[5:9])
    assert torch.equal(torch.frombuffer(found["b"].read(0, 6), dtype=torch.bfloat16), TENSORS["b"])
    assert found["a"].read(3, 3) == b""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F64", torch.float64),
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E8M0", torch.float8_e8m0fnu),
        ("I64", torch.int64),
        ("I32", torch.int32),
        ("I16", torch.int16),
        ("I8", torch.int8),
        ("U8", torch.uint8),
        ("BOOL", torch.bool),
    ],
)
def test_each_type_is_read_by_its_elements_and_as_bytes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    content = bytes(tensor.view(torch.uint8).flatten().tolist())
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    source = read_index(open_store(str(tmp_path)))["a"]
    assert (source.dtype, source.shape) == (name, (2, 3))
    assert source.read(1, 3) == content[dtype.itemsize : 3 * dtype.itemsize]
    assert as_bytes(source).shape == (len(content),)
    assert as_bytes(source).read(0, len(content)) == content


def test_stretches_of_several_files_are_read_from_any_element_to_any(tmp_path: Path) -> None:
    """Two of them would be one range of bytes if they were in one store."""
    tensors = [torch.arange(12.0), torch.arange(100.0, 112.0)]
    for name, tensor in zip("xy", tensors, strict=True):
        (tmp_path / name).mkdir()
        save_file({"a": tensor}, tmp_path / name / "model.safetensors")
        save_file({"a": tensor}, tmp_path / f"{name}.safetensors")
    folder = open_store(str(tmp_path))
    size = (tmp_path / "x.safetensors").stat().st_size
    beside = tuple(read_header(folder, f"{name}.safetensors", size)["a"] for name in "xy")
    follow = Joined(beside, (Stretch(0, 0, 4), Stretch(1, 4, 8)), (12,))
    read = torch.frombuffer(follow.read(0, 12), dtype=torch.float32)
    assert torch.equal(read, torch.cat([tensors[0][:4], tensors[1][4:]])), "at places that follow, of two files"
    parts = tuple(read_index(open_store(str(tmp_path / name)))["a"] for name in "xy")
    joined = Joined(parts, (Stretch(0, 2, 4), Stretch(1, 6, 5), Stretch(1, 11, 1), Stretch(0, 0, 3)), (13,))
    whole = torch.cat([tensors[0][2:6], tensors[1][6:12], tensors[0][:3]])
    for begin in range(13):
        for end in range(begin + 1, 14):
            read = torch.frombuffer(joined.read(begin, end), dtype=torch.float32)
            assert torch.equal(read, whole[begin:end]), (begin, end)


def test_an_index_names_the_files_that_count(folder: Path) -> None:
    save_file({"c": torch.zeros(2)}, folder / "extra.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    assert set(read_index(open_store(str(folder)))) == {"a", "b"}


def test_a_single_file_beside_an_index_of_others_is_refused(folder: Path) -> None:
    save_file(TENSORS, folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match="transformers would read the first"):
        read_index(open_store(str(folder)))
    (folder / "model.safetensors").unlink()
    assert read_index(open_store(str(folder))).keys() == TENSORS.keys()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({**TENSORS, "d": torch.ones(1)}, tmp_path / files[0])
    save_file({"b": -TENSORS["b"], "c": TENSORS["a"], "d": torch.zeros(1)}, tmp_path / files[1])
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": files[0], "b": files[0], "c": files[1]}}))
    with pytest.raises(ConfigError, match=f"holds 'b' in two files, {files[0]} and {files[1]}"):
        read_index(open_store(str(tmp_path)))


def test_a_file_that_the_index_names_and_is_not_there_is_named(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(ConfigError, match=r"names model-2\.safetensors, which is not there"):
        read_index(open_store(str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 5}}', "[" * 100_000])
def test_a_damaged_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(ConfigError, match="is not a safetensors index"):
        read_index(open_store(str(folder)))


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file. Convert the model"):
        read_index(open_store(str(tmp_path)))


def test_files_of_names_that_transformers_does_not_know_are_refused_by_the_first(tmp_path: Path) -> None:
    for name in ("weights", "adapter"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"holds adapter\.safetensors, but neither model\.safetensors nor"):
        read_index(open_store(str(tmp_path)))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header and leave the data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "larger shape": (lambda header: header["a"].update(shape=[4, 4]), r"shape \[4, 4\] of F32 does not fill"),
    "other type": (lambda header: header["b"].update(dtype="F32"), r"shape \[6\] of F32 does not fill"),
    "unknown type": (lambda header: header["b"].update(dtype="F4"), "dtype 'F4' is not supported"),
    "beyond the end": (lambda header: header["a"].update(data_offsets=[1000, 1048]), "it ends at byte"),
    "negative": (lambda header: header["a"].update(data_offsets=[-48, 0]), "does not fill bytes -48 to 0"),
    "no offsets": (lambda header: header["a"].pop("data_offsets"), "header cannot be read"),
    "not a whole number": (lambda header: header["a"].update(data_offsets=[0.0, 48.0]), "are no sizes"),
    "shape of text": (lambda header: header["a"].update(shape=["3", 4]), "are no sizes"),
    "negative shape": (lambda header: header["a"].update(shape=[-3, -4]), "are no sizes"),
    "a shape of minus one": (lambda header: header["a"].update(shape=[-1, -1, 12]), "are no sizes"),
    "a shape of true": (lambda header: header["a"].update(shape=[True, 12]), "are no sizes"),
    "type of another kind": (lambda header: header["a"].update(dtype=["F32"]), "header cannot be read"),
    "shared bytes": (
        lambda header: header["b"].update(data_offsets=[36, 48]),
        "'b' begins at byte .*, and not at byte",
    ),
    "a gap": (lambda header: header.pop("a"), "'b' begins at byte .*, and not at byte"),
    "bytes left over": (lambda header: header.pop("b"), "its tensors end at byte .*, the file at"),
    "no tensor": (lambda header: header.update(a=3), "header cannot be read"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_the_file_and_the_reason(folder: Path, lie: str) -> None:
    change, reason = LIES[lie]
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=reason) as error:
        read_index(open_store(str(folder)))
    assert "model.safetensors is damaged" in str(error.value)


@pytest.mark.parametrize("kept", [0, 7, 8, 60, -64, -1])  # the data has 60 bytes
def test_a_truncated_file_is_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"model\.safetensors is (truncated|damaged)"):
        read_index(open_store(str(folder)))


def test_a_header_that_claims_more_than_the_file_is_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    store = open_store(str(folder))
    with pytest.raises(ConfigError, match=f"its header claims {2**60} bytes"):
        read_header(store, "model.safetensors", path.stat().st_size)


def test_a_header_that_is_longer_than_what_is_read_at_once_is_read_whole(tmp_path: Path) -> None:
    header = {"__metadata__": {"notes": "long " * 40_000}, "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    data = header_bytes(header) + b"abc"
    (tmp_path / "model.safetensors").write_bytes(data)
    found = read_header(open_store(str(tmp_path)), "model.safetensors", len(data))
    assert found["a"].read(0, 3) == b"abc"


def test_a_header_that_nests_without_end_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    with pytest.raises(ConfigError, match="its header cannot be read"):
        read_index(open_store(str(folder)))


def test_bytes_that_are_no_json_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    with pytest.raises(ConfigError, match="its header cannot be read"):
        read_index(open_store(str(folder)))


def test_data_begins_at_a_multiple_of_8_whatever_the_header() -> None:
    for name in ("a", "ab", "abc", "abcdefg"):
        assert len(header_of([(name, "F32", (2,))])) % 8 == 0


def test_what_is_written_behind_a_header_is_read_by_it(tmp_path: Path) -> None:
    data = header_of([("a", "I16", (2, 1)), ("b", "U8", (0,)), ("c", "U8", (3,))]) + b"AAaaabc"
    (tmp_path / "model.safetensors").write_bytes(data)
    found = read_header(open_store(str(tmp_path)), "model.safetensors", len(data))
    assert [found[name].read(0, size) for name, size in (("a", 2), ("b", 0), ("c", 3))] == [b"AAaa", b"", b"abc"]


def test_weights_of_another_layout_in_a_folder_below_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    save_file(TENSORS, tmp_path / "original" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file"):
        read_index(open_store(str(tmp_path)))


def test_a_tensor_of_no_elements_stands_where_the_next_one_begins(tmp_path: Path) -> None:
    places = {"whole": (4, [0, 4]), "nothing": (0, [0, 0])}
    header = {name: {"dtype": "U8", "shape": [size], "data_offsets": at} for name, (size, at) in places.items()}
    data = header_bytes(header) + b"abcd"
    (tmp_path / "model.safetensors").write_bytes(data)
    found = read_header(open_store(str(tmp_path)), "model.safetensors", len(data))
    assert (found["nothing"].shape, bytes(found["whole"].read(0, 4))) == ((0,), b"abcd")
