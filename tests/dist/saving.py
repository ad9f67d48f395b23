"""Ranks that save and restore."""

import os
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.dist.assembled import Assembled, assemble_run
from tests.dist.runs import outcome_of
from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.state.kept import Updates
from trainer.train.loop import train


def train_and_save(config_text: str, fingerprint: str, saves: list[int], destination: str) -> int:
    """Train, save after each step of `saves`, the last being the end; writes this rank's states. -> AdamW's count."""
    here = assemble_run(parse_config(config_text), fingerprint)
    checkpoints = here.checkpoints()
    for record in train(here.training(), 0, Position()):
        if record["step"] in saves:
            checkpoints.save(here.engine, record["step"], Position(0, 0, 4 * record["step"]).to_json())
            checkpoints.finish()
        if record["step"] == saves[-1]:
            break
    save_file(here.states(), f"{destination}/{here.ranks.rank}.safetensors")
    return here.engine.updates


def restore(config_text: str, fingerprint: str, destination: str, base: str = "ours") -> dict[str, Any]:
    """Restore into a fresh engine; writes this rank's states. `half`: whether the 16-bit weights are the masters'."""
    here = assemble_run(parse_config(config_text), fingerprint)
    log: list[str] = []
    manifest = None

    def restored() -> None:
        nonlocal manifest
        manifest = here.checkpoints(base=base).restore(here.engine, required=True, log=log.append)

    outcome = outcome_of(restored)
    if manifest is None:
        return {**outcome, "log": log}
    save_file(here.states(), f"{destination}/{here.ranks.rank}.safetensors")
    return {
        **outcome,
        "log": log,
        "step": manifest.step,
        "updates": here.engine.updates,
        "half": half_is_the_masters(here),
    }


def half_is_the_masters(here: Assembled) -> bool:
    """Whether the 16-bit weights that learn are the masters', rounded."""
    half = True
    trainable = [(n, p) for n, p in here.engine.model.named_parameters() if p.requires_grad]
    parts = {part.name: part for part in here.engine.partitions()}
    with deepspeed.zero.GatheredParameters([parameter for _, parameter in trainable]):
        for name, parameter in trainable:
            part = parts[name]
            mine = parameter.data.view(-1)[part.begin : part.end]
            half &= torch.equal(mine, part.states["master"].to(parameter.dtype))
    return half


def restore_and_train(config_text: str, fingerprint: str, last: int) -> dict[str, Any]:
    """Restore what there is, as a restarted rank does, and train past step `last`, the first that is new and so
    committed.
    """
    here = assemble_run(parse_config(config_text), fingerprint)

    def action() -> None:
        training = here.training(generation=2)
        manifest = training.checkpoints.restore(here.engine, required=False, log=print)
        assert manifest is not None, "training started over"
        for record in train(training, manifest.step, Position.from_json(manifest.position)):
            if record["step"] > last:
                break

    return outcome_of(action)


def restore_beside_memory(config_text: str, fingerprint: str, doubted: bool) -> dict[str, Any]:
    """Keep steps 2 and 3 in memory, and commit steps 1 and 3. With `doubted` the states after step 2 are in doubt."""
    here = assemble_run(parse_config(config_text), fingerprint)
    checkpoints, at = here.checkpoints(), dict[int, dict[str, Tensor]]()
    checkpoints.memory = Updates(os.memfd_create("test"))
    for record in train(here.training(), 0, Position()):
        step = record["step"]
        at[step] = {name: values.clone() for name, values in here.states().items()}
        if step > 1:
            checkpoints.keep(here.engine, step, Position(0, 0, 4 * step).to_json())
        if step == 3:
            checkpoints.save(here.engine, step, Position(0, 0, 4 * step).to_json())
            checkpoints.finish()
            break
    if doubted:
        checkpoints.doubt(2, "rank 1 computes another gradient.")
    again = here.checkpoints(generation=2)
    again.memory = checkpoints.memory
    manifest = again.restore(here.engine, required=True, log=lambda line: None)
    assert manifest is not None
    same = {step for step, states in at.items() if all(torch.equal(states[n], v) for n, v in here.states().items())}
    return {"step": manifest.step, "same": sorted(same), "memory": not manifest.shards}


def save_as_generation(config_text: str, fingerprint: str, generation: int) -> dict[str, Any]:
    here = assemble_run(parse_config(config_text), fingerprint)
    checkpoints = here.checkpoints(generation)
    checkpoints.save(here.engine, 1, Position(0, 0, 4).to_json())
    return outcome_of(checkpoints.finish)


Job = tuple[str, str, str]  # a configuration, the fingerprint of its data, and a folder for what the ranks write


def train_each(jobs: list[Job]) -> list[float]:
    """Two steps of each run, saved, and its states written; -> the loss of the step after them."""
    return [_train(*job) for job in jobs]


def _train(config_text: str, fingerprint: str, folder: str) -> float:
    here = assemble_run(parse_config(config_text), fingerprint)
    checkpoints, steps = here.checkpoints(), train(here.training(), 0, Position())
    next(steps)
    next(steps)
    checkpoints.save(here.engine, 2, Position(0, 0, 2 * here.config.train.global_batch).to_json())
    checkpoints.finish()
    save_file(here.states(), f"{folder}/{here.ranks.rank}.safetensors")
    return next(steps)["loss"]


def go_on_each(jobs: list[Job]) -> list[dict[str, Any]]:
    """Each run restored into a fresh engine, its states written, and the loss of its next step."""
    return [_go_on(*job) for job in jobs]


def _go_on(config_text: str, fingerprint: str, folder: str) -> dict[str, Any]:
    here = assemble_run(parse_config(config_text), fingerprint)
    training = here.training(generation=2)
    manifest = training.checkpoints.restore(here.engine, required=True, log=print)
    assert manifest is not None
    save_file(here.states(), f"{folder}/{here.ranks.rank}.safetensors")
    half = half_is_the_masters(here)
    record = next(train(training, manifest.step, Position.from_json(manifest.position)))
    return {"from": manifest.step, "half": half, "loss": record["loss"]}
