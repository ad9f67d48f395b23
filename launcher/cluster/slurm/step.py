"""One rank, one server or one keeper of a submitted run, as srun starts it (`cluster.slurm.launch: direct`).

python -m launcher.cluster.slurm.step rank RUN_URI SUBMISSION
python -m launcher.cluster.slurm.step keeper RUN_URI SUBMISSION
python -m launcher.cluster.slurm.step server RUN_URI

The keepers are a step of their own, a task on each node. They outlive the step of the ranks, which are forked from
them: a task of that step only waits for its rank's end.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from launcher.policy import retry
from launcher.start import sidecars
from launcher.start.claim import turn, wait_for_first_rank
from launcher.start.group import imported_rank, slurm_rank
from launcher.start.keeper import Keeper, Unprepared, keeper_command, listening
from launcher.start.local_ranks import forked_rank, gpus_of_server
from launcher.start.sidecars import sidecars_here
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config
from trainer.data.compile.prepare import Datasets, prepare
from trainer.errors import CapstanError, Stopped
from trainer.processes import children
from trainer.processes.between_machines import own_address
from trainer.processes.devices import visible_gpus
from trainer.run.background import say
from trainer.run.folder import run_folder, submitted_config
from trainer.run.records import newest_records, record_end
from trainer.store.store import Store, open_run_store, open_store


def _rank(uri: str, submission: str) -> None:
    os.environ.update(slurm_rank(os.environ))
    rank = int(os.environ.get("RANK", 0))
    try:
        _run(submitted_config(open_store(uri)), submission, rank)
    except CapstanError as error:
        say(f"capstan: {error}")
        # srun kills the step at the first exit code that is not 0. So rank 0 returns it, which has the most to write.
        sys.exit(0 if isinstance(error, Stopped) and rank > 0 else error.exit_code)


def _run(config: Config, submission: str, rank: int) -> None:
    ranks = partial(_forked, submission) if config.cluster.keeper else imported_rank
    run_rank = ranks(config.cluster.gpus_per_worker)
    if rank:
        wait_for_first_rank(config, submission)
        run_rank(config, None, resume=False)
        return
    with turn(config, submission, by="capstan submit slurm", log=say):
        datasets = prepare(config, resolve_base(config.model), open_run_store(config), lambda *_: None)
        with sidecars_here(config, run_folder(config), say, servers=False):  # these are a step of their own
            run_rank(config, datasets, resume=False)


def _forked(submission: str, gpus_per_worker: int | None) -> Callable[..., None]:
    """Return a function that runs a rank, as `imported_rank` does, in a process that this node's keeper forks."""
    began = time.time()

    def run_rank(config: Config, datasets: Datasets | None, *, resume: bool) -> None:
        given = {"config": dump_config(config), "datasets": datasets and asdict(datasets)}
        task, run = {**given, "resume": resume, "began": began}, run_folder(config)
        try:
            forked_rank(Keeper(_keeper_name(submission)), task, hopeless=lambda asked: asked and _has_lost_a_rank(run))
        except Unprepared as why:
            say(f"cluster.keeper: {why}. The rank starts without it.")
            imported_rank(gpus_per_worker)(config, datasets, resume=resume)
        except retry.RankDied as died:
            rank = int(os.environ.get("RANK", 0))
            end = retry.classify({rank: died})
            record_end(run, end.reason, crash=True, **end.facts)
            raise CapstanError(end.reason) from None
        except CapstanError:
            raise
        except Exception:  # the rank has shown it
            sys.exit(1)

    return run_rank


def _has_lost_a_rank(run: Store) -> bool:
    return any("died" in record for record in newest_records(run))


def _keeper_name(submission: str) -> str:
    return f"capstan-keeper-{os.environ['SLURM_JOB_ID']}-{submission}"


def _keeper(uri: str, submission: str) -> None:
    line, gpus_per_worker = (
        listening(_keeper_name(submission)),
        submitted_config(open_store(uri)).cluster.gpus_per_worker,
    )
    line.set_inheritable(True)
    # Ranks would take the variables of the keeper's task for their own. They get those of the tasks that ask for them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI"))}
    os.execve(sys.executable, children.apart(keeper_command(line, gpus_per_worker)), environment)


def _server(uri: str) -> None:
    number, here = (int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    each = submitted_config(open_store(uri)).rollout.serve.gpus
    # This is what Slurm says about the node's GPUs: the step has all of them, as do the ranks that may be beside it.
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else visible_gpus()
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus_of_server(here, each, gpus)
    # The server must not look for other tasks of a step.
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    sidecars.main(uri, sidecars.server_name(number), own_address(socket.gethostname(), socket.AF_INET))


if __name__ == "__main__":
    {"rank": _rank, "keeper": _keeper, "server": _server}[sys.argv[1]](*sys.argv[2:])
