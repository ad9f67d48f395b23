"""Bases whose whole class does more to text than their language model are trained, exported and merged as the class that
people load, by plain transformers and PEFT alone (tests/every_model.py).
"""

from pathlib import Path

import pytest

from tests.dist.launch import launch
from tests.every_model import PROVEN, SECONDS, tried

# The text class scales its logits and the whole one does not; the other way round; scales and caps them.
KINDS = ("cohere2_vision", "granite_docling", "muse_glimmer", "muse_spark")
QUICK = ("cohere2_vision", "muse_glimmer")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.long]) for kind in KINDS]
)
def test_a_whole_class_is_trained_and_exported_as_people_load_it(kind: str, tmp_path: Path) -> None:
    (found,) = launch(1, tried, kind, str(tmp_path), timeout=SECONDS)
    assert found["status"] == PROVEN, found
