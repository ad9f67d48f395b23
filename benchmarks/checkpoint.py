"""Cost of a checkpoint: ours beside DeepSpeed's save_checkpoint and torch's distributed checkpoint (DCP) async_save.

    python benchmarks/checkpoint.py [--ranks 2] [--methods lora full] [--repeats 3]

All sides save and restore the same state of one engine (a random base under ZeRO-3, in 4 bits with LoRA or in 16 bits
and learning itself), one after the other, to one disk and one S3 server (SeaweedFS) on this machine. DeepSpeed and DCP
write files; for S3 these are uploaded by obstore afterwards, which counts as time to commit and not as a stall. DCP
gets what learns, as ours does.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load import make_base, run_config
from ranks import become_rank, run_ranks
from rich.console import Console
from rich.table import Table

TOKENS = 512  # of a rank in a step: a short one, which makes the share of a stall large
SIDES = ("ours", "DeepSpeed", "DeepSpeed, frozen excluded", "DCP async_save")
# Method -> layers and width of its base, and its settings.
SUBJECTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "lora": (4, 2048, ("tuning.rank=128",)),
    "full": (8, 256, ("tuning.method=full", "quant.type=none")),
}


@dataclass
class Bench:
    """The objects that all compared sides use on one rank."""

    ranks: Any
    engine: Any
    folder: Path
    remote: Any  # a Store in the bucket

    def step(self) -> float:
        """Seconds of one training step."""
        import torch

        from trainer.model.micro_batch import MicroBatch, ModelInput, Segments

        tokens = torch.arange(TOKENS).remainder(1000)[None]
        row = ModelInput.of(tokens, torch.arange(TOKENS)[None], Segments.of_documents([TOKENS]))
        batch = MicroBatch(row, tokens, TOKENS, TOKENS)
        self.ranks.gather(0.0)
        started = time.monotonic()
        self.engine.backward(self.engine.loss(batch) / TOKENS, last=True)
        self.engine.step(1e-4)
        self.ranks.gather(0.0)
        return time.monotonic() - started

    def upload(self, folder: Path) -> None:
        """This rank's part of the files in `folder`, to the bucket."""
        self.ranks.gather(0.0)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files[self.ranks.rank :: self.ranks.world_size]:
            self.remote.put(f"{folder.name}/{path.relative_to(folder)}", path.read_bytes())
        self.ranks.gather(0.0)

    def download(self, folder: Path) -> None:
        if self.ranks.rank == 0:
            shutil.rmtree(folder)
            for entry in self.remote.list(f"{folder.name}/"):
                path = folder.parent / entry.key
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.remote.get(entry.key))
        self.ranks.gather(0.0)


class Ours:
    def __init__(self, bench: Bench, place: str) -> None:
        from trainer.config import Checkpoint
        from trainer.state.checkpoint.checkpoints import Checkpoints, CommitHooks
        from trainer.state.checkpoint.identity import Identity
        from trainer.store.store import open_store

        store = open_store(str(bench.folder / "ours")) if place == "disk" else bench.remote.sub("ours")
        self.bench, self.run, self.steps = bench, store, 0
        rules = Checkpoint(keep_last=1)
        self.checkpoints = Checkpoints(
            store, bench.ranks, 1, Identity("", {}, {}), rules, CommitHooks(lambda kind, **_: None)
        )

    def save(self) -> Callable[[], None]:
        self.steps += 1
        self.checkpoints.save(self.bench.engine, self.steps, {})
        return self.checkpoints.finish

    def clear(self) -> None:
        """Retention has made room."""

    def restore(self) -> None:
        assert self.checkpoints.restore(self.bench.engine, required=True, log=print)

    def size(self) -> int:
        from trainer.run.layout import manifest
        from trainer.state.checkpoint.manifest import committed_steps, read_manifest

        step = committed_steps(self.run)[0]
        return read_manifest(self.run, step).size + self.run.head(manifest(step)).size


class Files:
    """The common part of DeepSpeed and DCP: files in a folder, which go to the bucket afterwards."""

    def __init__(self, bench: Bench, place: str) -> None:
        self.bench, self.place, self.count = bench, place, 0
        self.folder = bench.folder

    def begin(self) -> None:
        self.count += 1
        self.folder = self.bench.folder / f"{type(self).__name__}-{self.place}-{self.count}"

    def clear(self) -> None:
        """Make room for the next save."""
        if self.count and self.bench.ranks.rank == 0:
            shutil.rmtree(self.folder)
        self.bench.ranks.gather(0.0)

    def commit(self) -> None:
        if self.place == "S3":
            self.bench.upload(self.folder)

    def fetch(self) -> None:
        if self.place == "S3":
            self.bench.download(self.folder)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class DeepSpeed(Files):
    exclude_frozen = False

    def save(self) -> Callable[[], None]:
        self.begin()
        wrapped = self.bench.engine._engine
        wrapped.save_checkpoint(str(self.folder), tag="tag", exclude_frozen_parameters=self.exclude_frozen)
        return self.commit

    def restore(self) -> None:
        self.fetch()
        self.bench.engine._engine.load_checkpoint(
            str(self.folder), tag="tag", load_module_strict=not self.exclude_frozen
        )


class DeepSpeedWithoutFrozen(DeepSpeed):
    exclude_frozen = True


