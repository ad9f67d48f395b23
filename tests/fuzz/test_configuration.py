"""Any text as a configuration, and any override: a valid configuration that can be written down, or one sentence."""

from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import Config, dump_config, fields, parse_config
from trainer.errors import ConfigError

TREE = {
    "run": {"name": "demo"},
    "model": {"base": "/models/tiny"},
    "data": {"train": [{"path": "data/*.jsonl"}]},
    "train": {"steps": 10},
}
NAMES = (
    [name for name, _ in fields()] + list(Config.model_fields) + ["data.train[0].weight", "<<", "", ".", "data.train"]
)
# YAML text of what is no value though it looks like one, what is none in Python, and what no setting takes.
SCALARS = [
    *"2024-99-99|0b_|0x_|0o|1:99|.inf|-.inf|.nan|1e400|-0|0|1|-1|null|~|true|no|[]|{}|[1, 2]|[2, 1]|- a|? b".split("|"),
    *"!!int abc|!!float x|!!bool x|!!binary x|!!timestamp x|!!python/name:os.system|!x y|*a|&a b|&a [*a]".split("|"),
    *"{a: 1, a: 2}|{<<: {a: 1}}|<<|=|'|\"|%|@|`|\t|# x|a: b: c|nf4|all-linear|zero3|node|text|data|bases|..".split("|"),
    *('"\\ud800"', '"\\0"', '"a\\nb"', "9" * 19, "9" * 5000, "0x" + "f" * 5000, "[" * 1000, "{a: " * 1000, "x" * 5000),
]

texts = st.text(st.characters(exclude_categories=()), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
overrides = st.builds("{}={}".format, st.sampled_from(NAMES) | texts, st.sampled_from(SCALARS) | texts)


@st.composite
def trees(draw: st.DrawFn) -> str:
    """The text of a valid configuration in which some values are others, each under a setting's name or a section's."""
    tree: dict[str, Any] = {name: {**section} for name, section in TREE.items()}
    for path in draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        section, _, name = path.partition(".")
        if name and isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = draw(values)
        else:
            tree[section] = draw(values)
    return yaml.safe_dump(tree, allow_unicode=draw(st.booleans()))


FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def answered(text: str | bytes, given: list[str]) -> None:
    try:
        config = parse_config(text, given)
    except ConfigError as error:
        sentences = str(error).splitlines()
        assert 1 <= len(sentences) <= 21
        assert all(len(sentence) < 1500 for sentence in sentences)
        return
    assert parse_config(dump_config(config)) == config
    dump_config(config).encode()


@FUZZ
@given(st.binary(max_size=100) | texts.map(lambda text: text.encode(errors="surrogatepass")) | texts)
def test_any_text_is_a_configuration_or_refused(text: str | bytes):
    answered(text, [])


@FUZZ
@given(trees())
def test_any_value_of_any_setting_is_taken_or_refused(text: str):
    answered(text, [])


@FUZZ
@given(st.lists(overrides, min_size=1, max_size=3))
def test_any_override_is_taken_or_refused(given: list[str]):
    answered(yaml.safe_dump(TREE), given)
