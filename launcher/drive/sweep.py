"""The process that owns a sweep: it lays the trials out, has Ray Tune run them, and ends with the sweep's exit code.

tune.py has what Ray Tune is given. The folders of the trials are the truth. Tune's own storage is a scratch folder. A
sweep that goes on, after a stop or after the death of this process, asks each trial's folder whether it is over. It
then tells Tune the figures of finished trials again, and resumes the others.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from launcher.cluster.ray.cluster import address_of, check_ray, fitting_ranks, joined_ray, local_ray, need
from launcher.drive.driver import beside_main_thread, forget_own_stop, stop_on_signals
from launcher.drive.local import check_local_device
from launcher.drive.tune import base_facts
from launcher.policy.trials import Candidate, End, SearchPlan, Turns, base_key, planned, trial_config, trial_in_words
from launcher.report.report import keep_report
from launcher.start.check import anchored, check, check_idle, typed_elsewhere
from launcher.start.claim import keep_code
from launcher.view.status import read_status
from launcher.view.sweep import (
    BY,
    DONE,
    EARLY,
    OVER,
    SweepStatus,
    is_sweep,
    read_plan,
    read_sweep,
    trial_state,
    watch_sweep,
)
from trainer.base.base import Base
from trainer.base.find.locate import base_files, describe_base, resolve_base
from trainer.base.load.cache import MANIFEST as BASE_MANIFEST
from trainer.base.load.cache import cache_key
from trainer.config import Config, Model, dump_config, override
from trainer.data.compile.fingerprint import hash_tokens
from trainer.data.compile.prepare import locate
from trainer.data.dataset.manifest import MANIFEST as DATA_MANIFEST
from trainer.errors import CapstanError, ConfigError, Stopped, Superseded, first_line
from trainer.evaluate.rollout.rewards import check_reward
from trainer.plan.beginning import is_asked_for, starting_at, with_known_start
from trainer.plan.resolve import typed
from trainer.processes.helper_thread import helper_thread
from trainer.run import layout
from trainer.run.background import Every
from trainer.run.folder import changes, command, keep_as_own, run_config, run_folder
from trainer.run.owner import Ownership, newest_number, take
from trainer.run.requests import request_stop, stop_requester
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_run_store

_LOOK_SECONDS = 2.0
_MAY_CHANGE = ("sweep.", "cluster.", "track.", "retry.", "timeouts.")
"""Sections that decide nothing of how good a trial gets; `laid_out` compares what is tried by itself."""
_TOKENIZERS = (
    "model.base",
    "model.revision",
    "model.add_tokens",
    "model.special_tokens.eos",
    "model.special_tokens.bos",
)
"""Settings that may change the tokenizer."""
_TRIAL_BYTES = 2**20
"""A process of Tune's must ask for something, and this much host memory is everywhere."""


def laid_out(config: Config, *, resume: bool) -> tuple[Config, SearchPlan]:
    """Return the configuration that the trials vary, and the trials.

    Everything that can be refused before a trial starts is refused here.

    Raises:
        ConfigError: a trial's settings are not allowed, a name is taken, or with `resume` the search is another than it
            was.
    """
    folder = run_folder(config)
    config = _from_one_start(anchored(_sharing_base(config)), folder, resume=resume)
    plan = planned(config)
    if resume:
        before = read_plan(folder)
        plan.bases.update(before.bases)
        if (plan.metric, plan.trials[: len(before.trials)]) != (before.metric, before.trials):
            raise ConfigError(
                f"sweep: {folder.uri} has tried other values, and its search does not change. More sweep.samples are"
                " allowed; start another search under another run.name."
            )
        _check_shared(run_config(folder), config, folder.uri)
    elif is_sweep(folder) or folder.exists(layout.CONFIG):
        which = "a sweep" if is_sweep(folder) else "a run"
        raise ConfigError(
            f"run.name: {folder.uri} is {which} already. {command('resume', folder)} continues it; a new sweep needs"
            " another name."
        )
    for trial in plan.trials:
        own = trial_config(config, trial)
        if not (resume and run_folder(own).exists(layout.CONFIG)):
            try:
                tried = plan.config_of(config, trial)
                base = check(tried, resume=False).base
                if address_of(config) is None:
                    check_reward(tried.rollout)
            except ConfigError as error:
                raise ConfigError(f"trial {trial.number} ({trial_in_words(trial.settings)}): {error}") from error
            if (key := base_key(own.model)) not in plan.bases:
                plan.bases[key] = base_facts(base)
    _check_tokenizers(config, plan)
    return config, plan


def _from_one_start(config: Config, folder: Store, *, resume: bool) -> Config:
    """Return `config` whose trials, those of a resume too, begin from one checkpoint of the run in `tuning.start`."""
    if not (resume and is_sweep(folder)):
        return with_known_start(config)
    kept = run_config(folder).tuning.start
    return starting_at(config, kept) if kept and is_asked_for(kept, config.tuning.start) else config


