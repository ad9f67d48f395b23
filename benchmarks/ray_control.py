"""What Ray's controller pays to look after its ranks: CPU time a look, by the number of ranks.

    python benchmarks/ray_control.py [--actors 8 16 32] [--looks 40]

The ranks are small actors of a Ray on this machine. A look asks each of them once, as Ray Train does every
RAY_TRAIN_HEALTH_CHECK_INTERVAL_S. The least squares line over the sizes gives the cost of one more rank. It is measured
for these sizes alone: nothing is said of a thousand. The CPU time is this process's, so other programs on the machine
change it little. Notices of leaving machines are not measured, because they cost no call of a rank.
"""

import argparse
import json
import os
import time
from typing import Any

import numpy as np
import psutil
import ray

from launcher.cluster.ray.cluster import local_ray


@ray.remote(num_cpus=0)
class Rank:
    """Answers as a rank of Ray Train does."""

    def poll_status(self) -> dict[str, Any]:
        return {"running": True, "error": None, "training_report": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--looks", type=int, default=40)
    given = parser.parse_args()
    ranks, spent = list[Any](), list[float]()
    with local_ray(2):
        for size in sorted(given.actors):
            ranks += [Rank.remote() for _ in range(size - len(ranks))]
            look(ranks, 5)  # they have started
            cpu, seconds = look(ranks, given.looks)
            spent.append(1000 * cpu)
            print(
                json.dumps({"ranks": size, "cpu_ms_a_look": round(1000 * cpu, 2), "seconds_a_look": round(seconds, 4)})
            )
    if len(spent) > 1:
        slope, least = np.polyfit(sorted(given.actors), spent, 1)
        print(json.dumps({"cpu_ms_a_rank_and_look": round(slope, 3), "cpu_ms_of_a_look_itself": round(least, 2)}))


def look(ranks: list[Any], times: int) -> tuple[float, float]:
    """Look after the ranks so many times. Returns this process's CPU seconds and the seconds on the clock of a look."""
    process = psutil.Process(os.getpid())
    before, began = process.cpu_times(), time.monotonic()
    for _ in range(times):
        ray.get([rank.poll_status.remote() for rank in ranks])
    after = process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return cpu / times, (time.monotonic() - began) / times


if __name__ == "__main__":
    main()
