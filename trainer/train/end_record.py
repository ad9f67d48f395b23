"""The record of how a start ends early, with the reason that people read."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch

from trainer.errors import CapstanError, DoesNotFit, MachineLeaves, NonFiniteLoss, Stopped, StorageError, counted
from trainer.plan.plan import make_plan
from trainer.plan.resolve import Resolved
from trainer.processes.ranks import Ranks
from trainer.run.lines import end_sentence
from trainer.run.metrics import Metrics
from trainer.run.records import add_record
from trainer.store.store import Store
from trainer.train.heartbeat.heartbeat import Hang
from trainer.train.start import Start


@contextmanager
def early_end(start: Start) -> Iterator[None]:
    """Write the reason of an early end into the records and the rank's log, and raise it again."""
    metrics = start.metrics
    try:
        yield
    except CapstanError as error:
        outcome = "stopped" if isinstance(error, Stopped) else "failed"
        _print(outcome, str(error))
        facts: dict[str, Any] = {"bad_window": error.window} if isinstance(error, NonFiniteLoss) else {}
        if isinstance(error, MachineLeaves):
            facts["lost_machine"] = True
        metrics.write("end", outcome=outcome, step=None, reason=str(error), **facts)
        raise
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        short = DoesNotFit(
            f"out of GPU memory ({str(error).splitlines()[0]}). {planned_memory(start.resolved, start.ranks)} Lower "
            "data.sequence_length or train.micro_batch, set train.activation_checkpointing: all, or use more ranks."
        )
        _print("failed", str(short))
        metrics.write("end", outcome="failed", step=None, reason=str(short))
        raise short from error
    except Exception as error:
        traceback.print_exc()
        metrics.write("end", outcome="failed", step=None, reason=f"{type(error).__name__}: {error}")
        raise


def _print(outcome: str, reason: str) -> None:
    print(end_sentence(outcome, reason), file=sys.stderr, flush=True)


def planned_memory(resolved: Resolved, ranks: Ranks) -> str:
    """A sentence on the memory that `capstan plan` expects on one GPU: the total, and its three largest parts."""
    base = resolved.base.description
    plan = make_plan(resolved.config, base, ranks.world_size, ranks.ranks_per_node, ranks.device_memory)
    memory = asdict(plan.memory_per_gpu)
    total = memory.pop("total")
    largest = sorted(memory.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.1f} GiB" for name, size in largest)
    return f"The plan for {counted(ranks.world_size, 'rank')} is {total / 2**30:.1f} GiB a GPU: {parts}."


def last_words(
    folder: Store, generation: int, metrics: Metrics, flush_log: Callable[[], None]
) -> Callable[[Hang, bool], None]:
    """A function that writes a rank's log and end into the run's folder before the rank ends because some rank
    hangs.
    """

    def say(hang: Hang, mine: bool) -> None:
        flush_log()
        if not mine:
            return
        end = {"outcome": "failed", "step": None, "reason": hang.reason, "hung_ranks": hang.ranks}
        if 0 in hang.ranks:  # Then this rank is not rank 0, and rank 0 may never write again.
            with suppress(StorageError):
                add_record(folder, generation, "end", **end)
        metrics.write_now("end", **end)

    return say
