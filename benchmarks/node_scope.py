"""Traffic between nodes and step time: the frozen base divided over all ranks, or over the ranks of each node.

    python benchmarks/node_scope.py [--hidden 512] [--layers 8] [--steps 6]     (root, and Slurm: see .ci/run)

Two virtual nodes with two CPU ranks each, in network namespaces of this machine under a real Slurm, each with an
address of its own. Bytes are those that the kernel counted on the nodes' network interfaces: a step's are the
difference of two runs of different length, divided by the steps between, so that start and load cancel. Step times are
medians without a limit, and with each node's link limited by `tc` in both directions.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the cluster that the tests share

from launcher.view.status import read_generation
from tests.slurm.cluster import Cluster, missing
from tests.slurm.site import Site
from trainer.base.find.locate import resolve_base
from trainer.config import load_config
from trainer.plan.plan import make_plan

SCOPES = ("world", "node")
RATES = (None, "1gbit", "100mbit")
NODES = ("n1", "n2")


@dataclass(frozen=True)
class Measured:
    """One run: bytes that both nodes received in all, and the median seconds of its steps after the second."""

    received: int
    step_seconds: float


def measure(site: Site, scope: str, rate: str | None, steps: int) -> Measured:
    name = f"{scope}-{rate or 'free'}-{steps}"
    for node in NODES:
        site.cluster.limit(node, rate)
    before = sum(map(site.cluster.received_bytes, NODES))
    config = site.config(
        name,
        "cluster.slurm.launch=direct",
        "cluster.slurm.exclude=n3",
        f"sharding.scope={scope}",
        "sharding.deepspeed=cpu",
        f"train.steps={steps}",
        "checkpoint.every_steps=0",
    )
    job = site.submit(config)
    site.assert_ends(name, job, "COMPLETED")
    records = read_generation(site.run(name), 1)["step"]
    seconds = statistics.median(record["seconds"] for record in records[2:])
    received = sum(map(site.cluster.received_bytes, NODES)) - before
    return Measured(received, seconds)


def planned(site: Site, scope: str) -> int:
    """Bytes that both nodes receive from each other in a step, by `capstan plan`."""
    config = load_config(site.config("plan", f"sharding.scope={scope}", "sharding.deepspeed=cpu"))
    plan = make_plan(config, resolve_base(config.model).description, 4, 2, None)
    return 4 * plan.traffic_per_step.from_other_nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    console = Console()
    if why := missing():
        console.print(f"skipped: {why}")
        return
    sizes = {
        "hidden_size": given.hidden,
        "intermediate_size": 11 * given.hidden // 4,
        "num_hidden_layers": given.layers,
    }
    with tempfile.TemporaryDirectory(prefix="capstan-") as folder, Cluster(Path(folder, "cluster")) as cluster:
        site = Site(cluster, Path(folder), shard_size="50MB", **sizes)
        found: dict[tuple[str, str | None], Measured] = {}
        with Progress(console=Console(stderr=True)) as progress:
            for scope, rate in progress.track(
                [(scope, rate) for scope in SCOPES for rate in RATES], description="runs"
            ):
                found[scope, rate] = measure(site, scope, rate, given.steps if rate else 3 * given.steps)
        console.print(table(site, 2 * given.steps, found))


def table(site: Site, steps_between: int, found: dict[tuple[str, str | None], Measured]) -> Table:
    shown = Table("scope", "between nodes, a step", "by capstan plan", "free link", "1 Gbit/s", "100 Mbit/s")
    for scope in SCOPES:
        shorter = (found[scope, "1gbit"].received + found[scope, "100mbit"].received) / 2
        traffic = (found[scope, None].received - shorter) / steps_between
        seconds = [f"{found[scope, rate].step_seconds:.2f} s" for rate in RATES]
        shown.add_row(scope, decimal(int(traffic)), decimal(planned(site, scope)), *seconds)
    return shown


if __name__ == "__main__":
    main()
