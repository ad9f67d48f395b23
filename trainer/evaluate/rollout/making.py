"""Samples the answers of a step, and commits them as a chapter.

There are two samplers: the ranks themselves, or vLLM servers of the base. Each rank continues one text at a time with
the sharded model. A server gets the adapter first, then the prompts.

A chapter has the step's prompts in their order, a sampler's answers, their rewards and their advantages. A prompt is
everything before the last answer of a document; the reward gets that answer. If the objective has a judge, its server
also gives each token of an answer its own log-probability.
"""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.compile.inputs import as_trained
from trainer.data.compile.prepare import load_tokenizer
from trainer.data.dataset.chapters import Chapters, open_chapters, whole
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, ReadBlocks, open_dataset
from trainer.data.dataset.rollouts import Rollout, commit
from trainer.data.order.order import WINDOW_BLOCKS, EpochPlan, hash_key, nothing_visited, turns
from trainer.data.order.settings import Order, eval_order, train_order
from trainer.errors import CapstanError
from trainer.evaluate.generation import Opening, Sampling, continued
from trainer.evaluate.prompts import Prompter
from trainer.evaluate.rollout.published import fetch, served_name
from trainer.evaluate.rollout.rewards import Scoring
from trainer.evaluate.teach import check_tokenizer
from trainer.plan.resolve import Resolved
from trainer.run import layout
from trainer.servers import CompletionsServer, again
from trainer.state.zero.engine import Engine
from trainer.store.json_text import digest_of
from trainer.store.store import Store, open_run_store
from trainer.tuning.objective.rollouts import LearnsFromRollouts, rollout_identity

_ASKED_AT_ONCE = 64  # requests to each server


class Drawn(NamedTuple):
    """The tokens of an answer, and for each its log p by the sampler in nats, at temperature 1."""

    tokens: list[int]
    log_p: list[float]


class Request(NamedTuple):
    """The answers that a step needs.

    They are `answers` to each of the `prompts`, of at most `room` tokens each, drawn with `seed` and `temperature`. A
    token of `stops` ends one.
    """

    prompts: Sequence[Sequence[int]]
    answers: int
    room: Sequence[int]
    temperature: float
    seed: int
    stops: frozenset[int]


@dataclass(frozen=True)
class OwnSampler:
    """The model on these ranks. `begin` is called before each pass.

    The sampled answers do not depend on the number of ranks.
    """

    engine: Engine
    longest: int | None
    begin: Callable[[], None]

    def sample(self, request: Request) -> list[list[Drawn]]:
        """Return the answers to each prompt. Collective."""
        n = request.answers
        openings, rooms = list[Opening](), list[int]()
        for prompt, room in zip(request.prompts, request.room, strict=True):
            for _ in range(n):
                openings.append(
                    Opening(prompt, lambda written, room=room: written[-1] in request.stops or len(written) >= room)
                )
                rooms.append(room)
        noting = _Noting(max(rooms), request.temperature, seed=request.seed)
        written = continued(self.engine, openings, noting, longest=self.longest, begin=self.begin)
        noted = self.engine.ranks.gather_items(noting.log_p)
        drawn = [Drawn(tokens, noted[number]) for number, tokens in enumerate(written)]
        return [drawn[first : first + n] for first in range(0, len(drawn), n)]


@dataclass(frozen=True)
class _Noting(Sampling):
    """Sampling that records the log p of what it chooses, by the number of the text."""

    log_p: dict[int, list[float]] = field(default_factory=dict)

    def chooser(self, number: int) -> Callable[[Tensor], int]:
        choose, noted = super().chooser(number), self.log_p.setdefault(number, [])

        def note(logits: Tensor) -> int:
            token = choose(logits)
            noted.append(float(logits.log_softmax(-1)[token]))
            return token

        return note


