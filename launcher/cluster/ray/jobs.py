"""`capstan submit ray`: it runs the driver as a job of a Ray cluster, or without one as a process on this machine."""

import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from launcher.cluster.ray.cluster import address_of, check_ray, refused_token
from launcher.cluster.ray.keepers import check_spares
from launcher.plan.notes import refuse_empty_rows
from launcher.start import carried, snapshot
from launcher.start.check import anchored, check, check_shared, checked, refuse_replacing, refuse_spares, with_found
from launcher.start.claim import claimed
from launcher.start.environment import carry, to_carry
from launcher.start.sidecars import sidecars_sentence
from launcher.view.status import drivers
from trainer.config import Config
from trainer.errors import ConfigError, first_line
from trainer.evaluate.rollout.rewards import check_reward
from trainer.processes import children
from trainer.run import layout
from trainer.run.folder import name_of, run_folder
from trainer.run.owner import Ownership
from trainer.store.scratch import scratch_folder
from trainer.store.store import open_run_store

_KEPT_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True)
class RaySubmission:
    """A submitted run, or with `dry_run` one that would be submitted. `job` is Ray's submission id, or `process N`."""

    run: str
    uri: str
    address: str | None
    job: str | None
    entrypoint: str
    runtime_env: dict[str, Any]
    snapshot: str
    environment: str | None
    config: dict[str, Any]
    sidecars: str | None
    next: str
    dry_run: bool

    def text(self) -> str:
        """The text for people: the run and the next command; for a dry run everything."""
        where = f"the Ray cluster at {self.address}" if self.address else "a Ray of its own on this machine"
        if not self.dry_run:
            return f"run {self.run}: submitted to {where} as {self.job}\nsnapshot: {self.snapshot}\nnext: {self.next}"
        sidecars = f"{self.sidecars}\n" if self.sidecars else ""
        kept = f"snapshot: {self.snapshot}\n" + (f"environment: {self.environment}\n" if self.environment else "")
        return (
            f"run {self.run}: would be submitted to {where}\nfolder: {self.uri}\n{kept}"
            f"entrypoint: {self.entrypoint}\nruntime environment:"
            f" {self.runtime_env}\n{sidecars}\n{yaml.safe_dump(self.config, sort_keys=False).rstrip()}"
        )


def submit(
    config: Config, *, resume: bool, take_over: bool, dry_run: bool, log: Callable[[str], None]
) -> RaySubmission:
    """Check, claim the name, keep the code, and start the driver elsewhere. Returns without waiting for it.

    Raises:
        ConfigError: a setting is wrong, the name is taken, the run is alive, or the cluster cannot be reached or
            refuses.
        NothingToResume: `resume`, and nothing is committed.
    """
    config = anchored(config)
    address = address_of(config)
    if address:
        check_shared(config, address)
        check_spares(config)
        config, _ = checked(config, resume=resume, take_over=take_over, dry_run=dry_run, log=log)
    else:
        refuse_replacing(config, "without a cluster all ranks are on this machine")
        refuse_spares(config, "without a cluster all ranks are on this machine")
        config = with_found(config, check(config, resume=resume, take_over=take_over, elsewhere=True))
        check_reward(config.rollout)
    ranks = config.cluster.most_workers
    if not resume and ranks and ranks == config.cluster.fewest_workers:
        refuse_empty_rows(config, ranks)
    code, environment = snapshot.take(Path.cwd()), to_carry(config)
    if address and (missing := _reward_left_behind(config, code)):
        log(missing)
    run = run_folder(config)
    submission = secrets.token_hex(4)
    python = ["python" if address else sys.executable]
    if environment:
        python += ["-m", *environment.command(config)]
    command = [*python, "-m", "launcher.drive.driver", run.uri]
    command += ["--submission", submission]
    command += ["--resume"] if resume else []
    command += ["--address", "auto"] if address else []
    planned = RaySubmission(
        run=config.run.name,
        uri=run.uri,
        address=address,
        job=None,
        entrypoint=shlex.join(command),
        runtime_env=_runtime_env(config, python) if address else {},
        snapshot=code.sentence(),
        environment=environment and environment.sentence(),
        config=config.model_dump(mode="json", exclude_defaults=True),
        sidecars=sidecars_sentence(config),
        next=f"capstan status {shlex.quote(run.uri)} --watch",
        dry_run=dry_run,
    )
    if dry_run:
        return planned
    client = _client(address) if address else None
    if environment:
        carry(config, environment, log)
        if client is None:  # the driver is of this machine, and this command says at once what it would say
            carried.unpack(open_run_store(config).uri, environment.name, carried.TEMPORARY)
    how = {"take_over": take_over, "group": submission, "waits": True}
    with claimed(config, by="capstan submit ray", resume=resume, code=code, log=log, **how) as owner:
        job = _submit_job(client, planned, run.get(layout.SNAPSHOT)) if client else _start_process(command, owner)
    return RaySubmission(**{**asdict(planned), "job": job})


def _reward_left_behind(config: Config, code: snapshot.Snapshot) -> str | None:
    """Return a sentence if the cluster's machines must have the run's reward, because the job takes no module of this
    name along. A package that is installed here may well be installed there.
    """
    module = (config.rollout.reward or "").rpartition(":")[0].partition(".")[0]
    if not module or config.rollout.reward_python or code.has_module(module) or find_spec(module):
        return None
    return (
        f"Attention: rollout.reward: {config.rollout.reward}: the job starts in the top folder of the snapshot, which"
        f" has no module {module!r}. Track it in git there, or install it on the cluster's machines"
    )


def _runtime_env(config: Config, python: list[str]) -> dict[str, Any]:
    """Return Ray's runtime environment, in which `python` starts each worker."""
    carried = {"py_executable": shlex.join(python)} if len(python) > 1 else {}
    return {**config.cluster.ray.runtime_env, **carried}


def _client(address: str) -> Any:
    check_ray(f"cluster.ray.address: {address}")
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    os.environ["RAY_ADDRESS"] = address  # Ray lets it override the argument
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise refused_token(address) from error
    except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
        raise ConfigError(
            f"cluster.ray.address: no Ray job server answers at {address!r} ({first_line(error)}). Give the dashboard's"
            " address, such as http://head:8265, and start the head with `ray start --head --dashboard-host 0.0.0.0`."
        ) from error


def _submit_job(client: Any, planned: RaySubmission, archive: bytes) -> str:
    with scratch_folder("submit") as folder:
        code = snapshot.unpack(archive, Path(folder))
        runtime_env = {**planned.runtime_env, **({"working_dir": str(code)} if code.is_dir() else {})}
        try:
            return client.submit_job(
                entrypoint=planned.entrypoint, runtime_env=runtime_env, metadata={"capstan_run": planned.uri}
            )
        except (RuntimeError, ValueError, ConnectionError) as error:
            raise ConfigError(f"the Ray cluster at {planned.address} refused the job: {first_line(error)}") from error


def _start_process(command: list[str], owner: Ownership) -> str:
    """Start the driver in a session of its own, so that it outlives this terminal, and let it have the run.

    Its log is in the run's folder. What it says before it can write there is in a file of this machine, which is kept
    for a month.
    """
    folder = drivers()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in folder.glob("*.out"):
        if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            old.unlink(missing_ok=True)
    output = folder / f"{name_of(owner.run)}-{secrets.token_hex(4)}.out"
    with output.open("wb") as file:
        # trainer.processes.children is not used here, because this process is meant to outlive the command.
        process = subprocess.Popen(
            children.apart(command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    owner.hand_to(process.pid, output)
    return f"process {process.pid}"
