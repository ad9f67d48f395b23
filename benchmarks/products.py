"""What `train.products: fp8` costs in accuracy: a base that learns by FP8 products beside plain ones, and beside another seed.

    python benchmarks/products.py [--steps 200] [--pretrain 150] [--seeds 0 1]

The base is a small Llama, made on the spot, that has read the source code of Python's standard library; it learns by LoRA over NF4 in bf16 to
explain the library. CPUs compute FP8 products by the rules of GPUs, so their losses are those that a GPU would have but for the order of sums.
Runs of one seed see the same rows in the same order. `apart` is how far a run's loss is from that of plain products, averaged over the steps;
`noise` is how far two seeds' losses are apart over the last quarter and on held-out questions. The script fails unless FP8 stays within it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import yaml
from forgetting import ONE_RANK
from methods import HELD_OUT, SIZES, questions, write_rows

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from launcher.smoke.sample import Sizes, make_sample  # noqa: E402
from trainer.run import layout  # noqa: E402
from trainer.store.store import open_store  # noqa: E402


def settings(folder: Path, base: str, products: str, seed: int, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": f"{products}-{seed}", "store": str(folder / "store"), "seed": seed},
        "model": {"base": base},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "task.jsonl")}],
            "format": "prompt_completion",
            "sequence_length": 128,
        },
        "optim": {"lr": 3e-3},
        "train": {
            "steps": steps,
            "global_batch": 8,
            "micro_batch": 8,
            "activation_checkpointing": False,
            "products": products,
        },
        "cluster": {"gpus_per_worker": 0, "threads_per_worker": 1},
        "track": {"tensorboard": False},
    }


class Found(NamedTuple):
    """A run's losses by step, and that on held-out questions at its end, in nats."""

    steps: list[float]
    held_out: float

    @property
    def last(self) -> float:
        return mean(self.steps[-len(self.steps) // 4 :])


def measured(folder: Path, config: dict[str, Any]) -> Found:
    path = folder / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, *ONE_RANK, "-m", "launcher.cli", "train", str(path)], stdout=sys.stderr, check=True)
    run = open_store(config["run"]["store"]).sub(config["run"]["name"])
    records = [json.loads(line) for entry in run.list(layout.METRICS) for line in run.get(entry.key).splitlines()]
    (held_out, *_) = [record["loss"] for record in reversed(records) if record["kind"] == "eval"]
    return Found([record["loss"] for record in records if record["kind"] == "step"], held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretrain", type=int, default=150, help="steps in which the base reads the source code")
    parser.add_argument("--seeds", type=int, nargs=2, default=[0, 1])
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        sample = make_sample(folder / "sample", sizes=Sizes(**SIZES, steps=given.pretrain))
        write_rows(folder / "train.jsonl", questions(sample.train))
        write_rows(folder / "task.jsonl", questions(sample.eval)[:HELD_OUT])
        found = {
            (products, seed): measured(folder, settings(folder, sample.base, products, seed, given.steps))
            for products in ("plain", "fp8")
            for seed in given.seeds
        }
    first, second = given.seeds
    noise = [
        abs(getattr(found["plain", first], part) - getattr(found["plain", second], part))
        for part in ("last", "held_out")
    ]
    print("| products | seed | last quarter | held out | apart, a step |\n|---|---|---|---|---|")
    for (products, seed), run in found.items():
        apart = mean(abs(a - b) for a, b in zip(run.steps, found["plain", seed].steps, strict=True))
        print(f"| {products} | {seed} | {run.last:.4f} | {run.held_out:.4f} | {apart:.4f} |")
    print(f"noise of seeds: {noise[0]:.4f} and {noise[1]:.4f} nats")
    wide = [
        max(abs(getattr(found["fp8", seed], part) - getattr(found["plain", seed], part)) for seed in given.seeds)
        for part in ("last", "held_out")
    ]
    print(f"fp8 from plain, same seed, at most: {wide[0]:.4f} and {wide[1]:.4f} nats")
    if any(one > other for one, other in zip(wide, noise, strict=True)):
        raise SystemExit("FP8 products cost more than another seed does")


if __name__ == "__main__":
    main()
