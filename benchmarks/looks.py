"""Measures what the search for wrong bytes costs, and that it finds none where there are none.

    python benchmarks/looks.py [--work DIR] [--steps 300] [--ranks 2] [--probe 200] [--share 0.01]
                               [--small]

Two runs train the sample of `capstan smoke` on this machine's CPU, one with the search and the probes and one without.
With --small its base has two layers of width 64 and a rank has a row of 64 tokens, so that many steps take little time.
The script fails unless both have the same losses, norms and checkpoints, to the bit, and no wrong byte was found. It
prints the share of a step that the search has taken on rank 0, and the seconds of a probe.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from killed import settings

from launcher.smoke.sample import Sizes, make_sample
from launcher.view.status import read_generation
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.store import Store, open_store

SMALL = Sizes(vocabulary=512, hidden=64, intermediate=128, layers=2, batch=1, sequence_length=64)


def trained(folder: Path, name: str, *, ranks: int, small: bool, train: dict[str, Any]) -> Store:
    """A run that has finished."""
    path = settings(
        folder,
        name,
        data={"sequence_length": SMALL.sequence_length} if small else {},
        train={"global_batch": (SMALL.batch if small else 2) * ranks, **train},
        checkpoint={"every_steps": max(1, train["steps"] // 3)},
        cluster={"workers": ranks},
        track={"print_steps": 100},
    )
    subprocess.run([sys.executable, "-m", "launcher.cli", "train", str(path)], check=True)
    return open_store(str(folder / "runs" / name))


def came_of(run: Store) -> tuple[list[tuple[int, float, float]], list[str]]:
    """Step, loss and norm of each update, and the hashes of the newest checkpoint's shards."""
    steps = [(record["step"], record["loss"], record["grad_norm"]) for record in read_generation(run, 1)["step"]]
    return steps, [shard.sha256 for shard in read_manifest(run, max(committed_steps(run))).shards]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for the runs; default: a temporary one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--probe", type=int, default=200, help="train.probe_every")
    parser.add_argument("--share", type=float, default=0.01, help="train.look_share")
    parser.add_argument("--small", action="store_true", help="short steps")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="capstan-looks-") as temporary:
        folder: Path = given.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_sample(folder / "sample", SMALL if given.small else None)
        steps, run = {"steps": given.steps}, partial(trained, folder, ranks=given.ranks, small=given.small)
        looks = run("looks", train={**steps, "look_share": given.share, "probe_every": given.probe})
        plain = run("plain", train={**steps, "look_share": 0.0, "probe_every": 0})
        records = read_generation(looks, 1)
        shares = [record["look_seconds"] / record["seconds"] for record in records["step"]]
        probes = [record["seconds"] for record in records["probe"]]
        seconds = [statistics.median(r["seconds"] for r in read_generation(one, 1)["step"]) for one in (looks, plain)]
        alarms, same = len(records["wrong_bytes"]), came_of(looks) == came_of(plain)
    print(f"steps: {given.steps:,}; probes: {len(probes):,}; wrong bytes found: {alarms}")
    print(f"losses, norms and checkpoint: {'the same bits' if same else 'OTHER'}")
    print(f"the search takes {100 * statistics.median(shares):.2f} % of a step (median), {1000 * seconds[0]:.0f} ms")
    print(f"a step without it: {1000 * seconds[1]:.0f} ms; a probe: {1000 * statistics.median(probes or [0]):.0f} ms")
    if alarms or not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
