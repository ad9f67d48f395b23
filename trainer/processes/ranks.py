"""This process among the others: its rank, and the few small agreements that the loop needs.

    World   all ranks of a job. They gather the frozen base, find out that one hangs, and agree on what they load.
    Team    the ranks that train one model. Totals, stops, commits, checkpoints and optimizers are a team's.

Today the one team of a job is all ranks of the world.

Small values go through one all-gather and are reduced the same way on every rank, so that all ranks compute
bit-identical results and decide alike.
"""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    distributed_c10d,
)

from trainer.errors import CapstanError, ConfigError, first_line
from trainer.processes.accelerator import is_accelerator, mark, onto, own_device
from trainer.processes.devices import host_memory_left

K = TypeVar("K")
T = TypeVar("T")

_LOOPBACK = "lo"
_ATTEMPT = timedelta(seconds=5)
"""A rank looks after this time whether those that it waits for are still there, and then more and more rarely."""
_PATIENT_ATTEMPT = 6 * _ATTEMPT
"""It looks at least this often. Where another rank of the node looks, one that waits wakes up so often."""
_OUTCOME = "outcome"
"""The key in the store whose value ends the meeting: nothing, or the numbers of those that are missing."""
# torch's variables for the settings of its allocator: any device's, CUDA's, ROCm's.
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@dataclass(frozen=True)
class Ranks:
    """`world_size` ranks that act together, and this one among them: `rank` is its number among them, `local_rank` its
    number on its node, and `device` holds its tensors. Their collectives use `group`; None means all ranks of the job.
    """

    rank: int
    world_size: int
    ranks_per_node: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def device_name(self) -> str:
        """The device as people read it: `cpu`, or a GPU's number and model."""
        if self.device.type != "cuda":
            return str(self.device)
        return f"{self.device} ({torch.cuda.get_device_name(self.device)})"

    def least_device_memory(self) -> int | None:
        """Bytes of the smallest GPU of all ranks; None on CPUs. Collective."""
        mine = self.device_memory
        return None if mine is None else int(min(row[0] for row in self.gather(mine)))

    @property
    def device_memory(self) -> int | None:
        """Bytes of this rank's GPU; None on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    def least_host_memory(self) -> int:
        """Bytes of host memory that each rank may use: half of what the host has left, divided by its ranks; the
        smallest of all hosts. Collective.
        """
        return int(min(row[0] for row in self.gather(host_memory_left() / 2 / self.ranks_per_node)))

    def gather(self, *values: float, sums: Tensor | None = None) -> list[list[float]]:
        """`values` of every rank in rank order, followed by `sums` (n,) fp64 from its device. Collective."""
        return self.begin_gather(*values, sums=sums)()

    def begin_gather(self, *values: float | Tensor, sums: Tensor | None = None) -> Callable[[], list[list[float]]]:
        """Start a `gather`, and return a function that gives its result. Calling it waits until the device has reached
        this point. A value may be a tensor () on the device. Collective.
        """
        known = [0.0 if isinstance(value, Tensor) else value for value in values]
        mine = onto(torch.tensor(known, dtype=torch.float64), self.device)
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                mine[place] = value
        every = self.gather_tensor(mine if sums is None else torch.cat([mine, sums])).to("cpu", non_blocking=True)
        there = mark(self.device) if is_accelerator(self.device) else None

        def arrived() -> list[list[float]]:
            if there is not None:
                there.synchronize()
            return every.tolist()

        return arrived

    def gather_tensor(self, mine: Tensor) -> Tensor:
        """`mine` (n,) of every rank in rank order, on this rank's device: (ranks, n). Collective."""
        every = mine.new_empty(self.world_size * len(mine))
        dist.all_gather_into_tensor(every, mine, group=self.group)
        return every.view(self.world_size, len(mine))

    def total(self, counts: Tensor) -> Tensor:
        """The sum over ranks of a tensor of whole numbers, on this rank's device. The host does not wait.
        Collective.
        """
        every = onto(counts, self.device) if counts.device != self.device else counts.clone()
        dist.all_reduce(every, group=self.group)
        return every

    def gather_objects(self, value: Any) -> list[Any]:
        """Small picklable objects of every rank, in rank order. Collective."""
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, value, group=self.group)
        return every

    def gather_items(self, mine: Mapping[K, T]) -> dict[K, T]:
        """The small picklable values of all ranks, by key. Each key belongs to one rank only. Collective."""
        return {key: value for part in self.gather_objects(mine) for key, value in part.items()}

    def together(self, action: Callable[[], T]) -> list[T]:
        """`action`'s result on every rank, in rank order. An error on one rank is raised on all. Collective."""
        with self.agreeing():
            result = action()
        return self.gather_objects(result)

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only. Every rank gets its result, or its error (see `agree`). Collective."""
        result: Any = None
        with self.agreeing():
            if self.rank == 0:
                result = action()
        # Not `together`, because a gather allocates room on each rank for one object per rank, each of the largest
        # size.
        return self.broadcast(result)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The object of the rank `source`. Collective."""
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=source, device=self.device)
        return box[0]

    def agree(self, failure: Exception | None, *values: float) -> list[list[float]]:
        """`values` of every rank. If one of them failed, all raise the same error, so that none waits for it.
        Collective.

        Raises:
            CapstanError: the first failing rank's, of its own kind and exit code. A failure of another kind (a bug) is
                raised as it is where it happened.
        """
        rows = self.gather(float(failure is not None), *values)
        if not any(row[0] for row in rows):
            return [row[1:] for row in rows]
        told = (
            failure if isinstance(failure, CapstanError) or failure is None else f"{type(failure).__name__}: {failure}"
        )
        reports = self.gather_objects(told)
        if failure is not None and not isinstance(failure, CapstanError):
            raise failure
        rank, report = next((rank, report) for rank, report in enumerate(reports) if report is not None)
        if isinstance(report, CapstanError):
            raise report from failure
        raise CapstanError(f"rank {rank} failed: {report}") from failure

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """An error in the block on one rank ends the block on all (see `agree`). Collective, but the block itself must
        call nothing collective.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)


@dataclass(frozen=True)
class World(Ranks):
    """All ranks of the job."""

    @property
    def timeout(self) -> timedelta:
        """The time that a collective of all ranks may take."""
        return distributed_c10d._get_default_group()._get_backend(self.device).options._timeout

    def begin_groups(self) -> None:
        """Make every process group of this process create its communicator now, with the limit `timeout`. Collective.

        One that a library made has torch's own limit, 10 minutes for NCCL. And NCCL's would begin inside of the first
        pass, where `timeouts.step` is its limit instead of that of the load.
        """
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(self.timeout, group)
            here = torch.zeros(1, device=self.device)
            dist.all_reduce(here, group=group)
            here.item()  # it waits until the others have arrived

    def have_even_nodes(self) -> bool:
        """Whether every node has equally many ranks with consecutive numbers. Collective."""
        return all(
            (per_node, local_rank) == (self.ranks_per_node, rank % self.ranks_per_node)
            for rank, (per_node, local_rank) in enumerate(self.gather(self.ranks_per_node, self.local_rank))
        )

    def group_of(self, size: int) -> dist.ProcessGroup:
        """The process group of this rank and the `size - 1` ranks beside it. All ranks are divided into groups of
        `size` consecutive ranks. Collective over the group.

        A rank takes part in the making of its own group alone: among 1,024 ranks there are 128 groups of eight. All
        ranks make groups of the same sizes in the same order, so that no two wait for each other in different ones,
        and NCCL, which divides the communicator of all ranks, finds each of them in the same division.
        """
        first = self.rank // size * size
        return self._group(size, range(first, first + size))

    def group_across(self, size: int) -> dist.ProcessGroup:
        """The process group of the ranks with the same number as this one in its group of `size`. Collective over the
        group, as `group_of`."""
        return self._group(size, range(self.rank % size, self.world_size, size))

    def _group(self, size: int, members: range) -> dist.ProcessGroup:
        assert self.world_size % size == 0, "the last group would be smaller"
        group = dist.new_group(list(members), timeout=self.timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)  # torch has a mark for the groups of others
        return group


@dataclass(frozen=True)
class Apart(World):
    """This rank by itself, while the others do something else. It agrees with nobody."""

    def gather(self, *values: float, sums: Tensor | None = None) -> list[list[float]]:
        assert sums is None
        return [list(values)]

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True, kw_only=True)
class Team(Ranks):
    """The ranks of the `world` that train one model."""

    world: World


def join(
    timeout: timedelta = timedelta(minutes=30),
    meeting: timedelta = timedelta(minutes=15),
    is_gone: Callable[[int], bool] = lambda rank: False,
) -> Team:
    """Join the process group that Ray Train, torchrun or srun laid out in the environment (or a group of one).

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `timeout` is that of the group's
    collectives; `is_gone` tells whether a rank has ended before it came to the meeting.

    Raises:
        CapstanError: not all ranks have come within `meeting`, or one of those will not come any more; it names those
            that are missing.
        ConfigError: two ranks would compute on one GPU, or the environment has only a part of a group's variables.
    """
    let_segments_grow()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = own_device(local_rank)
    if is_accelerator(device):
        torch.accelerator.set_device_index(device)
    if not dist.is_initialized():
        rank, world_size, store = 0, 1, dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        if "RANK" in os.environ:
            if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
                raise ConfigError(
                    f"RANK is set in the environment, as torchrun sets it, but not {' or '.join(missing)}. Start the"
                    " command by torchrun or srun, or unset RANK."
                )
            stay_on_loopback()
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = _meet(rank, world_size, meeting, is_gone, looks=local_rank == 0)
            if device.type == "cuda":
                take_gpu(store, device, rank)
        else:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed reads it
        dist.init_process_group(
            dist.get_default_backend_for_device(device),
            timeout=timeout,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=bound_device(device, world_size),
        )
    world_size = dist.get_world_size()
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    world = World(dist.get_rank(), world_size, ranks_per_node, int(os.environ.get("LOCAL_RANK", 0)), device)
    return Team(**vars(world), world=world)


def bound_device(device: torch.device, world_size: int) -> torch.device | None:
    """The device that the process group is told. NCCL then derives other groups' communicators from this one's, and
    need not guess which device belongs to whom. With one rank NCCL fails at this on some machines (CUDA error 600,
    deepspeedai/DeepSpeed#8248), and does not need it.
    """
    return device if is_accelerator(device) and world_size > 1 else None


def let_segments_grow() -> None:
    """Make torch's allocator use growing segments of a GPU's memory, unless the environment sets it otherwise. Layers
    are gathered into blocks of changing sizes, and fixed segments would leave gaps.

    The environment would be too late for that, as torch reads it once, when CUDA begins, and bitsandbytes begins it in
    its import.
    """
    if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def add_in_one_order() -> None:
    """Make kernels add in the same order every time, if they have such a mode beside a faster one. Call it before CUDA
    begins.
    """
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers reads it for FlashAttention's packages
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written


def take_gpu(store: Store, device: torch.device, rank: int) -> None:
    """Note in the ranks' `store` that `rank` has this GPU. Raises `ConfigError` if another rank has it, because NCCL
    does not allow that.
    """
    gpu = torch.cuda.get_device_properties(device)
    others = store.add(f"gpu-{gpu.uuid}", 1) - 1
    if others:
        raise ConfigError(
            f"rank {rank} would compute on the GPU of another rank: {gpu.name} is shown to both"
            f" ({torch.cuda.device_count()} to each). Start as many ranks on a machine as it has GPUs, or show each its"
            " own (srun --gpus-per-task=1)."
        )


def collectives_begun() -> int:
    """The number of collectives that this process has begun so far, in all its groups. Any thread may call it."""
    groups: list[Any] = list(distributed_c10d._world.pg_map)  # torch's stubs leave the sequence number out
    return sum(group._get_sequence_number_for_group() for group in groups)


def _meet(rank: int, world_size: int, within: timedelta, is_gone: Callable[[int], bool], *, looks: bool) -> Store:
    """The key-value store at MASTER_ADDR and MASTER_PORT, once every rank has arrived. One rank of each node `looks`
    whether missing ranks are gone.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent serves the store itself, and keeps it over its attempts.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    missing, began = None, time.monotonic()
    try:
        server = _served(host, port, within) if serves else _reached(host, port, within, lambda: is_gone(0))
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
        store.set(f"here-{rank}", "")
        if store.add("arrived", 1) == world_size:
            store.set(_OUTCOME, "")
        missing = _waited_for(store, world_size, within, is_gone if looks else None)
        if not missing:
            return store
    except dist.DistError as error:
        if serves:
            raise CapstanError(
                f"rank 0 cannot serve the meeting of the ranks at {host}:{port}: {first_line(error)}."
            ) from error
    took = time.monotonic() - began
    limit = f"{took:.0f} s" if took < within.total_seconds() else f"{within.total_seconds():.0f} s (timeouts.meet)"
    if missing is None:
        raise CapstanError(
            f"rank {rank} cannot reach rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT): it did not come within"
            f" {limit}, or has given up. Its log or the job's output says why."
        )
    named = f"{', '.join(map(str, missing[:8]))}{' ...' if len(missing) > 8 else ''}"
    raise CapstanError(
        f"{world_size - len(missing)} of {world_size} ranks came together within {limit}; missing: {named}. They were"
        " killed, or did not start: the job's output says why."
    )


def _waited_for(store: Store, world_size: int, within: timedelta, is_gone: Callable[[int], bool] | None) -> list[int]:
    """Ranks that have not arrived when the time is up, or as soon as one of them has died; none if all have arrived.

    All wait for one key, which the last one to come sets, or who finds that one `is_gone`. The names of those that are
    there are asked for only then: 1,024 ranks that ask for as many names keep the store busy for minutes.
    """
    deadline = time.monotonic() + within.total_seconds()
    attempt = _PATIENT_ATTEMPT if is_gone is None else _ATTEMPT
    while True:
        left = timedelta(seconds=max(0.0, deadline - time.monotonic()))
        try:
            store.wait([_OUTCOME], min(attempt, left))
        except dist.DistStoreError:  # time is up
            over = left <= attempt
            missing = _missing(store, world_size) if over or is_gone is not None else []
            if missing and over:
                return missing
            if is_gone is not None and any(map(is_gone, missing)):
                # Others may have come since they were looked for.
                store.set(_OUTCOME, ",".join(map(str, _missing(store, world_size))))
            attempt = min(2 * attempt, _PATIENT_ATTEMPT)
        else:
            return [int(number) for number in store.get(_OUTCOME).decode().split(",") if number]


def _missing(store: Store, world_size: int) -> list[int]:
    """The ranks that have not arrived yet, by one request."""
    there = {key.rpartition("/")[2] for key in store.list_keys()}
    return [rank for rank in range(world_size) if f"here-{rank}" not in there]


def _served(host: str, port: int, within: timedelta) -> TCPStore:
    """The store, served only at the address by which the other ranks reach it, because whoever reaches it may write to
    it.
    """
    return TCPStore(
        host, port, is_master=True, timeout=within, wait_for_workers=False, master_listen_fd=_listening(host, port)
    )


def _listening(host: str, port: int) -> int:
    """A socket at `host` and `port`, as its file descriptor. It listens at every address if `host` is not an address
    that this machine knows itself by, or only one by which others cannot reach it.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not ip_address(place[0]).is_loopback or _on_one_machine():
            return socket.create_server(place[:2], family=family, backlog=4096).detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise dist.DistNetworkError(f"{error.strerror}") from error
    return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True).detach()


def _on_one_machine() -> bool:
    """Whether all ranks are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def stay_on_loopback() -> None:
    """Make gloo and NCCL open their sockets where no other machine reaches them, if all ranks are on this machine and
    nobody has named an interface.
    """
    if _on_one_machine():
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, _LOOPBACK)


def _reached(host: str, port: int, within: timedelta, is_gone: Callable[[], bool]) -> TCPStore:
    """The store that rank 0 serves, as soon as it does. It tries in short attempts, because torch would keep asking a
    server that has ended.
    """
    deadline = time.monotonic() + within.total_seconds()
    while True:
        left = timedelta(seconds=max(0.0, deadline - time.monotonic()))
        try:
            store = TCPStore(host, port, is_master=False, timeout=min(_ATTEMPT, left), wait_for_workers=False)
        except dist.DistError:
            if left <= _ATTEMPT or is_gone():
                raise
        else:
            store.set_timeout(within)
            return store
