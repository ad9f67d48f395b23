"""Whether a run may start: everything that can be refused without a rank, before anything is written.

Torch is not imported and no scheduler is asked, so a refusal costs seconds and leaves no trace.
"""

import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.view.status import SILENT_SECONDS, read_status
from trainer.base.find.check import check_weights, hub_commit
from trainer.base.find.locate import base_at_hand, on_the_hub
from trainer.config import Config, assignment, override
from trainer.config.paths import absolute_path, file_system, local_path
from trainer.config.secrets import refuse_secrets
from trainer.data.compile.prepare import locate
from trainer.data.render.chat_template import NAMED, is_jinja
from trainer.errors import BaseOutOfReach, ConfigError, DataError, NotFound, NothingToResume, StorageError
from trainer.export.refusals import check_asked_exports
from trainer.plan.gpus import find_gpu
from trainer.plan.resolve import Resolved, mismatches, resolve, typed
from trainer.processes.bf16 import slowdown_words, why_processor_is_slow, why_slow
from trainer.run import layout
from trainer.run.folder import command, run_config, run_folder
from trainer.run.owner import StoreClock, last_owner, read_owner
from trainer.run.trackers import check_trackers
from trainer.state.checkpoint.identity import check_identity
from trainer.state.checkpoint.manifest import committed_steps, readable_manifests
from trainer.state.zero.policy import build_deepspeed_config
from trainer.store.store import Store
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.teacher import teacher_of


def anchored(config: Config) -> Config:
    """Return `config` with absolute local paths: ranks, and a later resume, may have another directory."""

    def absolute(path: str, setting: str) -> str:
        return path if "://" in path else str(absolute_path(path, setting))

    changes: dict[str, Any] = {"run.store": absolute(config.run.store, "run.store")}
    for key, path in (("model.base", config.model.base), ("sharding.deepspeed", config.sharding.deepspeed)):
        if local_path(path, key).exists():
            changes[key] = absolute(path, key)
    if config.tuning.start and "/" in config.tuning.start:  # otherwise it is a run of this store
        changes["tuning.start"] = absolute(config.tuning.start, "tuning.start")
    serve = config.rollout.serve
    if "/" in serve.command[0]:
        changes["rollout.serve.command"] = [absolute(serve.command[0], "rollout.serve.command"), *serve.command[1:]]
    if serve.base and local_path(serve.base, "rollout.serve.base").exists():
        changes["rollout.serve.base"] = absolute(serve.base, "rollout.serve.base")
    teacher = teacher_of(find_objective(config))
    if (
        teacher
        and teacher.name
        and (local_path(teacher.name, teacher.setting).exists() or (teacher.is_run and "/" in teacher.name))
    ):
        changes[teacher.setting] = absolute(teacher.name, teacher.setting)
    if (python := config.rollout.reward_python) and "/" in python:  # otherwise PATH finds it
        changes["rollout.reward_python"] = absolute(python, "rollout.reward_python")
    if config.data.template and config.data.template not in NAMED and not is_jinja(config.data.template):
        changes["data.template"] = absolute(config.data.template, "data.template")
    for what, sources in (("train", config.data.train), ("eval", config.data.eval)):
        changes[f"data.{what}"] = [
            {**source.model_dump(), "path": absolute(source.path, f"data.{what}[{index}].path")}
            for index, source in enumerate(sources)
        ]
    for name, given in config.eval.sets.items():
        changes[f"eval.sets.{name}.path"] = absolute(given.path, f"eval.sets.{name}.path")
    for key, path in (("eval.bias", config.eval.bias), ("eval.prompts", config.eval.prompts)):
        if path:
            changes[key] = absolute(path, key)
    changes["eval.tasks"] = [
        absolute(task, "eval.tasks") if local_path(task, "eval.tasks").exists() else task for task in config.eval.tasks
    ]
    return override(config, *(assignment(key, value) for key, value in changes.items()))


