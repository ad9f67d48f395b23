"""Looks for wrong bytes in what the ranks hold, after each update and in each pass (trainer/state/zero/looks.py).

a share of the frozen base     named, read again from the store, and said for which steps it may have been wrong
a gathered copy of it          named, gathered again, and said so
what learns                    named; the start ends, and the next one goes on from a state before it
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainer.config.section import Section, Share, part, setting
from trainer.train.every import Action, ActionKind, Actions

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.state.zero.looks import Told
    from trainer.train.loop import Training


_LEARNT, _SHARE = 0.15, 0.3
"""The parts of the time for what learns, which is added up twice, and for the share. The rest is for the layer."""


class LookSettings(Section):
    """How much of a step's time the search for wrong bytes may take."""

    look_share: Share = setting(
        0.01,
        about=(
            "The share of a step's time that each rank may use to look for corrupted memory: bytes that have changed"
            " although nothing wrote to them. It checks its part of the frozen base, one gathered layer, and the"
            " trained weights. 0 turns this off."
        ),
        example=0.002,
    )


class _Names(NamedTuple):
    """The names of a rank and of what it has found."""

    machine: str
    learnt: str | None


class Look(Action):
    """The looks of one rank."""

    def __init__(self, run: Training, time_share: float) -> None:
        self._run, self._looks, self._share = run, run.engine.looks, time_share
        self._stepped, self._step = time.monotonic(), 0
        self._layers: list[int] = []
        """The step of the last good look at the gathered parameters of each turn."""
        self._spent = 0.0

    def begins(self, step: int) -> None:
        self._step, self._layers = step, [step] * max(1, self._run.engine.turns)
        self._looks.looked = [step] * len(self._looks.held)
        self._begin(step, 0.0)

    def _begin(self, step: int, seconds: float) -> None:
        """Look at as much as fits into this share of a step of so many seconds, in the state after `step` updates."""
        if turns := self._run.engine.turns:
            self._run.engine.look_at(step % turns)
        bytes_ = self._looks.budget(self._share * seconds)
        self._looks.watch(int(_LEARNT * bytes_))
        self._looks.sweep(int(_SHARE * bytes_))

    def told(self) -> tuple[float | Tensor, ...]:
        return self._looks.told()

    def stepped(self, step: int) -> Mapping[str, float]:
        now, self._step = time.monotonic(), step
        self._begin(step, now - self._stepped)
        self._stepped = now
        spent, self._spent = self._looks.seconds - self._spent, self._looks.seconds
        return {"look_seconds": round(spent, 6)}

    def heard(self, ranks: Sequence[Sequence[float]]) -> None:
        """Conclude from what all ranks have told of the pass before the newest update.

        Raises `WrongBytes`, on every rank, if something that learns was wrong.
        """
        from trainer.state.zero.looks import Told, is_mixed

        every, before = [Told(*map(int, rank)) for rank in ranks], self._step - 1
        mixed = is_mixed(every)
        if any(rank.share or rank.layer or rank.learnt for rank in every) or any(mixed):
            self._found(every, mixed, before)
        self._looks.sound(before)
        self._layers[before % len(self._layers)] = before

    def _found(self, every: Sequence[Told], mixed: Sequence[bool], before: int) -> None:
        """Name what is wrong in the state after `before` updates, and repair it. Collective."""
        from trainer.errors import WrongBytes

        start, looks = self._run.start, self._looks
        mine = every[start.ranks.rank].learnt
        names = [
            _Names(*told)
            for told in start.ranks.gather_objects((start.starter.machine, looks.learnt_name(mine) if mine else None))
        ]
        wrong = list[str]()
        for rank, (told, name) in enumerate(zip(every, names, strict=True)):
            if told.learnt:
                assert name.learnt is not None
                wrong.append(self._say(rank, name.machine, "learnt", name.learnt, before))
            elif mixed[rank]:
                wrong.append(self._say(rank, name.machine, "gathered", "what learns", before))
        if wrong:
            self._run.checkpoints.doubt(before - 1, f"{wrong[0]}.")
            raise WrongBytes(f"{'; '.join(wrong)}. The update after step {before} is not kept.")
        numbers = sorted({number - 1 for told in every for number in (told.share, told.layer) if number})
        self._repair([name.machine for name in names], every, numbers, before)

    def _repair(self, machines: Sequence[str], every: Sequence[Told], numbers: list[int], before: int) -> None:
        """Read what is wrong in a share again, and gather again what is wrong in a copy. Collective."""
        from trainer.errors import WrongBytes

        start, looks, turn = self._run.start, self._looks, before % len(self._layers)
        in_shares = start.ranks.gather_objects({number: looks.looked[number] for number in looks.wrong_now(numbers)})
        wrong = sorted({number for rank in in_shares for number in rank})
        said = [
            self._say(rank, machines[rank], "share", looks.held[number].name, before, since)
            for rank, found in enumerate(in_shares)
            for number, since in found.items()
        ]
        said += [
            self._say(rank, machines[rank], "gathered", looks.held[told.layer - 1].name, before, self._layers[turn])
            for rank, told in enumerate(every)
            if told.layer and told.layer - 1 not in wrong
        ]
        if wrong:
            self._run.begin("load")
            self._run.refill([looks.held[number].owner for number in wrong])
            left = start.ranks.gather_objects(looks.wrong_now(wrong))
            self._run.begin("save", before + 1)
            if any(left):
                names = sorted({looks.held[number].name for rank in left for number in rank})
                raise WrongBytes(
                    f"{'; '.join(said)}. {', '.join(names)} could not be repaired from the base's files. Start the run"
                    " again: it reads the base anew."
                )
        self._run.engine.gather_again()

    def _say(self, rank: int, machine: str, where: str, tensor: str, before: int, since: int | None = None) -> str:
        """Record a wrong byte, and return the sentence about it without its full stop."""
        from trainer.run.lines import wrong_sentence

        facts = {"step": before + 1, "rank": rank, "machine": machine, "where": where, "tensor": tensor}
        facts["since"] = before if since is None else since
        self._run.start.metrics.write("wrong_bytes", **facts)
        return wrong_sentence({"kind": "wrong_bytes", **facts})


def _open(run: Training, _: Actions) -> Look | None:
    share = part(run.start.config.train, LookSettings).look_share
    return Look(run, share) if share else None


SETTINGS = (LookSettings,)
ACTIONS = {"look": ActionKind(_open)}
