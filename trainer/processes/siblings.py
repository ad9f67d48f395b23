"""The ranks of one machine that were started by hand or by srun, as processes. Nobody tells the others if one of them
is killed.
"""

import os
import time
from collections.abc import Callable, Mapping

from trainer.processes import guard

_GONE_SECONDS = 5.0
_LATE_SECONDS = 30.0
"""A rank that is not there by then was killed before it was seen, or never started."""


class Siblings:
    """Finds the processes of the other ranks by the environment with which they were started.

    Where this process was not started with a rank of its own, as by Ray, or where ranks are on several machines or
    under torchrun's agent, which ends them itself, it knows nothing.
    """

    def __init__(
        self,
        started_with: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        find: Callable[..., list[int]] = guard.family,
    ) -> None:
        self._group = _group(_own_environment() if started_with is None else started_with)
        self._clock, self._find = clock, find
        self._began = clock()
        self._seen: dict[int, float] = {}

    def is_gone(self, rank: int) -> bool:
        """Whether the process has certainly ended, or has been missing for so long that it will never come."""
        if self._group is None:
            return False
        name, same = self._group
        if self._find(os.fsencode(f"{name}={rank}"), *same):
            self._seen[rank] = self._clock()
            return False
        seen = self._seen.get(rank)
        return self._clock() - (self._began if seen is None else seen) > (
            _LATE_SECONDS if seen is None else _GONE_SECONDS
        )


def _group(started_with: Mapping[str, str]) -> tuple[str, list[bytes]] | None:
    """The variable with a rank's number, and those that its group has in common; None where it may be anywhere."""
    if "TORCHELASTIC_RUN_ID" in started_with:
        return None
    for name, common, here, all_of_them in _STARTERS:
        if name in started_with and all(one in started_with for one in (*common, here, all_of_them)):
            if started_with[here] != started_with[all_of_them]:
                return None
            return name, [os.fsencode(f"{one}={started_with[one]}") for one in common]
    return None


_STARTERS = (
    ("RANK", ("MASTER_ADDR", "MASTER_PORT"), "LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ("SLURM_PROCID", ("SLURM_JOB_ID", "SLURM_STEP_ID"), "SLURM_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"),
)


def _own_environment() -> dict[str, str]:
    """The environment with which this program was started. Others cannot see what was set later."""
    with open("/proc/self/environ", "rb") as file:
        pairs = (os.fsdecode(pair).partition("=") for pair in file.read().split(b"\0"))
        return {name: value for name, _, value in pairs}
