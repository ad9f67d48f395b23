"""Any value in any place of a cached base's manifest: the bytes that were written, or `Damaged`."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.test_bases import FUZZ, leaves, odd, replaced
from tests.unit.base.test_base_cache import BYTES, opened, reseal, written
from trainer.base.load.cache import MANIFEST
from trainer.errors import Damaged
from trainer.store.store import open_store

FOLDER = written(open_store("memory://"))
CONTENT = bytes(FOLDER.get(MANIFEST))
strange = odd | st.sampled_from(["../../config.yaml", "00000000/rank-00000-0000.bin", "0" * 32])


@FUZZ
@given(st.data())
def test_any_value_in_any_place_is_damaged_or_changes_nothing(data: st.DataObject) -> None:
    def change(body: dict[str, Any]) -> None:
        changed = replaced(body, data.draw(st.sampled_from(leaves(body)[1:])), data.draw(strange))
        body.clear()
        body.update(changed)

    FOLDER.put(MANIFEST, CONTENT)
    if data.draw(st.booleans()):
        reseal(FOLDER, change)
    else:
        tree = json.loads(CONTENT)
        FOLDER.put(
            MANIFEST, json.dumps(replaced(tree, data.draw(st.sampled_from(leaves(tree))), data.draw(odd))).encode()
        )
    with suppress(Damaged):
        weight = opened(FOLDER).sources("a").parts.get("weight")
        # The load compares names and sizes with those of the module.
        assert weight is None or weight.read(0, weight.shape[0]) == bytes(BYTES["a.weight"].tolist())[: weight.shape[0]]
