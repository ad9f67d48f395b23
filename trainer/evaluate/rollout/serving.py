"""`capstan rollout`: vLLM servers answer, beside the run that learns from the answers."""

import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from trainer.base.find.locate import resolve_base
from trainer.config.objective import SERVE, RolloutSettings
from trainer.data.compile.prepare import locate
from trainer.data.dataset.chapters import give_up
from trainer.data.dataset.rollouts import is_committed
from trainer.errors import CapstanError, NotFound
from trainer.evaluate.request import Ask, Tell
from trainer.evaluate.rollout.making import Making
from trainer.evaluate.rollout.published import fetch, name_of, published
from trainer.evaluate.rollout.sampling import Drawn, Request
from trainer.evaluate.rollout.scoring import RewardFailed
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.run.folder import run_config
from trainer.run.records import newest_records
from trainer.servers.completions import CompletionsServer, Refused, again
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store

_AT_ONCE = 64  # requests to each server
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 60.0


def roll_out(ask: Ask, tell: Tell) -> dict[str, Any]:
    """Commit the chapters that the run lacks, until the run has all of them or has ended.

    Each chapter uses the newest adapter, if that is not too old.

    Raises:
        CapstanError: a server does not answer, or the reward gives nothing, after some attempts.
    """
    run = open_store(ask.run)
    config = run_config(run, ask.overrides)
    base = resolve_base(config.model)
    resolved = resolve(config, base)
    keys = locate(resolved.config, base)
    making = Making.of(resolved, run, keys["train"], keys.get("eval"))
    place = making.place
    rules, total = config.rollout, config.rollout.chapters(config.train.steps or 0)
    chapter, made, told = rules.chapter(oldest(run)), 0, 0.0
    with ExitStack() as stack:
        stack.callback(making.scoring.close)
        sampler = ServerSampler(place, Path(stack.enter_context(scratch_folder("rollout"))))
        stack.callback(sampler.forget)
        while chapter < total:
            if is_committed(place, chapter):
                chapter += 1
                continue
            answers = f"the answers of step {rules.first_step(chapter) + 1}"
            adapter, sampler.servers = _adapter_for(place, chapter, rules), _servers(rules, run)
            if adapter is None or not sampler.servers:
                if time.monotonic() - told > _SAY_SECONDS:
                    told = time.monotonic()
                    tell({"log": f"{answers} wait for a {'server' if adapter is not None else 'newer adapter'}"})
                    if has_finished(run):
                        break
                chapter = max(chapter, rules.chapter(oldest(run)))
                time.sleep(_LOOK_SECONDS)
                continue
            try:
                sampler.load(adapter)
            except NotFound:  # the run has gone on already
                continue
            began = time.monotonic()
            wanted = making.wanted(chapter)
            with giving_up(run):
                drawn = [sampler.sample(one.request) for one in wanted]
                made += making.commit(chapter, adapter, wanted, drawn, began)
            tell({"log": f"{answers} are there, by the adapter of step {adapter}"})
    return {"steps": min(rules.first_step(chapter), config.train.steps or 0), "made": made}


@contextmanager
def giving_up(run: Store) -> Iterator[None]:
    """Inside, errors that waiting cannot fix end the run, whose ranks wait for the answers.

    Such errors are a reward that fails, or a prompt that a server does not accept.
    """
    try:
        yield
    except (RewardFailed, Refused) as error:
        give_up(run, error)
        raise


def _servers(rules: RolloutSettings, run: Store) -> list[CompletionsServer]:
    """Return the servers of the settings, or those that start with the run, as far as they answer now."""
    urls = list(rules.engine)
    if rules.engine == SERVE:
        urls = list[str]()
        for entry in run.list(layout.SERVERS):
            with suppress(NotFound):  # it has just died
                urls.append(run.get(entry.key).decode())
    return [CompletionsServer.of_adapters("rollout.engine", url) for url in urls]


def _adapter_for(place: Store, chapter: int, rules: RolloutSettings) -> int | None:
    """Return the newest adapter, if it is new enough for the chapter.

    It may come from one of the chapter's own later steps, if the chapter was lost after the first of them.
    """
    first = rules.first_step(chapter)
    newest = next((update for update in reversed(published(place)) if update < first + rules.updates), None)
    return newest if newest is not None and newest >= first - rules.lag else None


def oldest(run: Store) -> int:
    """Return the step of the oldest checkpoint. Chapters before it may be gone."""
    return min(committed_steps(run), default=0)


def has_finished(run: Store) -> bool:
    return any(record["kind"] == "end" and record.get("outcome") == "finished" for record in newest_records(run))


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
        name = name_of(self.place, adapter, secrets.token_hex(4))
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
        with ThreadPoolExecutor(_AT_ONCE * len(self.servers)) as pool:
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