def checked(
    config: Config, *, resume: bool, take_over: bool, dry_run: bool, log: Callable[[str], None]
) -> tuple[Config, bool]:
    """Return `config` checked and with its base pinned, for other machines, and whether the store was seen.

    A `dry_run` shows what would be submitted even from a login node that reaches neither the store nor the Hub.
    """
    warn_of_place(config, log)
    config = typed_elsewhere(config, log)
    if not dry_run:
        return with_found(config, check(config, resume=resume, take_over=take_over, elsewhere=True)), True
    impatient = config.model_copy(
        update={"run": config.run.model_copy(update={"store_retry": 0.0, "store_timeout": 3.0})}
    )
    try:
        return with_found(config, check(impatient, resume=resume, take_over=take_over, elsewhere=True)), True
    except StorageError as error:
        log(f"not checked from here: {error}")
        return config, False
    except BaseOutOfReach as error:
        return _by_what_is_known(config, error, log), False


def refuse_replacing(config: Config, why: str) -> None:
    """Raise `ConfigError` if the run should leave slow machines where that cannot be done, which `why` says."""
    if config.retry.slow_rank == "replace":
        raise ConfigError(
            f"retry.slow_rank: replace is not possible here: {why}. Set it to name, which only names slow ranks."
        )


def refuse_spares(config: Config, why: str) -> None:
    """Raise `ConfigError` if the run should have spare machines where that cannot be, which `why` says."""
    if config.cluster.spares:
        raise ConfigError(
            f"cluster.spares: {config.cluster.spares} is not possible here: {why}. Set it to 0, or submit the run to"
            " Slurm or to a Ray cluster."
        )


def _by_what_is_known(config: Config, error: BaseOutOfReach, log: Callable[[str], None]) -> Config:
    """Return `config` as a well-known base decides it, checked against its sizes.

    It stays unchecked if the base that raised `error` is not known.
    """
    try:
        base = base_at_hand(config.model)
    except BaseOutOfReach:
        log(f"not checked from here: {error}")
        return config
    log(base.said or "")
    config = config.decided(base.description.in_4_bits)
    method = method_of(config)
    if wrong := mismatches(config, base.description, method, find_objective(config, method)):
        raise ConfigError("\n".join(wrong))
    return config


def with_found(config: Config, resolved: Resolved) -> Config:
    """Return `config` with what was found for it, so that every rank and every later start gets the same.

    The commit of a base on the Hub becomes its revision, wherever the branch is by then. The checkpoint of another run
    in tuning.start is pinned too, and quant.type and model.dtype, if they are not set. So are the classes of the run's
    data.
    """
    found = resolved.config
    decided = {"quant": found.quant, "tuning": found.tuning, "data": found.data}
    config = config.computing_in(found.model.dtype).model_copy(update=decided)
    commit = hub_commit(resolved.base.directory)
    if commit is None or not on_the_hub(config.model.base):
        return config
    return override(config, assignment("model.revision", commit))


def typed_elsewhere(config: Config, log: Callable[[str], None]) -> Config:
    """Return `config` with `model.dtype` decided for the machines of a cluster, as far as it can be told from here.

    GPUs are taken for those that cluster.slurm.gpu_type names, else for ones with bf16, and processors for this one's
    kind.
    """
    if not config.leaves_type_open:
        return config
    gpu = find_gpu(config.cluster.slurm.gpu_type or "")
    slow = None
    if config.cluster.gpus_per_worker == 0:
        slow = why_processor_is_slow()
    elif gpu and not gpu.bf16:
        slow = f"{gpu.name} has no bf16"
    base = None
    if slow is not None:
        with suppress(BaseOutOfReach, StorageError):
            base = base_at_hand(config.model).description
    decided = typed(config, base, slow=slow is not None)
    if decided.model.dtype == "fp32":
        log(f"model.dtype: fp32, as {slow}")
    return decided


