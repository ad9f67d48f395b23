"""The requests of a start of 16 to 1,024 ranks, counted without reading a weight: for benchmarks/scale.py.

The base has only the headers of its files, in a store that counts. Its model is on `meta`. Each rank's jobs are those
that a load makes (`place_partitions`), and each piece of theirs is read. Ranks meet as threads of a few processes.
"""

import json
import multiprocessing
import os
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from trainer.base.describe.empty_model import meta_model
from trainer.base.describe.language_model import model_config
from trainer.base.find import locate
from trainer.base.find.locate import known_config
from trainer.base.load import cache as base_cache
from trainer.base.load.load import DTYPES, Placement, empty_model, nothing_packed, place_partitions
from trainer.base.rows.parameters import find_weights
from trainer.config import parse_config
from trainer.processes import ranks as meetings
from trainer.state.zero.division import Division
from trainer.store.safetensors_index import INDEX_FILE, header_of
from trainer.store.store import Entry

PIECE = 4 * 2**20
RANKS_PER_NODE = 8
# The id on the Hub, and the number of files there.
BASES = {"405B": ("meta-llama/Llama-3.1-405B", 191), "1T mixture": ("moonshotai/Kimi-K2.5", 96)}


class CountingBucket:
    """A bucket whose files have headers alone. It counts requests and bytes, and gives none of the others."""

    uri = "s3://bucket/base"

    def __init__(self, files: dict[str, tuple[bytes, int]]) -> None:
        self.files, self.asked, self.range_bytes = files, Counter[str](), 0
        self._lock = threading.Lock()

    def _count(self, kind: str, size: int = 0) -> None:
        with self._lock:
            self.asked[kind] += 1
            self.asked["bytes"] += size

    def list(self, prefix: str = "") -> list[Entry]:
        self._count("LIST")
        when = datetime(2026, 1, 1, tzinfo=UTC)
        return [Entry(key, size, when, f"{key}-1") for key, (_, size) in sorted(self.files.items())]

    def get(self, key: str) -> bytes:
        self._count("GET", self.files[key][1])
        return self.files[key][0]

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        self._count("GET", end - start)
        head = self.files.get(key, (b"", 0))[0]
        return bytearray(head[start:end]).ljust(end - start, b"\0") if start < len(head) else bytearray()

    def create(self, key: str, data: bytes) -> None:
        self.files[key] = data, len(data)


@dataclass
class AnyRank:
    """In the place of `Partitioner`, for the rank at any `place`: partitions without memory."""

    division: Division
    place: int = 0
    apart: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    turns: defaultdict[int, Iterator[int]] = field(default_factory=lambda: defaultdict(count))

    @property
    def across(self) -> object:
        return object() if self.division.copies > 1 else None

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> "OfAnyRank":
        return OfAnyRank(prod(shape), self)

    def room(self, made: torch.Tensor) -> torch.Tensor:
        return made

    def read_part(self, partition: "OfAnyRank") -> "OfAnyRank":
        return partition


@dataclass
class OfAnyRank:
    """The part of a parameter that the rank reads whose turn it is to be counted."""

    numel: int
    ranks: AnyRank
    parameter: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.empty(0), requires_grad=False))

    @property
    def begin(self) -> int:
        return self.ranks.division.read_at(self.ranks.place, self.numel)[0]

    @property
    def end(self) -> int:
        return self.ranks.division.read_at(self.ranks.place, self.numel)[1]


@dataclass
class Start:
    """What the ranks of a start ask a store for: `metadata` before the weights, and `gets` of them."""

    base: str
    ranks: int
    scope: str
    cached: bool
    metadata: int
    metadata_bytes: int  # of the cache's manifest, for each rank
    gets: int
    read: int  # bytes
    most_of_a_rank: int
    files: int
    bytes: int  # of all weights that there are to be read

    def broken(self) -> list[str]:
        """A sentence for each bound that it breaks."""
        where = f"{self.base}, {self.ranks} ranks, scope {self.scope}{', cached' if self.cached else ''}"
        bounds = {
            "bytes read": (self.read, 1.05 * self.bytes),
            "GETs": (self.gets, 2 * self.bytes / PIECE),
            "metadata requests": (self.metadata, 2 * self.files + 2),
            "bytes of the cache's metadata": (self.metadata_bytes, 1e6),
        }
        return [
            f"{where}: {name} are {value:,}, allowed {most:,.0f}"
            for name, (value, most) in bounds.items()
            if value > most
        ]


