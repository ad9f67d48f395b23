"""YAML becomes plain values, or one sentence with its line: never a traceback, a hang, or a value that nobody wrote."""

import time

import pytest

from trainer.config import reading
from trainer.config.reading import read_yaml
from trainer.errors import ConfigError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 2024-99-99", {"a": "2024-99-99"}),
        ("a: 2024-01-01", {"a": "2024-01-01"}),
        ("a: [1, 1.5, true, null, 'x', {b: []}]", {"a": [1, 1.5, True, None, "x", {"b": []}]}),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 3, "b": 2}}),
        ("x: {y: &y {<<: {a: 1}, a: 2}}\nz: {<<: *y}", {"x": {"y": {"a": 2}}, "z": {"a": 2}}),
        ("a: =", {"a": "="}),
        ("[010, -017, 0o10, 1:30, 1:30.5, 24:00:00]", ["010", "-017", "0o10", "1:30", "1:30.5", "24:00:00"]),
        (
            "[0, -1, +2, 0x10, 0b11, 1_000, 1., .5, -1.5e+3, 0.25, -.inf]",
            [0, -1, 2, 16, 3, 1000, 1.0, 0.5, -1500.0, 0.25, -float("inf")],
        ),
        ("[-9223372036854775808, 9223372036854775807]", [-(2**63), 2**63 - 1]),
        ("1e-4", "1e-4"),
        ('a: "\\U0001F600"', {"a": "\U0001f600"}),
    ],
)
def test_plain_values_are_read_as_they_are_written(text: str, value: object):
    assert read_yaml(text, "run.yaml") == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 0b_", "run.yaml, line 2, column 4 is not YAML: '0b_' cannot be read as a whole number of 64 bits."),
        ("a: !!int abc", "run.yaml, line 1, column 4 is not YAML: 'abc' cannot be read as a whole number of 64 bits."),
        ("a: !!bool maybe", "run.yaml, line 1, column 4 is not YAML: 'maybe' cannot be read as true or false."),
        ("a: 9223372036854775808", "'9223372036854775808' cannot be read as a whole number of 64 bits."),
        ("a: -9223372036854775809", "'-9223372036854775809' cannot be read as a whole number of 64 bits."),
        ("a: 0x" + "f" * 5000, "cannot be read as a whole number of 64 bits."),
        ("a: " + "9" * 5000, "cannot be read as a whole number of 64 bits."),
        ("a: !!timestamp 2024-01-01", "the tag 'tag:yaml.org,2002:timestamp' is not known here."),
        ("a: !!python/object:os.system x", "the tag 'tag:yaml.org,2002:python/object:os.system' is not known here."),
        ("a: 1\nb: 2\na: 3", "run.yaml, line 3, column 1 is not YAML: 'a' is given twice, first in line 1."),
        ("[{a: {b: 1, 'b': 2}}]", "run.yaml, line 1, column 13 is not YAML: 'b' is given twice, first in line 1."),
        ("? [a]\n: b", "a key is a list or a mapping, not a name."),
        ("!!map [1]", "expected a mapping node, but found sequence."),
        ("a: " + "[" * 100_000, "it nests more than 32 levels deep."),
        ("{a: " * 100_000, "it nests more than 32 levels deep."),
        ("\n".join(f"{'  ' * depth}a:" for depth in range(300)), "it nests more than 32 levels deep."),
        (LAUGHS, "aliases make it too large."),
        ("a: &a {<<: *a}", "what is merged with << is no other mapping."),
        ("a: &a {<<: [{b: 1}, c]}", "what is merged with << is no other mapping."),
        ("<<: {a: 1}\n<<: {b: 1}", "'<<' is given twice, first in line 1."),
        (
            f"- &a {{{', '.join(f'k{n}: 0' for n in range(1000))}}}\n" + "- {<<: *a}\n" * 200,
            "merges make it too large.",
        ),
        ("[" + "1," * 260_000 + "]", "it has more than 20000 keys and values."),
        ("".join(f"k{n}: 0\n" for n in range(50_000)), "it has more than 20000 keys and values."),
        ("- &a 1\n" + "- *a\n" * 100_000, "it has more than 20000 keys and values."),
        ("a: &a [*a]", "an alias refers to what it is part of."),
        ('a: "\\ud800"', "cannot be read as text."),
        ('a: "b\\0"', "cannot be read as text."),
        ("a: \0", "special characters are not allowed"),
        (b"a: \xff", "run.yaml is not text in UTF-8 (byte 3). Save it as UTF-8."),
        ("a: " + "x" * 2**20, "run.yaml is no configuration: it has 1048579 bytes. Allowed are 524288."),
    ],
)
def test_what_would_surprise_is_refused_in_one_sentence(text: str | bytes, sentence: str):
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "run.yaml")
    assert time.process_time() - began < 5
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_merges_may_have_as_many_values_as_a_file_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "- &a {b: 1, c: 2}\n- {<<: *a}\n- {<<: *a}\n"
    for most, sentence in ((4, "aliases make it too large"), (3, "merges make it too large")):
        monkeypatch.setattr(reading, "_MAX_VALUES", most)
        with pytest.raises(ConfigError, match=sentence):
            read_yaml(text, "run.yaml")
