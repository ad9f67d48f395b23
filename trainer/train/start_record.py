"""The records of a start: what it is, how long each part of it took, what was planned for it, and which settings are
new.
"""

import os
import socket
from dataclasses import asdict
from typing import Any

from trainer.base.load.load import LoadReport
from trainer.errors import StorageError
from trainer.plan.plan import make_plan
from trainer.plan.resolve import Resolved
from trainer.run.settings import record_settings
from trainer.train.start import Start


def record_start(start: Start, report: LoadReport, **facts: Any) -> None:
    """Write what this start is, with these `facts`, and how long each part of it took. Collective."""
    ranks, starter, elapsed = start.ranks, start.starter, start.elapsed
    read_bytes = sum(read for (read,) in ranks.gather(report.read_bytes))
    processes = ranks.gather_objects((socket.gethostname(), os.getpid(), starter.machine))
    start.metrics.write(
        "start",
        generation=start.generation,
        world_size=ranks.world_size,
        sequence_parallel=start.config.sharding.sequence_parallel,
        **facts,
        host=processes[0][0],
        hosts=[host for host, _, _ in processes],
        pids=[pid for _, pid, _ in processes],
        machines=[machine for _, _, machine in processes],
        device=ranks.device_name,
        launch_seconds=round(elapsed.launch_seconds, 3),
        load_seconds=round(report.seconds, 3),
        load_gigabytes_per_second=round(read_bytes / 1e9 / report.seconds, 3),
        read_bytes=int(read_bytes),
        kept_bytes=report.kept_bytes,
        kernels=report.kernels,
        start_seconds=elapsed.seconds,
        **starter.facts,
    )


def record_plan(start: Start, settled: Resolved) -> None:
    """Write the plan for the `settled` settings on these ranks, to compare with what will be measured."""
    ranks = start.ranks
    plan = make_plan(
        settled.config, settled.base.description, ranks.world_size, ranks.ranks_per_node, ranks.device_memory
    )
    parts = (plan.parameters, plan.memory_per_gpu, plan.memory_per_host)
    names = ("parameters", "memory_per_gpu", "memory_per_host")
    start.metrics.write("plan", device=ranks.device.type, **dict(zip(names, map(asdict, parts), strict=True)))


def record_changes(start: Start) -> None:
    """Keep the settings of this start, on rank 0, and write which of them differ from the previous start's."""
    try:
        for change in record_settings(start.folder, start.generation, start.config):
            start.metrics.write("change", **change._asdict())
            start.log(change.sentence())
    except StorageError as error:  # a record never decides how a run ends
        start.log(f"the settings of this start could not be kept, which does not end the run: {error}")