class Dcp(Files):
    def __init__(self, bench: Bench, place: str) -> None:
        import torch.distributed as dist

        super().__init__(bench, place)
        # DCP needs a group of its own: its background thread calls collectives, beside those of training.
        self.group: Any = dist.new_group(backend="gloo")

    def state(self) -> dict[str, Any]:
        """Each rank's partitions under names of their own: ZeRO-3's are plain tensors, which DCP takes for copies."""
        rank = self.bench.ranks.rank
        return {
            f"{rank}|{part.name}|{key}": values
            for part in self.bench.engine.partitions()
            for key, values in part.states.items()
            if part.end > part.begin
        }

    def save(self) -> Callable[[], None]:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.begin()
        future: Any = async_save(self.state(), checkpoint_id=str(self.folder), process_group=self.group)

        def commit() -> None:
            future.result()
            self.commit()

        return commit

    def restore(self) -> None:
        from torch.distributed.checkpoint.state_dict_loader import load

        self.fetch()
        load(self.state(), checkpoint_id=str(self.folder))


def measure(bench: Bench, side: str, place: str, repeats: int) -> dict[str, float]:
    """Medians over `repeats` saves, in seconds; the first save of a side, which allocates its memory, by itself."""
    kind: Any = (Ours, DeepSpeed, DeepSpeedWithoutFrozen, Dcp)[SIDES.index(side)]
    subject = kind(bench, place)
    stalls, commits, steps, restores = [], [], [], []
    for _ in range(1 + repeats):
        subject.clear()
        bench.ranks.gather(0.0)
        started = time.monotonic()
        finish = subject.save()
        stalls.append(time.monotonic() - started)
        finish()
        bench.ranks.gather(0.0)
        commits.append(time.monotonic() - started)
    for _ in range(repeats):
        subject.clear()
        finish = subject.save()
        steps.append(bench.step())
        finish()
    for _ in range(repeats):
        bench.ranks.gather(0.0)
        started = time.monotonic()
        subject.restore()
        bench.ranks.gather(0.0)
        restores.append(time.monotonic() - started)
    median = statistics.median
    mine = (stalls[0], median(stalls[1:]), median(commits[1:]), median(steps), median(restores))
    slowest = [max(column) for column in zip(*bench.ranks.gather(*mine), strict=True)]
    names = ("first_stall", "stall", "commit", "step", "restore")
    return {**dict(zip(names, slowest, strict=True)), "bytes": bench.ranks.sum(subject.size()) / bench.ranks.world_size}


def rank_main(rank: int, world: int, port: int, folder: str, bucket: str, method: str, repeats: int) -> None:
    become_rank(rank, world, port)
    import logging

    import torch

    from trainer.base.load.load import DTYPES
    from trainer.config import override
    from trainer.model.attention import choose_attention
    from trainer.plan.assemble import ShardingPlan, assemble
    from trainer.plan.resolve import resolve
    from trainer.processes.ranks import join
    from trainer.state.zero.policy import build_deepspeed_config
    from trainer.store.store import open_store

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    ranks = join()
    config = override(run_config(Path(folder, "base")), *SUBJECTS[method][2])
    settings = build_deepspeed_config(config, world_size=world, accumulation=1, on_gpu=False)
    resolved = resolve(config)
    attention = choose_attention("sdpa", ranks.device, DTYPES["bf16"], resolved.base.architecture.attention_needs)
    engine, _ = assemble(resolved, ranks, attention, ShardingPlan(settings, "world"))
    bench = Bench(ranks, engine, Path(folder), open_store(bucket))
    bench.step()
    undisturbed = statistics.median(bench.step() for _ in range(repeats))
    trainable = sum(torch.Size(part.shape).numel() for part in engine.partitions())
    report: dict[str, Any] = {"step": undisturbed, "trainable": trainable, "rows": []}
    for place in ("disk", "S3"):
        for side in SIDES:
            if method == "full" and side == "DeepSpeed, frozen excluded":
                continue  # nothing is frozen
            report["rows"].append({"side": side, "place": place, **measure(bench, side, place, repeats)})
    if rank == 0:
        Path(folder, "report.json").write_text(json.dumps(report))


def show(report: dict[str, Any], method: str, ranks: int) -> None:
    optimum = 12 * report["trainable"]
    table = Table(
        "save", "to", "stall, ms", "of a step", "first, ms", "MB", "of 12 B a parameter", "commit, s", "step beside it",
        "restore, s",
        title=f"{method}: {report['trainable'] / 1e6:.1f} M trainable parameters, {ranks} ranks, step of {report['step']:.2f} s",
        caption=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    )  # fmt: skip
    for row in report["rows"]:
        table.add_row(
            row["side"],
            row["place"],
            f"{1e3 * row['stall']:.1f}",
            f"{row['stall'] / report['step']:.1%}",
            f"{1e3 * row['first_stall']:.0f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes'] / optimum:.3f}",
            f"{row['commit']:.2f}",
            f"{row['step'] / report['step'] - 1:+.0%}",
            f"{row['restore']:.2f}",
        )
    Console(width=140).print(table)


def compare(method: str, ranks: int, repeats: int) -> dict[str, Any]:
    """The report of all sides over the base of `method`."""
    from launcher.smoke.local_s3 import S3Server

    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder, S3Server(Path(folder, "s3")) as server:
        os.environ.update(server.environment)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_base, (Path(folder, "base"), *SUBJECTS[method][:2]))
        run_ranks(rank_main, ranks, folder, server.uri("bench"), method, repeats, seconds=1800)
        return json.loads(Path(folder, "report.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=[*SUBJECTS], default=[*SUBJECTS])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for method in arguments.methods:
        show(compare(method, arguments.ranks, arguments.repeats), method, arguments.ranks)


if __name__ == "__main__":
    main()
