"""Tiny runs of every kind, whose losses and gradients on a card are those of a CPU, which are kept in recorded.json."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from card.figures import Figure

RECORDED = Path(__file__).with_name("recorded.json")
STEPS = 3
# In fp32 a card adds the same products in another order.
LOSS, GRADIENT = 2e-4, 1e-2


class Kind(NamedTuple):
    """A tiny run: the kind of its base, settings beside the others', and its rows: plain ones, pairs, or answers with a
    label; the format that its base's experts are stored in; the tokens that MLPs take at a time; and sizes of the base.
    """

    base: str = "llama"
    settings: tuple[str, ...] = ()
    rows: str = "plain"
    stored: str = ""
    tile: int | None = None
    sizes: tuple[tuple[str, int], ...] = ()


KINDS = {
    "sft": Kind(),
    "dpo": Kind(settings=("objective.name=dpo", "data.format=preference"), rows="pairs"),
    "kto": Kind(settings=("objective.name=kto", "data.format=labelled"), rows="labelled"),
    "experts": Kind("mixtral", ("tuning.experts=true", "tuning.experts_rank=3")),
    "adamw_8bit": Kind(settings=("optim.name=adamw_8bit",)),
    "tiled": Kind(settings=("train.tiled_mlp=true", "train.activation_checkpointing=all"), tile=16),
    "offloaded parameters": Kind(settings=("sharding.deepspeed=zero3_offload_cpu",)),
    "offloaded optimizer": Kind(settings=("sharding.deepspeed=zero3_offload_optimizer",)),
    "offloaded activations": Kind(settings=("train.activation_offload=true", "train.activation_checkpointing=all")),
    "double": Kind(settings=("quant.double=true",)),
    "stored": Kind("qwen3-moe", ("quant.type=stored",), stored="int4-32", sizes=(("moe_intermediate_size", 96),)),
}


def tiny(given: argparse.Namespace) -> Iterator[Figure]:
    """Each kind's losses, and the norms of each parameter's gradient and of what it has learnt after `STEPS` steps,
    beside the recorded ones.
    """
    recorded = {} if given.record else json.loads(RECORDED.read_text(encoding="utf-8"))
    found = dict[str, dict[str, list[float]]]()
    for name, kind in KINDS.items():
        try:
            found[name] = _run(given.scratch / name.replace(" ", "-"), kind)
        except Exception as error:  # the others run
            yield Figure(name, f"{type(error).__name__}: {error}", "a run", False)
            continue
        if not given.record:
            yield _beside(name, found[name], recorded[name])
    if given.record:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in found.items())
        RECORDED.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        yield Figure("recorded", f"{len(found)} runs in {RECORDED.name}")


def _beside(name: str, found: dict[str, list[float]], wanted: dict[str, list[float]]) -> Figure:
    loss = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], wanted["losses"], strict=True))
    pairs = list(zip(found["gradients"], wanted["gradients"], strict=True))
    apart = sum((a - b) ** 2 for a, b in pairs) ** 0.5 / max(sum(b**2 for _, b in pairs) ** 0.5, 1e-30)
    right = loss < LOSS and apart < GRADIENT
    return Figure(name, f"losses {loss:.1e} off, gradients {apart:.1e}", f"below {LOSS:.0e} and {GRADIENT:.0e}", right)


def _run(folder: Path, kind: Kind) -> dict[str, list[float]]:
    """A run by the program of a rank, alone."""
    from tests.material import Workshop, make_labelled, make_pairs
    from trainer.rank import run_rank
    from trainer.train.start import Starter

    folder.mkdir()
    workshop = Workshop(folder, kind.base, **dict(kind.sizes))
    if kind.stored:
        from tests.stored import store_as

        workshop.base = store_as(workshop.base, folder / "stored", kind.stored, only="experts")
    make = {"plain": None, "pairs": make_pairs, "labelled": make_labelled}[kind.rows]
    rows = [f"data.train={json.dumps([{'path': str(make(folder / 'rows.jsonl'))}])}"] if make else []
    policy = [] if any("sharding" in one for one in kind.settings) else ["sharding.deepspeed=auto"]
    settings = ("model.dtype=fp32", f"train.steps={STEPS}", "checkpoint.every_steps=0", *policy, *rows, *kind.settings)
    config = workshop.config("tiny", *settings)
    losses = list[float]()
    starter = Starter(observe=lambda record: losses.append(record["loss"]))
    with _tiles_of(kind.tile), _watched() as gradients:
        run_rank(config, workshop.prepare(config), resume=False, starter=starter)
    return {"losses": losses, "gradients": [float(f"{value:.6g}") for value in gradients]}


@contextmanager
def _tiles_of(tokens: int | None) -> Iterator[None]:
    """Inside, MLPs are tiled by so many tokens instead of thousands."""
    from trainer.config import training
    from trainer.model import activations

    plain = training.MLP_TILE
    training.MLP_TILE = activations.MLP_TILE = tokens or plain
    try:
        yield
    finally:
        training.MLP_TILE = activations.MLP_TILE = plain


@contextmanager
def _watched() -> Iterator[list[float]]:
    """The norm of the gradient in each step, and after the last one the norms of each parameter's states that are no
    codes.
    """
    from trainer.state.zero.engine import Engine

    plain, norms, found = Engine.step, list[float](), list[float]()

    def step(engine: Any, lr: float) -> float:
        norms.append(plain(engine, lr))
        states = [state for part in engine.partitions() for state in part.states.values() if state.is_floating_point()]
        found[:] = [*norms, *(float(state.double().norm()) for state in states)]
        return norms[-1]

    Engine.step = step  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Engine.step = plain  # type: ignore[method-assign]