@dataclass
class ServerSampler:
    """Servers of one base. Each has loaded the adapter that was loaded last.

    Servers with Capstan's plugin take the adapter from the store. The others find it below `folder`.
    """

    place: Store
    folder: Path
    servers: Sequence[CompletionsServer] = ()
    _name: str | None = None
    _loaded: int | None = None
    _having: frozenset[CompletionsServer] = frozenset()

    def load(self, adapter: int) -> None:
        """Have every server load the adapter of this update. Raises `NotFound` if it has been removed."""
        if self._loaded == adapter and self._having.issuperset(self.servers):
            return
        name = served_name(self.place, adapter, secrets.token_hex(4))
        lacking = [server for server in self.servers if not again(partial(server.has, name))]
        if lacking:
            fetch(self.place, adapter, self.folder / name)
        for server in lacking:
            again(partial(server.load, name, str(self.folder / name)))
        self.forget()
        self._name, self._loaded, self._having = name, adapter, frozenset(self.servers)

    def forget(self) -> None:
        """Have the servers drop the adapter. A server that has gone has none."""
        if self._name is not None:
            for server in self._having:
                with suppress(CapstanError):
                    server.unload(self._name)
            shutil.rmtree(self.folder / self._name, ignore_errors=True)
            self._name = self._loaded = None

    def sample(self, request: Request) -> list[list[Drawn]]:
        numbers = range(len(request.prompts))
        with ThreadPoolExecutor(_ASKED_AT_ONCE * len(self.servers)) as pool:
            return list(pool.map(partial(self._ask, request), numbers))

    def _ask(self, request: Request, number: int) -> list[Drawn]:
        """Ask one of the servers for the answers to the prompt of this number. Each attempt asks another server."""
        name, turns = self._name, islice(cycle(self.servers), number % len(self.servers), None)
        assert name is not None
        server = next(turns)

        def ask() -> list[tuple[list[int], list[float]]]:
            return server.sample(
                name,
                list(request.prompts[number]),
                n=request.answers,
                max_tokens=request.room[number],
                temperature=request.temperature,
                seed=(request.seed + number) % 2**31,
                stop_token_ids=sorted(request.stops),
            )

        def turn() -> None:
            nonlocal server
            server = next(turns)
            server.load(name, str(self.folder / name))  # a restarted server has no adapter

        return [Drawn(*one) for one in again(ask, between=turn)]


class Asked(NamedTuple):
    """A prompt, and the answer that the data has to it, by their tokens."""

    prompt: list[int]
    reference: list[int]


class Prompts:
    """The documents of `chapters` in the `order` of training, `batch` for each step.

    Which documents a step has depends on the number of the step alone.
    """

    def __init__(self, chapters: Chapters, order: Order, batch: int) -> None:
        self._chapters, self._order, self._batch = chapters, order, batch
        self._next, self._documents = 0, self._visited()
        self._blocks = lru_cache(maxsize=WINDOW_BLOCKS)(self._read)  # the blocks of a window are read again and again

    def of(self, step: int) -> list[Asked]:
        """Return the prompts of the update after `step`."""
        if step < self._next:
            self._next, self._documents = 0, self._visited()
        for _ in islice(self._documents, (step - self._next) * self._batch):
            pass
        self._next = step + 1
        return [_asked(self._tokens(*visit)) for visit in islice(self._documents, self._batch)]

    def _visited(self) -> Iterator[tuple[int, int]]:
        """Yield the chapter and the number in it of every visited document, without end."""
        for epoch in count():
            visited = False
            for turn, chapter in enumerate(turns(self._chapters.count, self._order.seed, epoch)):
                data = self._chapters.get(chapter)
                plan = EpochPlan(data.offsets, data.blocks, data.block_sources, self._order, epoch, turn)
                for window in range(plan.num_windows):
                    for document in plan.window(window).documents.tolist():
                        visited = True
                        yield chapter, document
            if not visited:
                raise nothing_visited(epoch, self._order)

    def _tokens(self, chapter: int, document: int) -> NDArray[np.uint32]:
        block = int(np.searchsorted(self._chapters.get(chapter).blocks, document, side="right")) - 1
        return self._blocks(chapter, block).gather(np.array([document]))

    def _read(self, chapter: int, block: int) -> ReadBlocks:
        return self._chapters.get(chapter).read(np.array([block]))


