"""One rank of a submitted run, as srun starts it (`cluster.slurm.launch: direct`): python -m launcher.slurm.rank RUN_URI"""

import os
import sys

from launcher.start.group import slurm_rank
from trainer.base.locate import resolve_base
from trainer.config import Config
from trainer.data.prepare import prepare
from trainer.devices import stay_on_cpu
from trainer.errors import CapstanError, Stopped
from trainer.run.folder import run_config, run_folder
from trainer.run.owner import owning
from trainer.store import open_run_store, open_store


def main() -> None:
    os.environ.update(slurm_rank(os.environ))
    rank = int(os.environ.get("RANK", 0))
    try:
        _run(run_config(open_store(sys.argv[1])), rank)
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr, flush=True)
        # srun kills the step at the first exit code that is not 0: rank 0, which has the most to write, gives it.
        sys.exit(0 if isinstance(error, Stopped) and rank > 0 else error.exit_code)


def _run(config: Config, rank: int) -> None:
    if config.cluster.gpus_per_worker == 0:
        stay_on_cpu()
    from trainer.rank import run_rank

    store = open_run_store(config)
    if rank:
        run_rank(config, None, resume=False)
        return
    with owning(run_folder(config), "capstan submit slurm"):
        datasets = prepare(config, resolve_base(config.model), store, lambda *_: None)
        run_rank(config, datasets, resume=False)


if __name__ == "__main__":
    main()
