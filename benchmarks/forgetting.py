"""A base's loss on what it knew, before and after it is trained on something narrow for long, without and with replay.

    python benchmarks/forgetting.py [--steps 120] [--pretrain 250] [--replay 0.3]

The base is a small Llama, made on the spot, that has read the source code of Python's standard library. Three runs go
on from it: `narrow` learns a few questions about the library, again and again; `replay` does the same, with a share of
each epoch's tokens from source code (`data.train[].fraction`); `control` is as long, and reads that source code alone.
Each is then measured by `capstan evaluate` on its `task`, those few questions, and on `general`, source code that no
run has trained on. The script fails unless `general` gets worse for certain by `narrow`, less so by `replay`, and not
by `control`, as training alone makes no model forget.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from methods import CHARACTERS, PROMPT, SIZES, questions, write_rows

from launcher.smoke.sample import Sizes, make_sample, source_code, source_files

NARROW, GENERAL, REPLAYED = 16, 40, 200  # questions, and modules
ONE_RANK = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


def make_material(folder: Path, pretrain: int) -> str:
    """Write the rows, and return the base, which has read the source code for `pretrain` steps."""
    sample = make_sample(folder / "sample", sizes=Sizes(**SIZES, steps=pretrain))
    known = [code[:CHARACTERS] for code in map(source_code, source_files()) if len(code) > CHARACTERS]
    write_rows(folder / "task.jsonl", questions(sample.train)[:NARROW])
    for name, part in (("general", known[:GENERAL]), ("code", known[GENERAL : GENERAL + REPLAYED])):
        write_rows(folder / f"{name}.jsonl", [(code[:PROMPT], code[PROMPT:]) for code in part])
    return sample.base


def settings(folder: Path, base: str, name: str, steps: int, replay: float) -> dict[str, Any]:
    """The configuration of one of the runs."""
    task, code = {"path": str(folder / "task.jsonl")}, {"path": str(folder / "code.jsonl")}
    rows = {"narrow": [task], "replay": [task, {**code, "fraction": replay}], "control": [code]}
    return {
        "run": {"name": name, "store": str(folder / "store")},
        "model": {"base": base},
        "data": {"train": rows[name], "format": "prompt_completion", "sequence_length": 128},
        "optim": {"lr": 3e-3},
        "train": {"steps": steps, "global_batch": 4, "micro_batch": 4, "activation_checkpointing": False},
        "eval": {"sets": {"general": {"path": str(folder / "general.jsonl")}}},
        "cluster": {"gpus_per_worker": 0, "threads_per_worker": 1},
        "track": {"tensorboard": False},
    }


def measured(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate a run, show what `capstan evaluate` prints, and return its findings for each set."""
    name, steps = config["run"]["name"], config["train"]["steps"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, *ONE_RANK, "-m", "launcher.cli", "train", str(path)], stdout=sys.stderr, check=True)
    print(f"$ capstan evaluate {name}", flush=True)
    task = f"--set=task={folder / 'task.jsonl'}"  # a start refuses evaluation data that it trains on
    evaluate = [sys.executable, "-m", "launcher.cli", "evaluate", name, "--store", config["run"]["store"], task]
    subprocess.run(evaluate, env={**os.environ, "COLUMNS": "100"}, check=True)
    return json.loads((folder / "store" / name / f"evaluations/step-{steps:09d}.json").read_text())["sets"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pretrain", type=int, default=250, help="steps in which the base reads the source code")
    parser.add_argument("--replay", type=float, default=0.3, help="share of an epoch's tokens that is source code")
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        base = make_material(folder, given.pretrain)
        found = {
            run: measured(folder, settings(folder, base, run, given.steps, given.replay))
            for run in ("narrow", "replay", "control")
        }
    for run, sets in found.items():
        for part, one in sets.items():
            low, high = one["interval"]
            before, after = one["base"]["loss"], one["adapter"]["loss"]
            print(f"{run}, {part}: {before:.3f} -> {after:.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    narrow, replay, control = (found[run]["general"]["interval"] for run in ("narrow", "replay", "control"))
    failed = [
        sentence
        for sentence, holds in (
            ("narrow training has not made the model forget", narrow[0] > 0),
            ("replay has not made it forget less", replay[1] < narrow[0]),
            ("the control has forgotten too", control[0] <= 0),
        )
        if not holds
    ]
    sys.exit("; ".join(failed) or 0)


if __name__ == "__main__":
    main()
