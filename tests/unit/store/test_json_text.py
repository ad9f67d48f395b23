"""Arrays of JSON are read element by element, and what is none is refused with the reason."""

import io
import json
from typing import Any

import pytest

from trainer.errors import DataError
from trainer.store import json_text
from trainer.store.json_text import TwiceNamed, canonical, elements, loads


def read(text: str | bytes, longest: int = 1000) -> list[Any]:
    data = text if isinstance(text, bytes) else text.encode()
    return [element for element, _ in elements(io.BytesIO(data).read, longest)]


@pytest.mark.parametrize("at_once", [7, 11, 2**20])
def test_elements_come_one_by_one_whatever_is_read_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(json_text, "_FIRST_BYTES", at_once)
    rows = [{"a": [1, {"b": "]"}]}, "ä, [", None, [], True]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), f" \n{json.dumps(rows, ensure_ascii=False)}\n "):
        assert read(text) == rows
    assert read(json.dumps(["a" * 10] * 9), longest=20) == ["a" * 10] * 9, "each is short, and not all of them"
    assert read(b"\xef\xbb\xbf[true]") == [True], "as an editor on Windows writes it"
    assert read("[]") == read(" [ ] ") == []
    assert [size for _, size in elements(io.BytesIO(b'[{}, "abc"]').read, 9)] == [2, 5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}', "it does not begin with an array of JSON"),
        ("", "it does not begin with an array of JSON"),
        ("[1 2]", "two elements have no comma between them"),
        ("[1, 2", "Expecting"),
        ("[1,, 2]", "Expecting value"),
        ("[1] 2", "something follows the array"),
        ("[1]]", "something follows the array"),
        (b"[1]\xc3", "unexpected end of data"),  # the first of two bytes of a letter
        (f'["{"x" * 40}"]', "an element has more than 20 characters"),
    ],
)
def test_what_is_no_array_is_refused(monkeypatch: pytest.MonkeyPatch, text: str | bytes, reason: str) -> None:
    monkeypatch.setattr(json_text, "_FIRST_BYTES", 30)
    with pytest.raises(ValueError, match=reason):
        read(text, longest=20)


def test_an_object_with_a_key_twice_is_named_and_the_others_are_read() -> None:
    first, second, third = read('[{"a": 1, "a": 2}, {"a": {"b": 1, "b": 1}}, {"a": 1}]')
    assert isinstance(first, DataError)
    assert "has the key 'a' twice" in str(first)
    assert "has the key 'b' twice" in str(second)
    assert third == {"a": 1}
    (nameless,) = read('[{"": 1, "": 2}]')
    assert "has the key '' twice" in str(nameless)
    with pytest.raises(TwiceNamed, match="'b' twice"):
        loads('{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(TwiceNamed, match="'a' twice"):
        loads('[{"a": 1, "a": 2}, {"b": 1, "b": 2}]')
    with pytest.raises(TwiceNamed, match="'' twice"):
        loads('{"": 1, "": 2}')
    assert loads(b'{"a": 1}') == {"a": 1}


def test_the_canonical_text_of_a_tree_does_not_depend_on_the_order_of_its_keys() -> None:
    assert canonical({"b": [1, 2], "a": {"d": 1, "c": 2}}) == '{"a":{"c":2,"d":1},"b":[1,2]}'