def _asked(stored: NDArray[np.uint32]) -> Asked:
    targets = np.flatnonzero(stored & TARGET_BIT)
    first = targets[np.flatnonzero(np.diff(targets, prepend=-2) > 1)[-1]]  # of the last answer
    ids = (stored & ID_BITS).tolist()
    return Asked(ids[: max(first, 1)], ids[max(first, 1) : targets[-1] + 1])


class Wanted(NamedTuple):
    """Prompts with the data's answers, and the request for new answers."""

    asked: Sequence[Asked]
    request: Request


class _Scored(NamedTuple):
    """The answers to each prompt by their tokens, `rewards` (prompts, answers), and a line to show for each."""

    drawn: list[Drawn]
    rewards: NDArray[np.float64]
    shown: list[dict[str, Any]]


def rollouts_of(resolved: Resolved, run: Store, dataset: str) -> Store:
    """Return the folder, inside the run's, of the answers to the prompts of this data set.

    A run that is begun anew with other settings finds no earlier answers.
    """
    config = resolved.config
    facts = {
        "dataset": dataset,
        "base": [resolved.base.fingerprint, config.quant.type, config.model.dtype],
        "adapter": resolved.method.identity,
        "objective": {**resolved.objective.identity, **rollout_identity(config, resolved.objective)},
        "batch": [config.run.seed, config.train.global_batch],
    }
    return run.sub(layout.rollouts(digest_of(facts)[:12]))


@dataclass(frozen=True)
class Making:
    """The parts of a run that its chapters are made of.

    `place` is the folder of the rollouts. `held_out` are prompts that are never trained on.
    """

    resolved: Resolved
    place: Store
    prompts: Prompts
    prompter: Prompter
    scoring: Scoring
    held_out: Sequence[Asked] = field(default=())
    judge: CompletionsServer | None = None

    @classmethod
    def of(cls, resolved: Resolved, run: Store, train: str, held_out: str | None) -> "Making":
        """Return the parts of the run in the folder `run`, whose prompts are in the data sets of these fingerprints."""
        store = open_run_store(resolved.config)
        config, rollout = resolved.config, resolved.config.rollout
        assert rollout.reward is not None
        prompter = Prompter(load_tokenizer(resolved.base), as_trained(config), resolved.base.directory)
        prompts = Prompts(open_chapters(store, train, run), train_order(config), config.train.global_batch)
        found: Sequence[Asked] = ()
        if rollout.held_out and held_out is not None:
            data = open_dataset(store, held_out)
            every = Prompts(whole(data), eval_order(config, data.manifest), min(rollout.held_out, len(data.lengths)))
            found = every.of(0)
        return cls(
            resolved,
            rollouts_of(resolved, run, train),
            prompts,
            prompter,
            Scoring(rollout.reward, rollout.reward_seconds, rollout.reward_python),
            found,
            judge_of(resolved, prompts.of(0)[0]),
        )

    def wanted(self, chapter: int) -> list[Wanted]:
        """Return the answers that the chapter needs.

        They answer its prompts and, if one of its steps is due for that, also the held-out prompts.
        """
        config, rollout = self.resolved.config, self.resolved.config.rollout
        every, seed = config.eval.every, int(hash_key(config.run.seed, chapter)) >> 33  # 31 bits
        trained = self._request(self.prompts.of(chapter), rollout.answers, rollout.temperature, seed)
        due = self.held_out and every and -rollout.first_step(chapter) % every < rollout.updates
        return [trained, *([self._request(self.held_out, 1, 0.0, seed)] if due else [])]

    def _request(self, asked: Sequence[Asked], answers: int, temperature: float, seed: int) -> Wanted:
        """Return a request for the answers to those prompts that leave any room."""
        config, longest = self.resolved.config, self.resolved.longest
        most = min(config.data.sequence_length, longest or config.data.sequence_length)
        rooms = [(one, min(config.rollout.max_tokens, most - len(one.prompt))) for one in asked]
        kept = [(one, room) for one, room in rooms if room > 0]
        stops, prompts = frozenset(self.prompter.stops), [one.prompt for one, _ in kept]
        request = Request(prompts, answers, [room for _, room in kept], temperature, seed, stops)
        return Wanted([one for one, _ in kept], request)

    def commit(
        self,
        chapter: int,
        adapter: int,
        wanted: Sequence[Wanted],
        drawn: Sequence[Sequence[Sequence[Drawn]]],
        began: float,
    ) -> bool:
        """Reward the answers of the adapter of the update `adapter`, and make them the chapter of this number.

        Returns False if another process was faster. `began` is the time at which sampling began, by `time.monotonic`.
        """
        objective = self.resolved.objective
        assert isinstance(objective, LearnsFromRollouts)
        sampled = time.monotonic()
        scored, *held_out = [self._scored(*both) for both in zip(wanted, drawn, strict=True)]
        prompts = [one.prompt for one in wanted[0].asked for _ in range(wanted[0].request.answers)]
        gaps = judged_gaps(self.judge, prompts, scored.drawn) if self.judge else None
        advantages = objective.advantages(scored.rewards, gaps)
        rollouts = [
            Rollout(prompt, one.tokens, one.log_p, advantage, shown)
            for prompt, one, advantage, shown in zip(prompts, scored.drawn, advantages, scored.shown, strict=True)
        ]
        figures: dict[str, Any] = {
            "adapter": adapter,
            "reward": float(scored.rewards.mean()),
            "reward_spread": float(scored.rewards.std(axis=1).mean()),
            "answer_tokens": float(np.mean([len(one.tokens) for one in scored.drawn])),
            "cut": float(np.mean([shown["cut"] for shown in scored.shown])),
            **({"divergence": -float(np.mean([gap for one in gaps for gap in one]))} if gaps else {}),
            **({"held_out_reward": float(held_out[0].rewards.mean())} if held_out else {}),
            "sampling_seconds": round(sampled - began, 3),
            "reward_seconds": round(time.monotonic() - sampled, 3),
        }
        return commit(self.place, chapter, rollouts, figures)

    def _scored(self, wanted: Wanted, drawn: Sequence[Sequence[Drawn]]) -> _Scored:
        text, n = self.prompter.text, wanted.request.answers
        every = [one for answers in drawn for one in answers]
        prompts, references = (
            [text(tokens) for one in wanted.asked for tokens in [one[side]] * n] for side in range(2)
        )
        said = [text(one.tokens) for one in every]
        rewards = self.scoring.rewards(prompts, said, references)
        cut = [one.tokens[-1] not in wanted.request.stops for one in every]
        rows = zip(prompts, said, references, rewards, cut, strict=True)
        names = ("prompt", "answer", "reference", "reward", "cut")
        return _Scored(every, np.array(rewards).reshape(-1, n), [dict(zip(names, row, strict=True)) for row in rows])


