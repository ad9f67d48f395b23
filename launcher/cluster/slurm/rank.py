"""One rank of a submitted run, as srun starts it (`cluster.slurm.launch: direct`).

python -m launcher.cluster.slurm.rank RUN_URI SUBMISSION
"""

import os
import sys

from launcher.start.claim import turn, wait_for_first_rank
from launcher.start.group import imported_rank, slurm_rank
from launcher.start.sidecars import sidecars_here
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.data.compile.prepare import prepare
from trainer.errors import CapstanError, Stopped
from trainer.run.background import say
from trainer.run.folder import run_folder, submitted_config
from trainer.store.store import open_run_store, open_store


def main() -> None:
    os.environ.update(slurm_rank(os.environ))
    rank = int(os.environ.get("RANK", 0))
    try:
        run, submission = open_store(sys.argv[1]), sys.argv[2]
        _run(submitted_config(run), submission, rank)
    except CapstanError as error:
        say(f"capstan: {error}")
        # srun kills the step at the first exit code that is not 0. So rank 0 returns it, which has the most to write.
        sys.exit(0 if isinstance(error, Stopped) and rank > 0 else error.exit_code)


def _run(config: Config, submission: str, rank: int) -> None:
    run_rank = imported_rank(config)
    if rank:
        wait_for_first_rank(config, submission)
        run_rank(config, None, resume=False)
        return
    with turn(config, submission, by="capstan submit slurm", log=say):
        datasets = prepare(config, resolve_base(config.model), open_run_store(config), lambda *_: None)
        with sidecars_here(config, run_folder(config), say, servers=False):  # these are a step of their own
            run_rank(config, datasets, resume=False)


if __name__ == "__main__":
    main()
