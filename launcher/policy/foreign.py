"""The rule for a run that is not this user's own (trainer/run/folder.py).

Reading such a run executes no code that its config.yaml names, and reads no file, bucket or data set that it names. The
reader may name these themselves, or trust the run. docs/credentials.md tells users what holds, and what does not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.data.render.chat_template import is_jinja
from trainer.errors import ConfigError, NotFound, few, shown
from trainer.run import layout
from trainer.run.folder import is_own, keep_as_own
from trainer.store.store import Store
from trainer.tuning.objective.rollouts import REWARDS

Named = Iterator[tuple[str, Any]]
"""Settings that name something, and their values."""


def evaluated_settings(config: Config) -> Named:
    """The settings that an evaluation compiles into the store, and those that name the code of its tasks."""
    yield from _text(config)
    reached = partial(_reached, config)
    yield "data.eval", _all(reached, (source.path for source in config.data.eval))
    if config.data.held_out:
        yield "data.train", _all(reached, (source.path for source in config.data.train))
    yield from ((f"eval.sets.{name}.path", reached(of.path)) for name, of in config.eval.sets.items())
    yield "eval.tasks", config.eval.tasks
    yield "eval.bias", config.eval.bias


def generated(config: Config) -> Named:
    yield from _text(config)
    yield "eval.prompts", config.eval.prompts
    yield "data.images.root", config.data.images.root


def exported(config: Config) -> Named:
    yield from _template(config)


def started(config: Config) -> Named:
    """The settings that a start reads on this machine, and those that it runs here and on the cluster's machines."""
    slurm, rollout = config.cluster.slurm, config.rollout
    yield from _text(config)
    yield "data.train", _all(_local, (source.path for source in config.data.train))
    yield "data.eval", _all(_local, (source.path for source in config.data.eval))
    yield from ((f"eval.sets.{name}.path", _local(of.path)) for name, of in config.eval.sets.items())
    yield "eval.prompts", config.eval.prompts
    yield "tuning.start", _local(config.tuning.start)
    yield "objective.teacher", _local(config.objective.teacher)
    yield "rollout.reward", None if rollout.reward in REWARDS else rollout.reward
    yield "rollout.reward_python", rollout.reward_python
    yield from _changed("rollout.serve", rollout.serve, "command", "options", "base")
    yield from _changed("cluster.slurm", slurm, "setup", "container", "python", "extra", "output", "local_dir")
    yield "cluster.ray.runtime_env", config.cluster.ray.runtime_env


def check_own(
    folder: Store, config: Config, uses: Callable[[Config], Named], overrides: Sequence[str], *, trust: bool
) -> None:
    """Raise `ConfigError` if `config` names something that the verb `uses` and the run is not this user's own.

    `config` is that of the run in `folder` with the reader's `overrides`. Names that the reader gives themselves are
    allowed, and so is a run that they `trust`. A trusted run is the reader's own from then on, until somebody changes
    its config.yaml.
    """
    try:
        if trust:
            keep_as_own(folder.get(layout.CONFIG))
            return
        if is_own(folder):
            return
    except NotFound:  # whoever reads it says so
        return
    given = {override.partition("=")[0] for override in overrides}
    theirs = [(name, value) for name, value in uses(config) if value and not _names(given, name)]
    if theirs:
        named = few([f"{name}: {shown(value)}" for name, value in theirs])
        raise ConfigError(
            f"{folder.uri}: you have not started this run with its config.yaml as it is now, so it counts as somebody"
            f" else's, and this would be read, run or kept in its store as you: {named}. Name your own"
            f" ({theirs[0][0]}=...), or give --trust-run once you have read that config.yaml."
        )


def _names(given: set[str], name: str) -> bool:
    """Return whether the reader has given the setting `name`, or the section that it is in."""
    return any(name == setting or name.startswith(f"{setting}.") for setting in given)


def _text(config: Config) -> Named:
    yield from _template(config)
    yield "sharding.deepspeed", _local(config.sharding.deepspeed)
    yield "quant.cache", config.quant.cache  # a copy of the base, which may be the reader's own, in the store


def _template(config: Config) -> Named:
    template = config.data.template
    yield "data.template", None if template and is_jinja(template) else _local(template)


def _all(which: Callable[[str], str | None], paths: Iterable[str]) -> list[str]:
    return [path for path in paths if which(path)]


def _changed(section: str, settings: Any, *names: str) -> Named:
    """Yield the settings that do not have their defaults."""
    for name in names:
        value = getattr(settings, name)
        if value != type(settings).model_fields[name].get_default(call_default_factory=True):
            yield f"{section}.{name}", value


def _local(value: str | None) -> str | None:
    """Return `value` if it is a path, and not a name."""
    if value is None or ("://" in value and not value.startswith("file://")):
        return None
    return value if value.startswith(("/", "~", ".", "file://")) or Path(value).is_file() else None


def _reached(config: Config, path: str) -> str | None:
    """Return `path` if reading it takes this user's rights, and not those that reach the run's own bucket."""
    bucket, ours = (place.split("/")[:3] for place in (path, config.run.store))
    return None if "://" in path and bucket == ours else path