def about_type(asked: Config, decided: Config) -> str | None:
    """Return a sentence on bf16 where ranks of this machine multiply it slowly: what was decided instead, or how much
    slower the run will be. None elsewhere.
    """
    if decided.model.dtype == "fp32" and not asked.leaves_type_open:
        return None
    slow = why_slow(asked.cluster.gpus_per_worker)
    if slow is None:
        return None
    if decided.model.dtype == "fp32":
        return f"model.dtype: fp32, as {slow}; the run keeps it wherever it goes on"
    return (
        f"Attention: model.dtype: bf16 is slow here, as {slow}: a product takes {slowdown_words()}. Stop with Ctrl-C"
        " and set model.dtype: fp32, unless another machine goes on with the run."
    )


def check(
    config: Config, *, resume: bool, take_over: bool = False, again: str | None = None, elsewhere: bool = False
) -> Resolved:
    """Refuse what would fail, or harm another run or this one. This changes nothing.

    `take_over`: start even if the run is alive. `again`: the name of this process's group, if it was started again and
    may have the run already. `elsewhere`: it will train on other machines, and its data need not be seen from here.

    Raises:
        ConfigError: a setting holds a secret, the base does not fit the settings, the newest checkpoint belongs to
            other ones, the run is alive, the name is taken, or a tracker is not installed.
        DataError: the data of the run to resume is not there.
        NothingToResume: `resume`, and nothing is committed.
        StorageError: `resume`, and no checkpoint can be read.
    """
    refuse_secrets(config)
    check_trackers(config.track)
    if config.sweep.settings:
        raise ConfigError(
            "sweep.settings: a single run tries no settings. `capstan sweep` makes a run for each trial; add sweep={}"
            " to train without it."
        )
    resolved = resolve(config)
    check_weights(resolved.base, config.model)
    check_asked_exports(resolved.config)
    build_deepspeed_config(config, world_size=config.cluster.most_workers or 1, accumulation=1, on_gpu=False)
    run = run_folder(config)
    if has_run(run, again):
        return resolved
    if not take_over:
        check_idle(run, resume=resume)
    if resume:
        _check_checkpoint(run, resolved, elsewhere=elsewhere)
    else:
        check_name(run)
    return resolved


def has_run(folder: Store, group: str | None) -> bool:
    """Return whether the run's last owner was of `group`."""
    owner = last_owner(folder) if group else None
    return owner is not None and group in (owner.group or "").split()


def check_turn(folder: Store, submission: str) -> None:
    """Raise `ConfigError` when a job's turn has come and somebody else has taken its run since it was submitted."""
    owner = last_owner(folder)
    if owner is not None and owner.group != submission:
        raise ConfigError(
            f"run.name: {folder.uri} was taken by `{owner.by}` on {owner.host} since this job was submitted, so the job"
            f" ends. {command('status', folder)} shows the run."
        )


def check_idle(folder: Store, *, resume: bool) -> None:
    """Raise `ConfigError` when somebody has the run: a second start would take it over in the middle of its work."""
    owner, clock = read_owner(folder), StoreClock(folder)
    if owner is not None and owner.is_alive(clock):
        or_else = "--take-over goes on without it, and what it has not committed is lost"
        raise ConfigError(
            f"run.name: {folder.uri} is in use by {owner.sentence(clock())}. {command('stop', folder)} ends it; "
            f"{or_else if resume else 'a new run needs another name'}."
        )


def check_name(folder: Store) -> None:
    """Raise `ConfigError` unless the name is free: a run that died before its first commit has nothing to lose."""
    if committed_steps(folder):
        raise ConfigError(
            f"run.name: {folder.uri} exists and has checkpoints. {command('resume', folder)} continues it; a new run"
            " needs another name."
        )
    with suppress(NotFound):
        # The key first: the clock writes one for a moment, and a dry run leaves no folder behind.
        written = folder.head(layout.CONFIG).modified.timestamp()
        seconds = StoreClock(folder)() - written
        if last_owner(folder) is None and not read_status(folder).generation and seconds < SILENT_SECONDS:
            raise ConfigError(
                f"run.name: {folder.uri} was claimed {seconds:.0f} s ago and has not begun. {command('status', folder)}"
                f" shows what becomes of it; if nothing does, the name is free again after {SILENT_SECONDS:.0f} s."
            )


