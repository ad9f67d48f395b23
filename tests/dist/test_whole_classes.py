"""Bases whose whole class does more to text than their language model are trained, exported and merged as the class that
people load, by plain transformers and PEFT alone (tests/every_model.py).
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import loading
from tests.dist.launch import launch
from tests.every_model import PROVEN, SECONDS, tried, write_base
from tests.material import Workshop
from trainer.config import dump_config

# The text class scales its logits and the whole one does not; the other way round; scales and caps them.
KINDS = ("cohere2_vision", "granite_docling", "muse_glimmer", "muse_spark")
QUICK = ("cohere2_vision", "muse_glimmer")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.long]) for kind in KINDS]
)
def test_a_whole_class_is_trained_and_exported_as_people_load_it(kind: str, tmp_path: Path) -> None:
    (found,) = launch(1, tried, kind, str(tmp_path), timeout=SECONDS)
    assert found["status"] == PROVEN, found


@pytest.mark.long
def test_two_ranks_make_of_whole_classes_the_logits_that_one_makes(tmp_path: Path) -> None:
    """Those of one rank are compared with the class that people load above."""
    kinds, config = (*KINDS, "molmo2"), dump_config(Workshop(tmp_path).config("one", "model.dtype=fp32"))
    for kind in kinds:
        write_base(kind, tmp_path / kind)
    made = list[dict[str, torch.Tensor]]()
    for ranks in (1, 2):
        destination = tmp_path / f"{ranks} ranks"
        destination.mkdir()
        launch(ranks, loading.loaded_logits, config, [str(tmp_path / kind) for kind in kinds], [], str(destination))
        made.append({kind: load_file(destination / f"{kind}.safetensors")["logits"] for kind in kinds})
    for kind in kinds:
        assert torch.equal(made[0][kind], made[1][kind]), kind
        assert made[0][kind].std() > 0, kind