def _check_tokenizers(config: Config, plan: SearchPlan) -> None:
    """Raise `ConfigError` if trials cut the same text into different tokens: means over these do not compare."""
    tried = [name for name in _TOKENIZERS if name in config.sweep.settings]
    seen = dict[str, int]()
    for trial in plan.trials if tried else ():
        model = plan.config_of(config, trial).model
        key = json.dumps(hash_tokens(base_files(model), model), sort_keys=True)
        if len(seen | {key: trial.number}) > 1:
            raise ConfigError(
                f"sweep.settings: {tried[0]!r} gives trials {next(iter(seen.values()))} and {trial.number} different"
                f" tokenizers, so their {plan.metric.name} is a mean over different tokens. Try bases with the same"
                " tokenizer, or each by a sweep of its own."
            )
        seen.setdefault(key, trial.number)


def _check_shared(before: Config, now: Config, uri: str) -> None:
    """Raise `ConfigError` if trials to come would differ from earlier ones in more than the settings that are tried."""
    for change in changes(before.model_dump(mode="json"), now.model_dump(mode="json")):
        if not change.setting.startswith(_MAY_CHANGE):
            raise ConfigError(
                f"{change.setting}: {change.new!r} would set later trials of {uri} apart from those before, which had"
                f" {change.old!r}. On a resume only settings of {', '.join(name.rstrip('.') for name in _MAY_CHANGE)}"
                " change; start another sweep under another run.name."
            )


def _sharing_base(config: Config) -> Config:
    """Return `config` with quant.cache, so that one trial quantizes the base for all.

    It stays as it is if the configuration decides that itself or has no base to cache.
    """
    if "cache" in config.quant.model_fields_set or not config.quant.held.quantizes:
        return config
    base = describe_base(config.model)
    config = config.decided(base.in_4_bits)
    if not config.quant.held.quantizes:
        return config
    shared = override(config, "quant.cache=true")
    return config if base.mismatches(shared) else shared


def run_sweep(config: Config, *, resume: bool, take_over: bool, live: bool, log: Callable[[str], None]) -> SweepStatus:
    """Start the sweep of `config`, or continue it, and return when all its trials are over.

    Raises:
        CapstanError: with the exit code that the process should end with; `Stopped` when the sweep can go on.
    """
    check_ray("capstan sweep")
    if address_of(config) is None:
        check_local_device(config)
        config = typed(config, describe_base(config.model))
    else:
        config = typed_elsewhere(config, log)
    config, plan = laid_out(config, resume=resume)
    folder = run_folder(config)
    with _taken(config, plan, resume=resume, take_over=take_over, log=log) as owner, stop_on_signals(owner):
        search = _Search(config, plan, owner)
        with helper_thread(lambda done: watch_sweep(folder, done.wait, live, log), "live", patience=10):
            beside_main_thread(search.run)
    who = stop_requester(folder)
    forget_own_stop(folder)
    status = read_sweep(folder)
    folder.put(layout.SWEEP, json.dumps({**plan.to_json(), "result": asdict(status)}, indent=1).encode())
    keep_report(folder, log)
    if all(trial.state == "failed" for trial in status.trials):
        error = CapstanError(f"all {len(plan.trials)} trials failed, the first with: {status.trials[0].reason}")
        error.exit_code = search.ends[1].exit_code if 1 in search.ends else error.exit_code
        raise error
    if status.state != "finished":
        raise _unfinished(status, search, who, command("resume", folder))
    return status


def _unfinished(status: SweepStatus, search: "_Search", who: str | None, resume: str) -> Stopped:
    left = [trial for trial in status.trials if trial.state not in OVER]
    over = f"{len(status.trials) - len(left)} of {len(status.trials)} trials are over"
    if who:
        return Stopped(f"stopped by {who}; {over}. {resume} goes on with the others.")
    ended = [f"{trial.run}: {search.ends[trial.number].reason}" for trial in left if trial.number in search.ends]
    return Stopped(f"{over}. {resume} goes on with the others. The first of them: {next(iter(ended), left[0].run)}")


@contextmanager
def _taken(
    config: Config, plan: SearchPlan, *, resume: bool, take_over: bool, log: Callable[[str], None]
) -> Iterator[Ownership]:
    """Take the sweep's folder for the body, with the configuration, the trials and the code in it."""
    folder, code = run_folder(config), keep_code(log)
    number = newest_number(folder)
    if not take_over:
        check_idle(folder, resume=resume)
    owner = take(folder, BY, number)
    try:
        text = dump_config(config).encode()
        keep_as_own(text)
        folder.put(layout.CONFIG, text)
        folder.put(layout.SWEEP, json.dumps(plan.to_json(), indent=1).encode())
        if code is not None:
            folder.put(layout.SNAPSHOT, code.archive(dump_config(config)))
        folder.delete(layout.STOP)
        with owner.kept_fresh():
            yield owner
    finally:
        if not owner.lost:
            owner.end()


