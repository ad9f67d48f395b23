"""Any values under the keys of other tools: a configuration of ours that is valid, or one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.init.importing.importing import JOINS, import_files
from trainer.config import parse_config
from trainer.errors import ConfigError

SCALARS = (None, True, False, "x", "", 3, 0, -1, 0.5, "auto", "1e-4", "a,b", 1e30, "inf", "nan", "${x}", "${run}/y")
values = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["path", "type", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("peer", JOINS)
@given(data=st.data())
@settings(
    max_examples=30,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
def test_any_value_of_any_key_is_carried_over_or_named(tmp_path: Path, peer: str, data: st.DataObject) -> None:
    rows = [key.removesuffix(".*") for key in JOINS[peer][0].rows]
    tree: dict[str, Any] = {}
    for key in data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=20, unique=True)):
        node: Any = tree
        *around, leaf = key.replace("[]", "").split(".")
        for part in around:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[leaf] = data.draw(values)
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(tree))
    try:
        imported = import_files([tmp_path / "theirs.yaml"], peer)
    except ConfigError:
        return
    parse_config(imported.text)
    assert all(outcome.settings or outcome.why for outcome in imported.keys)
