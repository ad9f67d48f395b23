"""Ranks that share a row compute the loss and the gradients of one rank that has it whole, over the same data in the same order."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.dist import gradients
from tests.dist.launch import launch
from tests.dist.test_gradients import distance
from tests.material import Workshop
from trainer.config import dump_config

TOLERANCE = 1e-5
BASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "one key head": ("llama", {"num_key_value_heads": 1}, ()),
    "as many key heads": ("llama", {"num_key_value_heads": 4}, ()),
    "three key heads": ("llama", {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 3}, ()),
    "windows and caps": ("gemma2", {}, ()),
    "windows and sinks": ("gpt-oss", {}, ()),
    "latent": ("deepseek-v3", {}, ()),
    "experts": ("mixtral", {}, ("tuning.experts=true",)),
    "shared keys": ("gemma4", {}, ()),
}


def first_step(workshop: Workshop, folder: Path, ranks: int, shared: int, *settings: str) -> tuple[dict[str, Any], Any]:
    """The record of the first step and its gradients, on so many ranks of which `shared` share each row."""
    more = ("model.dtype=fp32", f"sharding.sequence_parallel={shared}", *settings)
    config, file = workshop.config(f"shared-{ranks}-{shared}", *more), folder / f"{ranks}-{shared}.safetensors"
    record = launch(ranks, gradients.first_step, dump_config(config), workshop.prepare(config).train, str(file))[0]
    return record, load_file(file)


def assert_same(found: tuple[dict[str, Any], Any], expected: tuple[dict[str, Any], Any]) -> None:
    assert found[0]["targets"] == expected[0]["targets"]
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=TOLERANCE)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=TOLERANCE)
    assert distance(found[1], expected[1]) < TOLERANCE


def test_two_ranks_that_share_packed_rows_have_the_loss_and_the_gradients_of_one(
    workshop: Workshop, tmp_path: Path
) -> None:
    shared, alone = (first_step(workshop, tmp_path, ranks, ranks) for ranks in (2, 1))
    assert_same(shared, alone)
    assert shared[0]["accumulation"] == alone[0]["accumulation"] == 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "shared", "settings"),
    [
        (4, 2, ()),
        (4, 4, ()),
        (2, 2, ("data.packing=false",)),
        (2, 2, ("train.activation_checkpointing=all",)),
        (2, 2, ("train.activation_checkpointing=none", "train.micro_batch=2")),
        (2, 2, ("model.attention=eager",)),
    ],
    ids=str,
)
def test_so_have_others(workshop: Workshop, tmp_path: Path, ranks: int, shared: int, settings: tuple[str, ...]) -> None:
    assert_same(
        first_step(workshop, tmp_path, ranks, shared, *settings), first_step(workshop, tmp_path, 1, 1, *settings)
    )


@pytest.mark.long
@pytest.mark.parametrize("name", BASES)
def test_so_have_two_over_other_bases(tmp_path: Path, name: str) -> None:
    kind, sizes, settings = BASES[name]
    workshop = Workshop(tmp_path, kind, **sizes)
    assert_same(*(first_step(workshop, tmp_path, ranks, ranks, *settings) for ranks in (2, 1)))
