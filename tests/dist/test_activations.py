"""Activations that are computed again are those that were: which layers do so changes no bit of a step on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import activations
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.config import dump_config

LAYERS = activations.LAYERS
MATRICES = 6  # of seven in a layer; the last one's product is not made again
AGAIN = {"all": LAYERS, "1": LAYERS - 1, "none": 0}  # the layers that are computed again
WAYS = {
    **{way: (f"train.activation_checkpointing={way}", "tuning.dropout=0.2") for way in AGAIN},
    "whole": ("train.activation_checkpointing=all",),
    "tiled": ("train.activation_checkpointing=all", "train.tiled_mlp=true"),
    "tiled and kept": ("train.activation_checkpointing=none", "train.tiled_mlp=true"),
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each way's first step on two ranks: (facts of rank 0, its gradients)."""
    folder = tmp_path_factory.mktemp("activations")
    workshop = Workshop(folder, num_hidden_layers=LAYERS)
    loads, files = [], {}
    for way, overrides in WAYS.items():
        config = workshop.config("activations", *overrides)
        files[way] = folder / f"{way}.safetensors"
        loads.append((dump_config(config), workshop.prepare(config).train, str(files[way])))
    facts = launch(2, activations.first_steps, loads, timeout=300)[0]
    return {way: (fact, load_file(files[way])) for way, fact in zip(WAYS, facts, strict=True)}


def assert_same(steps: dict[str, Any], way: str, other: str) -> None:
    (facts, gradients), (expected, expected_gradients) = steps[way], steps[other]
    assert facts["loss"] == expected["loss"]
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


@pytest.mark.parametrize("way", AGAIN)
def test_a_step_is_the_same_to_the_last_bit_whichever_layers_are_computed_again(
    steps: dict[str, Any], way: str
) -> None:
    assert_same(steps, way, "none")
    again = steps[way][0]["dequantized"] - steps["none"][0]["dequantized"]
    assert again == AGAIN[way] * MATRICES * steps[way][0]["accumulation"], "the layers that are computed again"


@pytest.mark.parametrize("way", ["tiled", "tiled and kept"])
def test_tiled_mlps_change_no_bit_of_a_loss_and_nothing_but_rounding_of_gradients(
    steps: dict[str, Any], way: str
) -> None:
    (facts, gradients), (expected, expected_gradients) = steps[way], steps["whole"]
    assert facts["loss"] == expected["loss"]
    assert facts["tiled"] == 2 * LAYERS * facts["accumulation"], "the control: there are tiles, forwards and backwards"
    assert facts["dequantized"] <= expected["dequantized"], "each matrix once for all tiles"
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).norm() < 1e-2 * gradient.norm(), name


def test_auto_keeps_activations_where_the_ranks_have_the_memory_and_says_so(tmp_path: Path) -> None:
    """Of two ranks each may have a quarter of what the host has left; a small allowance is always taken off."""
    text = dump_config(Workshop(tmp_path, num_hidden_layers=LAYERS).config("settled", "train.activation_offload=true"))
    for found in launch(2, activations.settled, text, [64 * 2**30, 2**30]):
        assert found == [
            [
                3,
                "activation checkpointing: 0 of 3 layers (auto, for 16.0 GiB a rank)",
                (
                    "train.activation_offload: has no effect, as there is room for the activations of all 3 layers and"
                    " train.activation_checkpointing: auto has none computed again. Set that to all to keep their"
                    " inputs on the host."
                ),
            ],
            [0, "activation checkpointing: 3 of 3 layers (auto, for 0.2 GiB a rank)"],
        ]
