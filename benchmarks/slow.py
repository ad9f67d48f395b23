"""A rank that is really slowed down is named, and among even ranks nobody is.

    python benchmarks/slow.py [--ratios 1.3 1.5] [--even 2000] [--ranks 2]     (root: the kernel holds a rank back)

Whole runs of a small model, with the ranks as processes of this machine. The kernel lets the last rank compute for
1 / RATIO of the time (the cgroup's CPU quota), from before its first step. It must be named within 20 steps, at about
this ratio. The control is a run of so many even steps beside whatever else the machine does: nobody may be named. Ends
with exit code 1 when either breaks.

Two ranks on two busy hyperthreads of an EPYC (load 30 by other work, cgroup version 1):

    held back by  1.3: rank 1 named in step 17, as slower by 1.40, as its quota was used up in 51% of the periods
    held back by  1.5: rank 1 named in step 17, as slower by 1.53, as its quota was used up in 63% of the periods
    nobody held back:    nobody named in 2,000 steps of 0.53 s, at a load of 20 to 38
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the ranks and the run that the tests share

from launcher.view.status import read_generation
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.config import dump_config

STEPS = 60  # of a run with a slow rank
NAMED_WITHIN = 20
_PERIOD = 5_000  # microseconds: shorter than what a layer computes at once
_VERSION_2 = Path("/sys/fs/cgroup/cgroup.controllers")


@contextmanager
def before_others(ratio: float) -> Iterator[None]:
    """Let this process go before the machine's other work, but have no more than 1 / `ratio` of one core."""
    quota, name = int(_PERIOD / ratio), f"capstan-slow-{os.getpid()}"
    if _VERSION_2.exists():
        group, limits = _VERSION_2.with_name(name), {"cpu.weight": "10000"}
        quotas = {"cpu.max": f"{quota} {_PERIOD}"}
    else:
        group, limits = Path("/sys/fs/cgroup/cpu", name), {"cpu.shares": "262144"}
        quotas = {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": str(quota)}
    group.mkdir()
    try:
        for limit, value in {**limits, **(quotas if ratio > 1 else {})}.items():
            (group / limit).write_text(value)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        time.sleep(0.1)
        group.rmdir()


def rank(config: str, dataset: str, ratio: float) -> Any:
    """Run a rank. The last of them is held back if `ratio` is more than 1; then all go before the machine's other work.

    The tests' `launch` calls it in each process.
    """
    if ratio <= 1:
        return runs.run(config, dataset)
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    with before_others(ratio if is_last else 1):
        return runs.run(config, dataset)


def measure(workshop: Workshop, ranks: int, ratio: float, steps: int) -> tuple[int, list[dict[str, Any]], float]:
    """Train: the steps that were done, the records of slow ranks, and the median seconds of a step."""
    name = f"slow-{ratio:g}".replace(".", "-")
    layout = (
        f"train.steps={steps}",
        f"train.global_batch={ranks}",
        "checkpoint.every_steps=0",
        "data.sequence_length=256",
    )
    config = workshop.config(name, *layout, "quant.type=none", "model.dtype=fp32")
    in_a_module = import_module("benchmarks.slow")  # this file's functions are not found again as those of __main__
    (outcome, *_) = launch(
        ranks, in_a_module.rank, dump_config(config), workshop.prepare(config).train, ratio, timeout=3000
    )
    assert outcome["outcome"] == "finished", outcome
    records = read_generation(workshop.store.sub(name), 1)
    seconds = sorted(record["seconds"] for record in records["step"])
    return len(seconds), records.get("slow_rank", []), seconds[len(seconds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="*", default=[1.3, 1.5])
    parser.add_argument("--even", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    if given.ratios and os.geteuid() != 0:
        raise SystemExit("only root may hold a process back; --ratios without a number measures even ranks alone")
    shown, broken = (
        Table("held back", "ranks", "steps", "a step", "named", "in step", "as slower by", "because"),
        list[str](),
    )
    with tempfile.TemporaryDirectory(prefix="capstan-") as folder:
        workshop = Workshop(Path(folder), hidden_size=512, intermediate_size=1536, num_hidden_layers=2)
        for ratio in [*given.ratios, *([1.0] if given.even else [])]:
            steps, slow, seconds = measure(workshop, given.ranks, ratio, STEPS if ratio > 1 else given.even)
            last = [record for record in slow if record["rank"] == given.ranks - 1]
            if ratio > 1 and (len(slow) != len(last) or not last or last[0]["step"] > NAMED_WITHIN):
                broken.append(f"held back by {ratio:g}: named were {slow}, wanted the last rank by step {NAMED_WITHIN}")
            if ratio <= 1 and slow:
                broken.append(f"nobody is held back, and {slow} were named")
            cells = [(str(one["rank"]), str(one["step"]), f"{one['ratio']:.2f}", one["why"]) for one in slow[:1]]
            row = cells[0] if cells else ("nobody", "", "", "")
            shown.add_row(
                f"{ratio:g}" if ratio > 1 else "nobody", str(given.ranks), f"{steps:,}", f"{seconds:.3f} s", *row
            )
    Console(width=160).print(shown)
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
