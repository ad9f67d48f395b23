"""Runs in which a bit is flipped in memory, at a place that nobody writes to then."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.dist.runs import outcome_of
from trainer.config import parse_config
from trainer.data.compile.prepare import Datasets
from trainer.model.micro_batch import MicroBatch
from trainer.rank import run_rank
from trainer.state.kept import Kept
from trainer.state.zero.engine import Engine
from trainer.state.zero.looks import Looks
from trainer.train.every import Actions, Moment
from trainer.train.every.keep import Keep
from trainer.train.start import Starter


def run(
    config_text: str, fingerprint: str, where: str, rank: int, step: int, seen: str | None = None
) -> dict[str, Any]:
    """`run_rank`, and how it ended. Behind the update that makes `step` a bit of this rank is flipped.

    share: of the packed weight, or other tensor of the share, whose name contains `seen`.
    layer: of a gathered copy of it, in the next look at it alone. whole: of a copy that stays whole.
    learnt: of the first thing that learns whose name contains `seen`.
    gradient: the rank computes other gradients, in its next `step` probes.
    kept: of what learns, in the memory that outlives the rank.
    none: nothing is flipped.
    """
    config = parse_config(config_text)
    if int(os.environ["RANK"]) == rank:
        _PLACES[where](step, seen or "")
    datasets = Datasets(fingerprint, None) if os.environ["RANK"] == "0" else None
    starter = Starter(kept=Kept.made("test")) if where == "kept" else Starter()
    return outcome_of(lambda: run_rank(config, datasets, resume=False, starter=starter))


def flip(values: Tensor) -> None:
    """Flip a bit in the middle."""
    data = values.view(-1).view(torch.uint8)
    assert len(data), "this rank has nothing of it"
    data[len(data) // 2] ^= 4


def _behind(chosen: int, action: Callable[[Engine], None]) -> None:
    """Act after the watch of what learns has begun in the state after so many updates."""
    plain = Actions.stepped

    def stepped(self: Actions, step: int) -> dict[str, float]:
        figures = plain(self, step)
        if step == chosen:
            action(self._run.engine)
        return figures

    Actions.stepped = stepped


def _share(step: int, seen: str) -> None:
    _behind(step, lambda engine: flip(next(one.part for one in engine.looks.held if seen in one.name)))


def _whole(step: int, seen: str) -> None:
    def act(engine: Engine) -> None:
        flip(next(one.data for name, one in engine.model.named_parameters() if seen in name and not one.requires_grad))

    _behind(step, act)


def _kept(step: int, _: str) -> None:
    plain = Keep.act

    def act(self: Keep, now: Moment) -> None:
        plain(self, now)
        if now.step == step:
            flip(self._memory.found()[step][1])

    Keep.act = act


def _layer(step: int, seen: str) -> None:
    plain, flipped = Looks.layer, list[str]()

    def layer(self: Looks, parameters: Sequence[Any]) -> None:
        names = {id(one.owner): one.name for one in self.held}
        for parameter in parameters:
            if seen in names.get(id(parameter), "") and self.looked[0] >= step and not flipped:
                flip(parameter.data)
                flipped.append(names[id(parameter)])
        plain(self, parameters)

    Looks.layer = layer


def _learnt(step: int, seen: str) -> None:
    def act(engine: Engine) -> None:
        flip(next(one.values for one in engine._learnt() if one.what == seen and one.values.numel()))

    _behind(step, act)


def _gradient(times: int, _seen: str) -> None:
    plain, done = Engine.gradients, [0]

    def gradients(self: Engine, row: MicroBatch, limit: int) -> dict[str, Tensor]:
        found = plain(self, row, limit)
        done[0] += 1
        if done[0] > 2 and done[0] <= 2 + times:  # behind the first probe, which repeats itself
            flip(next(iter(found.values())))
        return found

    Engine.gradients = gradients


_PLACES: dict[str, Callable[[int, str], None]] = {
    "share": _share,
    "whole": _whole,
    "layer": _layer,
    "learnt": _learnt,
    "kept": _kept,
    "gradient": _gradient,
    "none": lambda _step, _seen: None,
}