def _check_checkpoint(folder: Store, resolved: Resolved, *, elsewhere: bool) -> None:
    """Check the checkpoint that the ranks will load as they will check it, as far as its manifest tells."""
    steps, damaged = committed_steps(folder), list[str]()
    if not steps:
        raise NothingToResume(f"{folder.uri} has no committed checkpoint. Start it again from its configuration.")
    manifest = next(readable_manifests(folder, damaged, steps), None)
    if manifest is None:
        raise StorageError(f"no checkpoint of {folder.uri} is whole: {damaged[0]}")
    wanted, before = resolved.config.train.steps, run_config(folder).train.steps
    if wanted is not None and wanted < manifest.step and (before is None or before >= manifest.step):
        raise ConfigError(
            f"train.steps: {wanted} is less than the {manifest.step} steps that {folder.uri} has trained already. Give"
            f" more than {manifest.step} to train on; `capstan export --step` takes an earlier checkpoint."
        )
    try:
        dataset = locate(resolved.config, resolved.base)["train"]
    except DataError:
        if not elsewhere:
            raise
        dataset = manifest.dataset  # the ranks see the data, and compare it
    check_identity(manifest, resolved.identity(dataset))


_OF_ONE_MACHINE = "ext2 ext3 ext4 xfs btrfs zfs overlay tmpfs ramfs f2fs apfs vfat exfat".split()
"""Types of file systems that no other machine has; an export of one by NFS has another type there, and its server may
say file://.
"""


def warn_of_place(config: Config, log: Callable[[str], None]) -> None:
    """Warn about a store in a folder: other machines must have it, and they seldom do if it holds temporary files."""
    folder = _folder(config)
    if folder is None:
        return
    own = {Path(place).resolve() for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")}
    if any(folder.is_relative_to(place) for place in own):
        log(
            f"Attention: run.store: {folder} is among this machine's temporary files, which other machines do not see"
            " and a reboot removes. Give a folder of a file system that all machines of the run share, or a bucket."
            " Example: s3://bucket/runs."
        )
    else:
        log(f"run.store is the folder {folder}: every machine of the run must have it under this path")


def check_shared(config: Config, address: str) -> None:
    """Raise `ConfigError` if the store is on a disk of this machine, but the cluster at `address` certainly is not."""
    folder = _folder(config)
    if folder is None or config.run.store.startswith("file://") or not _is_elsewhere(address):
        return
    kind = file_system(folder)
    if kind in _OF_ONE_MACHINE:
        raise ConfigError(
            f"run.store: {folder} is on a disk of this machine ({kind}), which the machines of the cluster at {address}"
            " do not see. Give a bucket, or a folder of a file system that all of them share. If they do share this"
            f" one, set run.store=file://{folder}."
        )


def _folder(config: Config) -> Path | None:
    """Return the folder of the store; None for a bucket."""
    store = config.run.store
    if "://" in store and not store.startswith("file://"):
        return None
    return local_path(store.removeprefix("file://"), "run.store").resolve()


def _is_elsewhere(address: str) -> bool:
    """Return whether HOST:PORT, or a URL of it, is an address that this machine does not have.

    A name that nobody knows may be any address.
    """
    host = address.rpartition("://")[2].partition("/")[0].rpartition(":")[0].strip("[]")
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)} if host else set[str]()
    except OSError:
        return False
    return bool(found) and not any(map(_is_own, found))


def _is_own(address: str) -> bool:
    """Return whether the address is this machine's own: a socket can be bound to such addresses alone."""
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return False
    return True
