"""One start of a run as its trackers see it, without training: `python -m tests.unit.run.tracked CONFIG FIRST LAST how`.

It makes the records of the steps from FIRST to LAST, an evaluation at every fourth, and a commit before the next
start's first. `how`: end, or hang after the last record until it is killed.
"""

import sys
import time
from pathlib import Path

from trainer.config import load_config
from trainer.run.folder import run_folder
from trainer.run.metrics import Metrics, open_trackers
from trainer.run.records import claim_generation


def loss(generation: int, step: int) -> float:
    """A start repeats a step with nearly the same loss: at another world size the last bits differ."""
    return 4.0 / step + generation / 1024


def main() -> None:
    config = load_config(sys.argv[1])
    first, last, how = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    run = run_folder(config)
    generation = claim_generation(run)
    metrics = Metrics(open_trackers(run, generation, config))
    metrics.write("start", generation=generation, world_size=3 - generation, step=first - 1, total_steps=20)
    for step in range(first, last + 1):
        metrics.write("step", step=step, loss=loss(generation, step), lr=1e-3, samples="88ed09c9")
        if step % 4 == 0:
            metrics.write("eval", step=step, loss=2 * loss(generation, step), set="general")
    if how == "hang":
        metrics.flush()
        Path(sys.argv[1]).with_suffix(".ready").touch()
        time.sleep(600)
    metrics.write("end", outcome="finished", step=last, reason="")
    metrics.close()


if __name__ == "__main__":
    main()
