"""The models that are evaluated: a run's, sharded over the ranks as it was trained, and one that a server has.

A run's model is first its base, then one of its checkpoints. A program that knows no ranks, such as
lm-evaluation-harness, asks `SharedModel`, where rank 0 asks for all, or `ServedModel` for likelihoods and answers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

from trainer.base.base import Base, Tokenizer
from trainer.base.find.locate import resolve_base_alike
from trainer.config import Config, Data, override
from trainer.data.compile.inputs import as_trained
from trainer.data.compile.prepare import load_tokenizer
from trainer.errors import ConfigError, Damaged, NotFound, StorageError
from trainer.evaluate.generation import Opening, Sampling, continued
from trainer.evaluate.losses import Continued, Likelihood, likelihoods
from trainer.evaluate.prompts import Prompter
from trainer.export.trained import (
    check_overrides,
    check_trained_base,
    check_trained_shapes,
    trained_config,
    with_trained_template,
    with_trained_tokenizer,
)
from trainer.plan.assemble import assemble, attention_of, check_same_base, choose_sharding, join_run
from trainer.plan.resolve import Resolved, resolve
from trainer.processes.ranks import Team
from trainer.run.folder import run_config
from trainer.servers import CompletionsServer, Pictured
from trainer.state.checkpoint.checkpoints import load_partitions
from trainer.state.checkpoint.manifest import CheckpointManifest, readable_manifests, whole_checkpoint
from trainer.state.optimizer import MASTER
from trainer.state.zero.engine import Engine
from trainer.store.store import Store, open_run_store

Log = Callable[[str], None]


class Words:
    """How a run's texts become tokens; read when first asked for.

    `data` are the settings with which the rows were read.
    """

    def __init__(self, base: Base, data: Data) -> None:
        self.base, self.data = base, data

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.base)

    @cached_property
    def prompter(self) -> Prompter:
        return Prompter(self.tokenizer, self.data, self.base.directory)


@dataclass(frozen=True)
class OpenedRun:
    """A run on this rank.

    Until `load`, its model is the base with the learning part as it was attached. Without a `manifest` there is nothing
    to load.
    """

    run: Store
    resolved: Resolved
    manifest: CheckpointManifest | None
    ranks: Team
    engine: Engine
    words: Words
    keeps: bool = True
    """Whether a text that grows may keep keys and values; see `trainer.evaluate.generation.GrowingText`."""

    @contextmanager
    def as_base(self) -> Iterator["OpenedRun"]:
        """Inside, the model computes as its base. If the base itself learns, this holds only before `load`."""
        method = self.resolved.method
        with nullcontext() if method.trains_base else method.switched_off(self.engine.model):
            yield replace(self, keeps=not self.reserved)

    def load(self, *, or_newer: bool = False) -> CheckpointManifest:
        """Load what the checkpoint has learnt into the model. Returns its manifest. Collective.

        A run in training may have removed the checkpoint since (`checkpoint.keep_last`). On request the newest whole
        checkpoint then takes its place.

        Raises, on every rank:
            StorageError: it cannot be read.
        """
        assert self.manifest is not None
        manifest, partitions = self.manifest, self.engine.partitions()
        while True:
            try:
                self.ranks.together(
                    lambda found=manifest: load_partitions(self.run, found, partitions, states=(MASTER,))
                )
            except (NotFound, Damaged) as error:
                newer = self.ranks.on_first(lambda: whole_checkpoint(self.run)) if or_newer else manifest
                if newer.step == manifest.step or not _same_model(newer, manifest):
                    raise StorageError(f"the checkpoint of step {manifest.step} is gone: {error}") from error
                manifest = newer
            else:
                self.engine.refresh(manifest.updates)
                return manifest

    @property
    def store(self) -> Store:
        return open_run_store(self.resolved.config)

    @property
    def reserved(self) -> int:
        """The positions of a row before each text that virtual tokens take."""
        return self.resolved.method.virtual.reserved


def _same_model(one: CheckpointManifest, other: CheckpointManifest) -> bool:
    """Return whether one can replace the other in a model that is already loaded."""
    return (one.base, one.adapter, one.shapes) == (other.base, other.adapter, other.shapes)


def settings_of(
    folder: Store, step: int | None, overrides: Sequence[str], *, base_alone: bool
) -> tuple[Config, CheckpointManifest | None]:
    """Return the settings that the checkpoint of `step`, or the newest whole one, was trained with, and its manifest.

    For the base alone they are the settings of the run's folder, over the base that the run has had. `overrides` may
    change what does not belong to the checkpoint.

    Raises:
        NothingToResume, ConfigError, StorageError: as `whole_checkpoint`, `trained_config` and `check_overrides`.
    """
    if base_alone:
        kept = None if _names_model(overrides) else next(readable_manifests(folder, []), None)
        return (override(trained_config(folder, kept), *overrides) if kept else run_config(folder, overrides)), None
    manifest = whole_checkpoint(folder, step)
    trained = trained_config(folder, manifest)
    config = override(trained, *overrides)
    check_overrides(override(trained), config, manifest)
    return config, manifest


def open_model(folder: Store, step: int | None, overrides: Sequence[str], *, base_alone: bool, log: Log) -> OpenedRun:
    """Load the run's base and attach its method, on every rank of this process's group. Collective.

    `log` gets rank 0's progress.

    Raises:
        CapstanError: on every rank alike.
    """
    if any(change.startswith("sharding.sequence_parallel=") for change in overrides):
        raise ConfigError(
            "sharding.sequence_parallel: an evaluation computes each row on one rank, so this would have no effect."
            " Remove it."
        )
    ranks = join_run(_whole_rows(run_config(folder, overrides)))
    config, manifest = ranks.on_first(lambda: settings_of(folder, step, overrides, base_alone=base_alone))
    config = _whole_rows(config)
    base = resolve_base_alike(config.model, ranks)
    with ranks.agreeing():
        config, base = as_it_read(folder, config, base, manifest)
        resolved = resolve(config, base)
        if manifest is not None:
            check_trained_shapes(resolved.method, config.model, manifest)
    check_same_base(base, ranks.world)
    ranks.on_first(lambda: _check_base(folder, base, manifest, overrides))
    attention = attention_of(resolved, ranks.device)
    engine, _ = assemble(resolved, ranks, attention, choose_sharding(resolved, ranks, accumulation=1), log)
    form = ranks.on_first(lambda: as_trained(config)).format
    words = Words(base, config.data.model_copy(update={"format": form}))
    return OpenedRun(folder, resolved, manifest, ranks, engine, words)


def as_it_read(folder: Store, config: Config, base: Base, manifest: CheckpointManifest | None) -> tuple[Config, Base]:
    """Return the settings and the base with the checkpoint's template and tokenizer, in the cache of this machine."""
    if manifest is None:
        return config, base
    data = with_trained_template(folder, config.data, manifest)
    return config.model_copy(update={"data": data}), with_trained_tokenizer(folder, base, manifest)


