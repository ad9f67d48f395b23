"""Any damage to a base's files: it is planned and checked, or refused in one sentence, before a weight is read."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.material import Workshop
from trainer.base.find.check import check_base
from trainer.base.find.locate import describe_base, resolve_base
from trainer.config import Config
from trainer.errors import CapstanError
from trainer.plan.plan import make_plan

FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "model-00001-of-*")
odd = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1,
        3,
        10**9,
        10**30,
        1.5,
        float("nan"),
        "",
        "x",
        "llama",
        "gpt_oss",
        [],
        [1],
        ["x"],
        {},
        {"a": 1},
    ]
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(workshop: Workshop) -> Iterator[Path]:
    """The base itself, whose files are as they were once the test is done."""
    contents = {path: path.read_bytes() for path in workshop.base.iterdir()}
    yield workshop.base
    restore(contents)


def restore(contents: dict[Path, bytes]) -> None:
    for path, content in contents.items():
        path.write_bytes(content)


def answered(config: Config) -> None:
    """Ask of a base what every verb asks without reading its weights. A refusal must be short and of exit code 2."""
    for ask in (
        lambda: make_plan(config, describe_base(config.model), 2, 2, None),
        lambda: check_base(resolve_base(config.model), config),
    ):
        refusal = None
        try:
            ask()
        except CapstanError as error:
            refusal = error
        if refusal is not None:
            assert refusal.exit_code == 2, refusal
            assert all(len(sentence) < 1000 for sentence in str(refusal).splitlines())


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a tree of JSON, those of sections and lists too; of long ones the first few."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in list(inside)[:40] for place in leaves(value, (*path, key)))]


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


@FUZZ
@given(st.data())
def test_any_bytes_in_any_file(workshop: Workshop, base: Path, data: st.DataObject) -> None:
    path = next(base.glob(data.draw(st.sampled_from(FILES))))
    content = path.read_bytes()
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    path.write_bytes(content[:begin] + data.draw(st.binary(max_size=8)) + content[end:])
    answered(workshop.config("fuzz"))
    path.write_bytes(content)


@FUZZ
@given(st.data())
def test_any_value_in_any_place_of_its_json(workshop: Workshop, base: Path, data: st.DataObject) -> None:
    path = next(base.glob(data.draw(st.sampled_from(FILES[:4]))))
    content = path.read_bytes()
    tree = json.loads(content)
    for _ in range(data.draw(st.integers(1, 2))):
        tree = replaced(tree, data.draw(st.sampled_from(leaves(tree))), data.draw(odd))
    path.write_text(json.dumps(tree))
    answered(workshop.config("fuzz"))
    path.write_bytes(content)


@FUZZ
@given(st.data())
def test_any_value_in_any_place_of_a_header(workshop: Workshop, base: Path, data: st.DataObject) -> None:
    path = next(base.glob(FILES[-1]))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header = replaced(header, data.draw(st.sampled_from(leaves(header))), data.draw(odd))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    answered(workshop.config("fuzz"))
    path.write_bytes(content)
