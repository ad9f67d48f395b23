"""Probes: every so many steps all ranks compute one and the same row again, and compare the gradients.

The row is one that a rank has just trained on, in turns. Where ranks share a row, each takes its own part of it, and is
compared with the ranks that take the same part. Whoever has another gradient than most of them is wrong, and its
machine is named. A rank that nobody else can be compared with repeats its own row.

Kernels that give equal bits are compared by the bits. The first probe of a start repeats itself to find out whether
they do. If they do not, the norms of the gradients may differ by a multiple of what they differ by then. Where most
ranks differ from themselves later on, it is the kernels again, and the multiple is of the larger difference.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from trainer.config.section import Section, Steps, part, setting
from trainer.train.every import Action, ActionKind, Actions, Moment

if TYPE_CHECKING:
    import torch

    from trainer.model.micro_batch import MicroBatch
    from trainer.train.loop import Training

GRADIENT_BYTES = 2**26
"""The gradients of so many bytes of what learns, from the first layer on, are compared."""
_WIDER = 16.0
"""Norms may differ by so many times what they differed by in the first probe."""
_LEAST = 1e-7


class ProbeSettings(Section):
    """How often the ranks compare what they compute."""

    probe_every: Steps = setting(
        200,
        about=(
            "Every N steps, all ranks compute the same row and compare its gradient, to find a machine that computes"
            " wrongly. This takes the time of one forward and backward pass over a row, or of two with a single rank."
            " 0 turns it off."
        ),
        example=100,
    )


class RankAnswer(NamedTuple):
    """The results of one pass of a rank over the row: the sum of words of the gradient of each parameter, and its
    norm.
    """

    sums: tuple[int, ...]
    norms: tuple[float, ...]


class RankAnswers(NamedTuple):
    """The answers of a rank in all passes of a probe. Ranks of one `kind` should have the same ones."""

    kind: str
    machine: str
    passes: tuple[RankAnswer, ...]


@dataclass(frozen=True)
class Verdict:
    """`wrong` ranks differ from most others of their kind, or from some others if `undecided`."""

    wrong: tuple[int, ...] = ()
    undecided: bool = False


def spread(ranks: Sequence[RankAnswers]) -> float:
    """How far the norms of two passes of one rank are apart at most, relative to the gradient's; 0.0 if all passes have
    the same bits.
    """
    pairs = [
        (rank.passes[0], other) for rank in ranks for other in rank.passes[1:] if other.sums != rank.passes[0].sums
    ]
    return max((max(_LEAST, _apart(one, other.norms)) for one, other in pairs), default=0.0)


def usual_spread(ranks: Sequence[RankAnswers]) -> float:
    """The `spread` that at least half of the ranks have or exceed, each for itself: of the kernels then, and not of a
    rank that is wrong. 0.0 for a rank alone, which has nobody to tell these apart by.
    """
    return sorted(spread([rank]) for rank in ranks)[(len(ranks) - 1) // 2] if len(ranks) > 1 else 0.0


def judge(ranks: Sequence[RankAnswers], bound: float) -> Verdict:
    """Find the ranks that are wrong. `bound` is how far norms may be apart; with 0.0 all bits have to be the same."""
    wrong, undecided = set[int](), False
    by_kind = defaultdict[str, list[int]](list)
    for rank, answers in enumerate(ranks):
        by_kind[answers.kind].append(rank)
    for members in by_kind.values():
        passes = [(rank, answer) for rank in members for answer in ranks[rank].passes]
        if bound:
            norms = ([norm if norm == norm else inf for norm in answer.norms] for _, answer in passes)
            middle = tuple(map(median, zip(*norms, strict=True)))
            differ = {rank for rank, answer in passes if _apart(answer, middle) > bound}
            tied = 2 * len(differ) >= len(members) > 1 or (len(members) == 1 and bool(differ))
        else:
            (sums, count), *_ = Counter(answer.sums for _, answer in passes).most_common(1)
            differ = {rank for rank, answer in passes if answer.sums != sums}
            tied = bool(differ) and 2 * count <= len(passes)
        wrong |= set(members) if tied else differ
        undecided |= tied
    return Verdict(tuple(sorted(wrong)), undecided)


def _apart(answer: RankAnswer, norms: Sequence[float]) -> float:
    """The largest difference of the norms of a parameter, over the norm of all."""
    own = [norm if norm == norm else inf for norm in answer.norms]
    far = max((0.0 if one == other else abs(one - other) for one, other in zip(own, norms, strict=True)), default=0.0)
    return far if far in (0.0, inf) else far / sum(norm * norm for norm in norms) ** 0.5


class Probe(Action):
    def __init__(self, run: Training, every: int) -> None:
        self._run, self._every, self._good = run, every, 0
        self._bound: float | None = None
        self._passes = 2

    def begins(self, step: int) -> None:
        self._good = step

    def is_due(self, now: Moment) -> bool:
        return bool(now.rows) and now.is_every(self._every) and not now.stopping

    def act(self, now: Moment) -> None:
        """Raises `WrongBytes`, on every rank, if a rank is wrong."""
        began, start = time.monotonic(), self._run.start
        self._run.begin("evaluate")
        size = start.config.sharding.sequence_parallel
        row = self._row(now, size, (now.step // self._every - 1) % (start.ranks.world_size // size))
        answers = self._answers(row, now.step, self._passes)
        if self._bound is None:
            self._bound = _WIDER * spread(answers)
            # A rank that nobody else can be compared with goes on to repeat itself.
            self._passes = 2 if 1 in Counter(one.kind for one in answers).values() else 1
        verdict = judge(answers, self._bound)
        if verdict.wrong:
            # Whoever was wrong only once is known when all have computed the row again.
            again = self._answers(row, now.step, 2)
            answers = [one._replace(passes=one.passes + more.passes) for one, more in zip(answers, again, strict=True)]
            self._bound = max(self._bound, _WIDER * usual_spread(answers))
            verdict = judge(answers, self._bound)
        self._run.begin("save", now.step)
        if verdict.wrong:
            self._fail(now.step, answers, verdict)
        self._good = now.step
        seconds = round(time.monotonic() - began, 4)
        start.metrics.write("probe", step=now.step, seconds=seconds, bound=self._bound)

    def _row(self, now: Moment, size: int, group: int) -> MicroBatch:
        """This rank's part of the first row of a group of `size` ranks that share it. Collective."""
        from trainer.train.loop import surveys

        ranks, survey = self._run.start.ranks, next(iter(surveys(self._run, now.rows[:1])))
        mine = replace(now.rows[0], survey=None if survey is None else survey.cpu())
        parts = [ranks.broadcast(mine, source=group * size + part) for part in range(size)]
        return parts[ranks.rank % size]

    def _answers(self, row: MicroBatch, step: int, passes: int) -> list[RankAnswers]:
        """The answers of every rank. Collective."""
        start = self._run.start
        kind = f"{start.ranks.rank % start.config.sharding.sequence_parallel} {_kind(start.ranks.device)}"
        mine = tuple(_answer(self._run, row, step) for _ in range(passes))
        return start.ranks.gather_objects(RankAnswers(kind, start.starter.machine, mine))

    def _fail(self, step: int, answers: Sequence[RankAnswers], verdict: Verdict) -> None:
        from trainer.errors import WrongBytes
        from trainer.run.lines import wrong_sentence

        said = list[str]()
        for rank in verdict.wrong:
            facts = {"step": step, "rank": rank, "machine": answers[rank].machine, "where": "gradient"}
            facts |= {"tensor": "gradient", "since": self._good, "undecided": verdict.undecided}
            self._run.start.metrics.write("wrong_bytes", **facts)
            said.append(wrong_sentence({"kind": "wrong_bytes", **facts}))
        which = " Which of them is right cannot be told." if verdict.undecided and len(said) > 1 else ""
        reason = f"{'; '.join(said)}.{which}"
        self._run.checkpoints.doubt(self._good, reason)
        raise WrongBytes(f"{reason} The checkpoints since step {self._good} are in doubt.")


def _answer(run: Training, row: MicroBatch, step: int) -> RankAnswer:
    """Compute the row once. The counts of experts' visits stay as they are. Collective."""
    import torch

    from trainer.model.parts import is_experts
    from trainer.state.kept import placed_sum

    experts = [module for module in run.engine.model.modules() if is_experts(module)]
    visits = [module.visits for module in experts]
    torch.manual_seed(step)
    found = run.engine.gradients(row, GRADIENT_BYTES)
    for module, count in zip(experts, visits, strict=True):
        module.visits = count
    if not found:
        return RankAnswer((), ())
    sums = torch.stack([placed_sum(values.contiguous()) for values in found.values()])
    norms = torch.stack([values.double().norm() for values in found.values()])
    return RankAnswer(tuple(sums.tolist()), tuple(norms.tolist()))


def _kind(device: torch.device) -> str:
    """The devices that may be expected to compute the same bits have the same kind."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"


def _open(run: Training, _: Actions) -> Probe | None:
    every = part(run.start.config.train, ProbeSettings).probe_every
    return Probe(run, every) if every else None


SETTINGS = (ProbeSettings,)
ACTIONS = {"probe": ActionKind(_open)}