class CountedBase:
    """The base `hub_id`, in 16 bits in so many files, or its first `layers`, as the ranks of a start find it."""

    def __init__(self, name: str, hub_id: str, files: int, folder: Path, layers: int | None = None) -> None:
        known = known_config(hub_id)
        assert known is not None
        settings = dict(known.get("text_config", known))
        settings.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(settings))
        shapes = stored_shapes(meta_model(model_config(folder, layers)))
        bucket: Any = CountingBucket(base_files(settings, shapes, files))
        self.name, self.bucket, self.files = name, bucket, files
        self.weights = sum(2 * prod(shape) for _, shape in shapes)
        self.config = parse_config(json.dumps(SETTINGS | {"model": {"base": bucket.uri, "layers": layers}}))
        locate.open_store = lambda *_, **__: bucket
        os.environ["XDG_CACHE_HOME"] = str(folder)
        told = locate._read_in_bucket(bucket)  # by rank 0, which tells the others
        asked = bucket.asked.copy()
        self.base = locate.resolve_base(self.config.model, told)  # as each other rank does
        self._sources = find_weights(self.base, self._empty(), layers).sources
        assert bucket.asked == asked, "a rank asks for what it was told"
        self.metadata = asked["GET"] + asked["LIST"]

    def _empty(self) -> Any:
        attention: Any = SimpleNamespace(name="sdpa")
        return empty_model(self.base, self.config, attention)

    def _placement(self, ranks: "AnyRank") -> Placement:
        quantizable, given = self.base.architecture.quantizable(), cast("Any", ranks)
        return place_partitions(self._empty(), self.config.quant, DTYPES["bf16"], given, self._sources, quantizable)

    def start(self, ranks: int, scope: str, *, cached: bool) -> "Start":
        """The requests of all ranks, each of which reads its part of every tensor."""
        holders = RANKS_PER_NODE if scope == "node" else ranks
        counted = AnyRank(Division(holders, ranks // holders))
        placement, packed, manifest = self._placement(counted), nothing_packed, b""
        expected = self.weights
        if cached:
            cache, partitions = CountingBucket({}), placement.partitions()
            base_cache._commit(cast("Any", cache), "0123abcd", cast("Any", partitions), {})
            manifest = cache.files[base_cache.MANIFEST][0]
            packed = base_cache.parse_manifest(cast("Any", cache), manifest).sources
            quantized = sum(module.slices * module.numel for module, _ in placement.packed.values())
            expected += sum(part.numel for part in partitions.values()) - 2 * quantized
        jobs = placement.jobs(packed)
        buckets = [self.bucket, *([cache] if cached else [])]
        before, most, last = sum((bucket.asked for bucket in buckets), Counter[str]()), 0, 0
        for place in range(ranks):
            counted.place = place
            for job in jobs:
                for piece in job.pieces():
                    piece.read()
            now = sum(bucket.asked["GET"] for bucket in buckets)
            most, last = max(most, now - last if place else 0), now
        asked = sum((bucket.asked for bucket in buckets), Counter[str]()) - before
        read = asked["GET"], asked["bytes"]
        return Start(self.name, ranks, scope, cached, self.metadata, len(manifest), *read, most, self.files, expected)


def stored_shapes(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that published files have for the parameters of a model: experts one by one."""
    found = list[tuple[str, tuple[int, ...]]]()
    for name, parameter in model.state_dict().items():
        shape, (stem, _, leaf) = tuple(parameter.shape), name.rpartition(".")
        if not stem.endswith("experts") or len(shape) != 3:
            found.append((name, shape))
            continue
        for expert in range(shape[0]):
            halves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            rows = shape[1] // len(halves)
            found += [(f"{stem}.{expert}.{half}.weight", (rows, shape[2])) for half in halves]
    return found


def base_files(
    config: dict[str, Any], tensors: list[tuple[str, tuple[int, ...]]], count: int
) -> dict[str, tuple[bytes, int]]:
    """Name -> (the first bytes, the size) of a base's files in 16 bits: `count` of about the same size have weights."""
    total, parts, size = sum(2 * prod(shape) for _, shape in tensors), [list[Any]()], 0
    for name, shape in tensors:
        if size >= total / count * len(parts) and len(parts) < count:
            parts.append([])
        parts[-1].append((name, "BF16", shape))
        size += 2 * prod(shape)
    files, where = dict[str, tuple[bytes, int]](), dict[str, str]()
    for number, part in enumerate(parts, 1):
        key, head = f"model-{number:05d}-of-{len(parts):05d}.safetensors", header_of(part)
        files[key] = head, len(head) + sum(2 * prod(shape) for _, _, shape in part)
        where |= dict.fromkeys((name for name, _, _ in part), key)
    small = {
        INDEX_FILE: json.dumps({"metadata": {"total_size": total}, "weight_map": where}).encode(),
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b"{}",
        "tokenizer_config.json": b"{}",
        "tokenizer.json": json.dumps({"model": {"vocab": {}}, "added_tokens": []}).encode().ljust(9_000_000),
    }
    return files | {name: (content, len(content)) for name, content in small.items()}


@dataclass
class Meeting:
    """Ranks that meet, the last of which comes `late` seconds after the others."""

    ranks: int
    late: float
    requests: int
    seconds: float  # from the last one's coming
    cpu: float  # seconds of rank 0's process, which serves the store

    def broken(self) -> list[str]:
        """A sentence for each bound that it breaks."""
        bounds = {
            "requests": (self.requests, 6 * self.ranks),
            "seconds": (self.seconds, 3),
            "CPU seconds": (self.cpu, 0.3),
        }
        where = f"{self.ranks} ranks meet, one {self.late:.0f} s late"
        return [
            f"{where}: {name} are {value:,.2f}, allowed {most}"
            for name, (value, most) in bounds.items()
            if value > most
        ]


def meeting(size: int, late: float, processes: int = 3, limit: float = 120) -> Meeting:
    """Rank 0 is a process of its own, as its CPU time is the cost that no number of machines divides. The others are
    threads of a few processes, which share this machine's cores, so the seconds are an upper bound."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    go, over, out = context.Event(), context.Event(), context.Queue()
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    variables["LOCAL_WORLD_SIZE"] = str(RANKS_PER_NODE)
    parts = [[0], *(list(range(1, size))[number::processes] for number in range(processes))]
    members = [
        context.Process(target=_meet_as, args=(part, size, late, limit, variables, go, over, out)) for part in parts
    ]
    for member in members:
        member.start()
    began = time.monotonic()
    go.set()
    found = [out.get(timeout=limit + 60) for _ in parts]
    over.set()
    for member in members:
        member.join()
    cpu = next(cpu for mine, _, _, cpu in found if mine == [0])
    ends = max(end for _, end, _, _ in found)
    return Meeting(size, late, sum(requests for _, _, requests, _ in found), ends - began - late, cpu)


def _meet_as(
    mine: list[int],
    size: int,
    late: float,
    limit: float,
    variables: dict[str, str],
    go: Any,
    over: Any,
    out: Any,
) -> None:
    """Meet as the ranks `mine`, each in a thread, and report (mine, end, requests, CPU seconds). `variables` are those
    of the environment that every rank of the group has."""
    os.environ |= variables
    threading.stack_size(256 * 1024)
    asked, lock, kept = Counter[str](), threading.Lock(), list[Any]()

    def one(rank: int) -> None:
        go.wait()
        time.sleep(late if rank == size - 1 else 0)
        looks = rank % RANKS_PER_NODE == 0
        kept.append(meetings._meet(rank, size, timedelta(seconds=limit), lambda rank: False, looks=looks))

    def counted(name: str, plain: Any) -> Any:
        def method(*arguments: Any) -> Any:
            with lock:
                asked[name] += 1
            return plain(*arguments)

        return method

    class Counted(meetings.PrefixStore):
        """A store that counts what it is asked."""

    for name in ("set", "add", "wait", "get", "check", "list_keys"):
        setattr(Counted, name, counted(name, getattr(meetings.PrefixStore, name)))
    meetings.PrefixStore = Counted  # type: ignore[misc]
    threads = [threading.Thread(target=one, args=(rank,)) for rank in mine]
    for thread in threads:
        thread.start()
    go.wait()
    began = time.process_time()
    for thread in threads:
        thread.join()
    out.put((mine, time.monotonic(), asked.total(), time.process_time() - began))
    over.wait()
    out.close()
    out.join_thread()
    os._exit(0)  # connections of a thousand ranks need not be closed one by one


@dataclass
class Groups:
    """The process groups of `scope: node`, one of each node's ranks and one of those with equal numbers.

    torch asks nothing by itself unless TORCH_DIST_INIT_BARRIER=1, which is counted here: the barrier of one group.
    """

    ranks: int
    requests: int  # of all ranks for both groups
    most_of_a_rank: int  # for one group

    def broken(self) -> list[str]:
        """A sentence if it breaks its bound."""
        allowed = 4
        if self.most_of_a_rank <= allowed:
            return []
        return [f"{self.ranks} ranks: a rank asks {self.most_of_a_rank} times for a group, allowed {allowed}"]


def groups(size: int) -> Groups:
    """Make the groups as the first and as the last rank of each that comes; the others ask what the first does."""
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:  # a process has one default group
        first, last = pool.starmap(_make_groups, [(size, False), (size, True)])
    nodes = size // RANKS_PER_NODE
    alone = [nodes, RANKS_PER_NODE]  # so many groups there are of each kind, and as many ranks are the last of theirs
    requests = sum(count * (size - ends) + other * ends for count, other, ends in zip(first, last, alone, strict=True))
    return Groups(size, requests, max(*first, *last))


def _make_groups(size: int, comes_last: bool) -> list[int]:
    """The requests of a rank for its two groups. Nothing is sent: the others are there, or all but this one are."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # has the backend that sends nothing

    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"

    class Others(torch.distributed.Store):  # pyright: ignore[reportPrivateImportUsage]
        """The store of the ranks, of whose groups all other members have come before, or none has."""

        asked = 0
        members = size

        def add(self, key: str, amount: int) -> int:
            self.asked += 1
            return self.members if comes_last else 1

        def set(self, key: str, value: Any) -> None:
            self.asked += 1

        def get(self, key: str) -> bytes:
            self.asked += 1
            return b"1"

        def wait(self, keys: list[str], timeout: Any = None) -> None:
            self.asked += 1

    class Untimed(meetings.World):
        """A rank whose backend has no time limit."""

        timeout = timedelta(seconds=60)  # pyright: ignore[reportAssignmentType]

    store = Others()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=size)
    rank = Untimed(0, size, RANKS_PER_NODE, 0, torch.device("cpu"))
    found = list[int]()
    for make, each in ((rank.group_of, RANKS_PER_NODE), (rank.group_across, size // RANKS_PER_NODE)):
        store.asked, store.members = 0, each
        make(RANKS_PER_NODE)
        found.append(store.asked)
    return found


SETTINGS: dict[str, Any] = {
    "run": {"name": "x", "store": "memory://"},
    "data": {"train": [{"path": "none.jsonl"}], "sequence_length": 4096},
    "train": {"steps": 10, "global_batch": 1024},
}