def _whole_rows(config: Config) -> Config:
    """Return the settings without ranks that share rows."""
    return config.model_copy(update={"sharding": config.sharding.model_copy(update={"sequence_parallel": 1})})


def _check_base(folder: Store, base: Base, manifest: CheckpointManifest | None, overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for another base than the checkpoint's, unless another base is asked for.

    Without a checkpoint the base must be the run's.
    """
    if manifest is None and not _names_model(overrides):
        manifest = next(readable_manifests(folder, []), None)
    if manifest is not None:
        check_trained_base(base, manifest)


def _names_model(overrides: Sequence[str]) -> bool:
    return any(override.startswith("model") for override in overrides)


T = TypeVar("T")
Told = Callable[[int], None]


class PassFailed(BaseException):
    """A pass of all ranks failed on this one, so this rank must end: the others wait inside that pass.

    The parent process of the ranks then ends them. This class is no `Exception`, so no program that asks the model can
    catch it.
    """


class OpenText(NamedTuple):
    """The tokens of a text to continue, until one of the strings in `until` is written, or the text ends."""

    tokens: Sequence[int]
    until: Sequence[str] = ()


class SharedModel:
    """The model of `opened`. At any moment it computes either as its base or as itself."""

    def __init__(self, opened: OpenedRun) -> None:
        self._opened = opened

    def serve(self, ask: Callable[["SharedModel"], T]) -> T | None:
        """Run `ask` on rank 0, which alone gets its result, while the others help. Collective.

        What it raises is raised on all ranks, except for `PassFailed`.
        """
        ranks, result, failure = self._opened.ranks, None, None
        if ranks.rank == 0:
            try:
                result = ask(self)
            except Exception as error:
                failure = error
            ranks.broadcast(None)
        else:
            while (asked := ranks.broadcast(None)) is not None:
                job, given = asked
                job(self._opened, *given, told=lambda _done: None)
        ranks.agree(failure)
        return result

    def likelihoods(self, texts: Sequence[Continued], told: Told) -> list[Likelihood]:
        """Return the likelihoods. Call this on rank 0, inside `serve`."""
        return self._on_all(likelihoods_by, list(texts), told=told) if texts else []

    def continued(self, texts: Sequence[OpenText], sampling: Sampling, told: Told) -> list[list[int]]:
        """Return the tokens written after each text. Call this on rank 0, inside `serve`."""
        return self._on_all(_continued_by, list(texts), sampling, told=told) if texts else []

    def _on_all(self, job: Callable[..., Any], *given: Any, told: Told) -> Any:
        """Return the result of `job`, a function of this module that every rank calls. The job travels by its name."""
        self._opened.ranks.broadcast((job, given))
        try:
            return job(self._opened, *given, told=told)
        except Exception as error:
            raise PassFailed(f"{type(error).__name__}: {error}") from error


def likelihoods_by(opened: OpenedRun, texts: Sequence[Continued], *, told: Told) -> list[Likelihood]:
    """Return the likelihoods of all texts, in rows as long as those that the run trains on. Collective."""
    capacity = opened.resolved.config.data.sequence_length
    return likelihoods(opened.engine, texts, capacity, reserved=opened.reserved, told=told)


def _continued_by(opened: OpenedRun, texts: Sequence[OpenText], sampling: Sampling, *, told: Told) -> list[list[int]]:
    prompter, done = opened.words.prompter, set[int]()

    def count(number: int, _token: int) -> None:
        done.add(number)
        told(len(done) * opened.ranks.world_size)

    def ended(until: Sequence[str], written: Sequence[int]) -> bool:
        return prompter.ended(written) or any(end in prompter.text(written) for end in until)

    openings = [Opening(text.tokens, partial(ended, text.until)) for text in texts]
    return continued(opened.engine, openings, sampling, keeps=opened.keeps, longest=opened.resolved.longest, told=count)


_AT_ONCE = 32

G = TypeVar("G")
R = TypeVar("R")


@dataclass(frozen=True)
class ServedModel:
    """The model of `server`, with many requests at a time. A token of `stops` ends an answer."""

    server: CompletionsServer
    stops: Sequence[int]

    def likelihoods(self, texts: Sequence[Continued], told: Told) -> list[Likelihood]:
        return self.each(self._likelihood, texts, told)

    def continued(self, texts: Sequence[OpenText], sampling: Sampling, told: Told) -> list[list[int]]:
        """Return the tokens written after each text."""
        asked = [(list(text.tokens), text.until) for text in texts]
        return self.each(partial(self._continued, sampling, lambda number, token: None), enumerate(asked), told)

    def written(
        self, prompts: Sequence[list[int] | Pictured], sampling: Sampling, told: Callable[[int, int], None]
    ) -> list[list[int]]:
        """Return the tokens of the answer to each prompt. `told` gets the number of a prompt and each token when it
        comes."""
        asked = [(prompt, ()) for prompt in prompts]
        return self.each(partial(self._continued, sampling, told), enumerate(asked), lambda done: None)

    def each(self, ask: Callable[[G], R], given: Iterable[G], told: Told) -> list[R]:
        """Return the server's answers to all, in their order. Raises `CapstanError` if it gives none."""
        found = list[R]()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for answer in pool.map(ask, given):
                    found.append(answer)
                    told(len(found))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return found

    def _likelihood(self, text: Continued) -> Likelihood:
        ranked = self.server.ranked(list(text.tokens))[max(1, text.first) - 1 :]
        return Likelihood(sum(log_p for log_p, _ in ranked), all(first for _, first in ranked))

    def _continued(
        self,
        sampling: Sampling,
        told: Callable[[int, int], None],
        numbered: tuple[int, tuple[list[int] | Pictured, Sequence[str]]],
    ) -> list[int]:
        number, (prompt, until) = numbered
        answer = list[int]()
        parts = self.server.written(
            self.server.model,
            prompt,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=(sampling.seed + number) % 2**31,
            stop=list(until),
            stop_token_ids=sorted(self.stops),
        )
        for part in parts:
            answer += part
            for token in part:
                told(number, token)
        return answer