class _Search:
    """The trials of a plan under Ray Tune, in this process. `ends` are the ends of those that had their turn."""

    def __init__(self, config: Config, plan: SearchPlan, owner: Ownership) -> None:
        self._config, self._owner, self._folder = config, owner, owner.run
        self._mode = plan.metric.mode
        self._configs = {trial.number: plan.config_of(config, trial) for trial in plan.trials}
        self._store = open_run_store(config)
        self._made, self._closed = set[str](), False
        self._bases = dict[str, Base]()
        self._early: dict[int, str] = {}
        self.ends: dict[int, End] = {}

    def run(self) -> None:
        """Run the trials. Returns when they are over, or when all that train have been stopped.

        Raises:
            CapstanError: the cluster cannot be joined, or Tune fails.
        """
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints to stdout even when it is told to be silent
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the records of the runs are the only history
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial's last result has no metric
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = address_of(self._config)
        with joined_ray(address) if address else local_ray(self._config.cluster.most_workers or 1):
            self._tune()

    def _tune(self) -> None:
        from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, TuneError, Tuner, with_resources

        from launcher.drive.tune import EarlyStopping, Queue, TuneTrial

        turns = Turns([self._candidate(number) for number in self._configs], self._is_made, self._room)
        queue = Queue(turns, self._folder.uri, lambda: self._closed)
        look = Every(_LOOK_SECONDS, lambda: self._look([*turns.running.values()]), "looking after the sweep")

        def stop_early(settings: Any, step: int) -> None:
            self._early[settings["trial"]] = f"early, as other trials of the sweep were better at step {step}"
            look.now()  # in its thread, which tries again if the store does not answer

        rules = self._config.sweep
        try:
            with scratch_folder("ray") as storage:
                Tuner(
                    with_resources(TuneTrial, {"memory": _TRIAL_BYTES}),
                    tune_config=TuneConfig(
                        search_alg=queue,
                        scheduler=EarlyStopping(rules, self._mode, stop_early) if rules.grace_steps else None,
                        num_samples=len(self._configs),
                        reuse_actors=True,
                    ),
                    run_config=RunConfig(
                        name=self._config.run.name,
                        storage_path=storage,
                        verbose=0,
                        checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                        failure_config=FailureConfig(max_failures=self._config.retry.failures),
                    ),
                ).fit()
        except TuneError as error:
            raise CapstanError(f"Ray Tune failed: {first_line(error)}.") from error
        finally:
            look.stop()
            self.ends = queue.ends
        self._owner.check()

    def _candidate(self, number: int) -> Candidate:
        config = self._configs[number]
        run = run_folder(config)
        done = trial_state(run, read_status(run)) in DONE
        return Candidate(number, frozenset() if done else frozenset(self._makes(config)), done)

    def _makes(self, config: Config) -> Iterator[str]:
        """Yield the keys of the manifests of everything that the trial's run makes unless it is in the store."""
        base = self._found(config.model)
        for fingerprint in locate(config, base).values():
            yield f"{layout.dataset(fingerprint)}{DATA_MANIFEST}"
        if config.quant.cache:
            yield f"{cache_key(base, config)}/{BASE_MANIFEST}"

    def _found(self, model: Model) -> Base:
        """Find the base once for all its trials, because samples of its weights are read."""
        key = model.model_dump_json()
        if key not in self._bases:
            self._bases[key] = resolve_base(model)
        return self._bases[key]

    def _is_made(self, key: str) -> bool:
        if key not in self._made and self._store.exists(key):
            self._made.add(key)
        return key in self._made

    def _room(self, number: int) -> int:
        """Return how many trials like this one the cluster can train at once, as it is now.

        One trial always counts: it waits, and says for what.
        """
        import ray

        wanted = need(self._configs[number])
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        found = max(1, fitting_ranks(nodes, wanted.each) // wanted.fewest)
        return min(found, self._config.sweep.concurrent or found)

    def _look(self, running: list[Candidate]) -> None:
        """Pass on the stop requests to trials.

        A trial that was just starting gets the request again, because it takes back requests from before its start.
        """
        with suppress(Superseded):
            self._owner.check()
            stopping = stop_requester(self._folder) is not None
            for trial in running:
                run, early = run_folder(self._configs[trial.number]), self._early.get(trial.number)
                if trial.done or not (early or stopping) or run.exists(layout.STOP):
                    continue
                by, reason = (EARLY, early) if early else (BY, "with its sweep")
                request_stop(run, by, reason)
            if not stopping:
                return
        self._closed = True  # also when another start has the sweep now, and with it the trials