_JUDGED_AT_ONCE = 16


def judged_gaps(
    judge: CompletionsServer, prompts: Sequence[Sequence[int]], answers: Sequence[Drawn]
) -> list[list[float]]:
    """Return the judge's log p of each token of each answer minus the sampler's, in nats.

    Raises `CapstanError` if the judge gives none after some attempts.
    """

    def of_answer(prompt: Sequence[int], answer: Drawn) -> list[float]:
        found = again(partial(judge.ask, [*prompt, *answer.tokens], 1)).log_p[len(prompt) - 1 :]
        return [theirs - ours for theirs, ours in zip(found, answer.log_p, strict=True)]

    with ThreadPoolExecutor(_JUDGED_AT_ONCE) as pool:
        return list(pool.map(of_answer, prompts, answers))


def judge_of(resolved: Resolved, asked: Asked) -> CompletionsServer | None:
    """Return the teacher that judges for the run's objective, if that is a server. Then no rank has it in memory.

    `asked` is a prompt that shows which tokenizer it has.

    Raises:
        ConfigError: nothing answers there, or it has another tokenizer.
    """
    objective = resolved.objective
    assert isinstance(objective, LearnsFromRollouts)
    if objective.judge is None or not objective.judge.is_server:
        return None
    server = CompletionsServer.find(objective.judge.setting, objective.judge.name)
    check_tokenizer(server, resolved.base, [*asked.prompt, *asked.reference])
    return server
