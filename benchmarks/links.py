"""The load of `sharding.scope: node` over slow links: nodes that read a base together, and nodes that each read it all.

    python benchmarks/links.py [--hidden 3072] [--layers 1] [--nodes 2] [--times 2]     (root, and Slurm: see .ci/run)

Virtual nodes with two CPU ranks each, and one more that serves the base over S3's protocol, in network namespaces of
this machine. `tc` limits links in both directions: those of the nodes that read, or that of the server, as a bucket
gives all nodes together only so much. "together" is the run's own load: all ranks read each byte once and exchange
packed shares between nodes. In "each" every node is a world of its own, whose ranks read the whole base for themselves.
Both load the same base in NF4 one after the other; the shares of each rank are compared to the bit. The control is a
free link, over which all ranks share this machine's processors: "each" quantizes the base once for each node there.

Matrices are large, as those of bases that need several nodes: of one below 4 MiB a rank, a rank reads the parts of its
neighbours too and passes them on in 16 bits.

Bytes are those that the kernel counted on the interfaces of the nodes that read. Ends with exit code 1 if a share
differs, if more than 1.05 x the base is read together, or if a load over a limited link is not faster together.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any, cast

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the cluster that the tests share

from benchmarks.load import make_base
from tests.slurm.cluster import NETWORK, Cluster, missing

RANKS, PORT, MEETING = 2, 8333, 29400
LINKS: dict[str, tuple[str | None, str | None]] = {
    "free": (None, None),
    "each node 50 Mbit/s": ("50mbit", None),
    "the server 100 Mbit/s": (None, "100mbit"),
}
WAYS = ("each", "together")


class Bucket(BaseHTTPRequestHandler):
    """The part of S3 that reading takes, for the files of `folder`."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if "list-type=2" in query:
            objects = "".join(
                f"<Contents><Key>base/{file.name}</Key><LastModified>2026-01-01T12:00:00.000Z</LastModified>"
                f"<ETag>1</ETag><Size>{file.stat().st_size}</Size></Contents>"
                for file in sorted(self.folder.iterdir())
            )
            listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
            return self._send(200, listing.encode())
        file = self.folder / path.removeprefix("/bucket/base/")
        if not file.is_file():
            return self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if (asked := self.headers.get("Range")) is None:
            return self._send(200, file.read_bytes())
        first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
        with file.open("rb") as data:
            data.seek(first)
            part = data.read(last + 1 - first)
        return self._send(206, part, f"bytes {first}-{first + len(part) - 1}/{file.stat().st_size}")

    def _send(self, status: int, body: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 12:00:00 GMT"}
        for name, value in (headers | ({"Content-Range": content_range} if content_range else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(folder: Path) -> None:
    """Serve the files of `folder`, until this process is ended."""
    Bucket.folder = folder
    ThreadingHTTPServer(("", PORT), Bucket).serve_forever()


@dataclass(frozen=True)
class Order:
    """The load of one node: the ranks begin once the file `go` is there, which they wait for after their imports."""

    node: int
    nodes: int
    together: bool
    folder: str

    def environment(self, rank: int) -> dict[str, str]:
        """What tells the rank at this place of the node where it is."""
        first, world = (RANKS * self.node, RANKS * self.nodes) if self.together else (0, RANKS)
        return {
            "RANK": str(first + rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": f"{NETWORK}.{11 if self.together else 11 + self.node}",
            "MASTER_PORT": str(MEETING),
            "GLOO_SOCKET_IFNAME": "eth0",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }


def load_on_a_node(order: Order) -> None:
    """Start the ranks of a node; prints the results of each as JSON."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(RANKS) as pool:
        print(json.dumps(pool.starmap(_load, [(order, rank) for rank in range(RANKS)], chunksize=1)))


def _load(order: Order, rank: int) -> dict[str, Any]:
    os.environ.update(order.environment(rank))
    import torch

    from trainer.base.find.locate import resolve_base_alike
    from trainer.base.load.load import load_model
    from trainer.config import parse_config
    from trainer.model.attention import Attention
    from trainer.processes.ranks import join
    from trainer.state.zero.policy import build_deepspeed_config

    torch.set_num_threads(1)
    ranks = join()
    config = parse_config(
        json.dumps(
            {
                "run": {"name": "links", "store": "memory://"},
                "model": {"base": "s3://bucket/base"},
                "data": {"train": [{"path": "none.jsonl"}]},
                "train": {"steps": 1},
                "sharding": {"scope": "node"},
            }
        )
    )
    base = resolve_base_alike(config.model, ranks)
    settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
    Path(order.folder, f"ready-{order.node}-{rank}").touch()
    while not Path(order.folder, "go").exists():
        time.sleep(0.02)
    ranks.gather(0.0)
    began = time.monotonic()
    model, report = load_model(base, config, settings, ranks.world, Attention("sdpa", ""), "node")
    ranks.gather(0.0)
    seconds, digest = time.monotonic() - began, hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + cast("Any", parameter).ds_tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return {"seconds": seconds, "read": report.read_bytes, "share": digest.hexdigest()}


@dataclass(frozen=True)
class Load:
    """The seconds of the slowest rank, the bytes of the base that all read and that nodes received, and each share."""

    seconds: float
    read: int
    received: int
    shares: list[list[str]]


def measure(cluster: Cluster, nodes: int, together: bool, link: str) -> Load:
    reader, server = LINKS[link]
    readers = cluster.nodes[:nodes]
    with tempfile.TemporaryDirectory(dir=cluster.folder.parent) as folder, ThreadPoolExecutor(nodes) as pool:
        orders = [Order(node, nodes, together, folder) for node in range(nodes)]
        running = [pool.submit(_run, cluster, name, order) for name, order in zip(readers, orders, strict=True)]
        while len(list(Path(folder).glob("ready-*"))) < RANKS * nodes:
            for one in running:
                if one.done():
                    one.result()  # which raises what has failed
            time.sleep(0.1)
        for name in readers:
            cluster.limit(name, reader)
        cluster.limit(cluster.nodes[-1], server)
        before = sum(map(cluster.received_bytes, readers))
        Path(folder, "go").touch()
        found = [one.result() for one in running]
        received = sum(map(cluster.received_bytes, readers)) - before
        for name in cluster.nodes:
            cluster.limit(name, None)
    every = [rank for node in found for rank in node]
    shares = [[rank["share"] for rank in node] for node in found]
    return Load(max(rank["seconds"] for rank in every), sum(rank["read"] for rank in every), received, shares)


def _run(cluster: Cluster, name: str, order: Order) -> list[dict[str, Any]]:
    given = ["--load", json.dumps(vars(order))]
    told = cluster.run(sys.executable, __file__, *given, on=name, timeout=900, environment=_bucket(cluster))
    return json.loads(told.splitlines()[-1])


def _bucket(cluster: Cluster) -> Mapping[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://{NETWORK}.{10 + len(cluster.nodes)}:{PORT}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(cluster.folder.parent / "cache"),
        "NO_PROXY": "*",
    }


def compare(cluster: Cluster, nodes: int, times: int, size: int, console: Console) -> list[str]:
    """Measure and show all loads. Returns a sentence for each bound that breaks."""
    shown = Table("link", "nodes read", "load", "each / together", "of the base read", "received by the nodes")
    broken, shares = list[str](), list[list[list[str]]]()
    for link in LINKS:
        loads = {way: [measure(cluster, nodes, way == "together", link) for _ in range(times)] for way in WAYS}
        seconds = {way: median(load.seconds for load in loads[way]) for way in WAYS}
        ratio = seconds["each"] / seconds["together"]
        for way in WAYS:
            load = loads[way][0]
            cells = (f"{seconds[way]:.1f} s", f"{ratio:.2f}" if way == "together" else "")
            shown.add_row(link, way, *cells, f"{load.read / size:.2f} x", decimal(load.received))
            shares += [load.shares for load in loads[way]]
        if loads["together"][0].read > 1.05 * size:
            broken.append(f"{link}: {loads['together'][0].read:,} bytes are read together, of {size:,}")
        if LINKS[link] != (None, None) and ratio <= 1:
            broken.append(f"{link}: together takes {seconds['together']:.1f} s, and each {seconds['each']:.1f} s")
    if any(share != shares[0] for share in shares) or any(node != shares[0][0] for node in shares[0]):
        broken.append("the shares of a rank differ")
    console.print(shown)
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--load", type=lambda text: Order(**json.loads(text)), help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve)
    if given.load:
        return load_on_a_node(given.load)
    console = Console(width=140)
    if why := missing():
        return console.print(f"skipped: {why}")
    with tempfile.TemporaryDirectory(prefix="capstan-") as folder, ThreadPoolExecutor(1) as pool:
        make_base(base := Path(folder, "base"), given.layers, given.hidden, vocabulary=4096)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        console.print(f"a base of {decimal(size)}, {given.nodes} nodes of {RANKS} ranks")
        with Cluster(Path(folder, "cluster"), given.nodes + 1) as cluster:
            serving = [sys.executable, __file__, "--serve", base]
            pool.submit(cluster.attempt, *serving, on=cluster.nodes[-1], timeout=86400)
            broken = compare(cluster, given.nodes, given.times, size, console)
    if broken:
        raise SystemExit("\n".join(broken))
    return None


if __name__ == "__main__":
    main()
