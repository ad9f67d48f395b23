"""A target token weighs the same whatever the accumulation, the packing and the number of ranks.

DeepSpeed divides gradients by the world size and, unless told otherwise, by the accumulation; gradients that the
optimizer gets are therefore compared with a plain PyTorch step, and not only among themselves.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import curves, gradients, runs
from tests.dist.launch import launch
from tests.families import rows
from tests.material import Workshop
from trainer.config import dump_config
from trainer.run.layout import CONFIG, metrics

# world size, micro_batch -> accumulation at a global batch of 4. Three ranks do not divide 4: two of their rows are
# empty.
LAYOUTS = {(1, 1): 4, (1, 4): 1, (2, 1): 2, (2, 2): 1, (3, 1): 2}
# fp32: the order of additions; bf16: its 8 bits of mantissa, through two layers and back.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.fixture(scope="module", params=rows(["fp32", "bf16"], ["fp32"]))
def steps(request: pytest.FixtureRequest, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The dtype and the first step of each layout, with "plain" for PyTorch's: (record of rank 0, its gradients)."""
    folder = tmp_path_factory.mktemp("gradients")
    dtype = request.param
    found = {"dtype": dtype}
    for layout in ["plain", *LAYOUTS]:
        world_size, micro_batch = (1, 1) if layout == "plain" else layout
        config = workshop.config("gradients", f"model.dtype={dtype}", f"train.micro_batch={micro_batch}")
        function = gradients.plain_first_step if layout == "plain" else gradients.first_step
        file = folder / "gradients.safetensors"
        arguments = dump_config(config), workshop.prepare(config).train, str(file)
        found[layout] = launch(world_size, function, *arguments)[0], load_file(file)
    return found


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance of two gradients of one parameter, relative to its norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def test_the_rows_of_the_step_differ_in_their_number_of_targets(steps: Any) -> None:
    rows = steps["plain"][0]["row_targets"]
    assert len(rows) == 4
    assert len(set(rows)) > 1


def test_adapters_of_every_layer_have_a_gradient(steps: Any) -> None:
    gradients = steps["plain"][1]
    assert len(gradients) == 2 * 7 * 2  # layers, linears, A and B
    assert all(gradient.norm() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0]}-ranks-of-{layout[1]}-rows")
def test_loss_and_gradients_are_those_of_plain_pytorch(steps: Any, layout: tuple[int, int]) -> None:
    (record, gradients), (plain, plain_gradients) = steps[layout], steps["plain"]
    tolerance = TOLERANCE[steps["dtype"]]
    assert record["accumulation"] == LAYOUTS[layout]
    assert record["targets"] == plain["targets"]
    assert record["loss"] == pytest.approx(plain["loss"], rel=tolerance / 3)
    assert record["grad_norm"] == pytest.approx(plain["grad_norm"], rel=tolerance)
    assert distance(gradients, plain_gradients) < tolerance


def test_label_smoothing_and_z_loss_are_those_of_plain_pytorch_and_an_evaluation_is_without_them(
    workshop: Workshop, tmp_path: Path
) -> None:
    held_out = ("data.held_out=0.2", "train.steps=1", "optim.lr=1e-12")
    found = {}
    for name, terms in {"plain": (), "terms": ("objective.label_smoothing=0.3", "objective.z_loss=0.02")}.items():
        config = workshop.config(f"terms-{name}", "model.dtype=fp32", *held_out, *terms)
        data, file = workshop.prepare(config), tmp_path / f"{name}.safetensors"
        record = launch(2, gradients.first_step, dump_config(config), data.train, str(file))[0]
        plain = launch(1, gradients.plain_first_step, dump_config(config), data.train, str(file) + "-plain")[0]
        assert record["loss"] == pytest.approx(plain["loss"], rel=1e-5 / 3)
        assert distance(load_file(file), load_file(str(file) + "-plain")) < 1e-5
        workshop.store.sub(config.run.name).put(CONFIG, dump_config(config).encode())
        launch(2, runs.run, dump_config(config), data.train, "start", data.eval)
        records = workshop.store.sub(config.run.name).get(metrics(1)).splitlines()
        (evaluated,) = (one["loss"] for one in map(json.loads, records) if one["kind"] == "eval")
        found[name] = evaluated, record["loss"], load_file(file)
    assert found["terms"][0] == pytest.approx(found["plain"][0], rel=1e-6)
    assert found["terms"][1] > found["plain"][1] + 0.1
    assert distance(found["terms"][2], found["plain"][2]) > 0.1, "the control: the terms change the gradient"


def test_twenty_steps_give_the_losses_of_the_stock_path(workshop: Workshop) -> None:
    config = workshop.config(
        "curve", "train.steps=20", "checkpoint.every_steps=0", "train.activation_checkpointing=false"
    )
    fingerprint = workshop.prepare(config).train
    (stock,) = launch(1, curves.stock_losses, dump_config(config), fingerprint)
    ours = launch(2, curves.losses, dump_config(config), fingerprint)[0]
    assert len(ours) == len(stock) == 20
    assert stock[0] - stock[-1] > 0.1  # it learns
    assert ours == pytest.approx(stock, abs=1e-2)


def test_parameters_offloaded_to_the_cpu_give_the_same_losses(workshop: Workshop, tmp_path: Path) -> None:
    """Without a GPU the partitions lie where they lay, but DeepSpeed goes its other way through load, gathers and
    step.
    """
    policy = json.loads(workshop.policy.read_text())
    policy["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": False}
    (tmp_path / "offload.json").write_text(json.dumps(policy))
    config = workshop.config("offload", "train.steps=3")
    fingerprint = workshop.prepare(config).train
    away = workshop.config("offloaded", "train.steps=3", f"sharding.deepspeed={tmp_path}/offload.json")
    assert launch(2, curves.losses, dump_config(away), fingerprint) == launch(
        2, curves.losses, dump_config(config), fingerprint
    )
