"""Every method of fine-tuning on one small task: what it costs, what it learns, and what the base forgets of what it
knew.

    python benchmarks/methods.py [--methods lora ia3 ...] [--steps 40] [--pretrain 150]

The base is a small Llama, made on the spot: it has read the source code of Python's standard library, and is to learn
to explain the library from questions and docstrings. `task` is the loss on questions that were held out, `general` that
on the source code, each beside the base's own (nats a token). A method is taken with its own defaults, over 4 bits
where it can, at the learning rate that is best for the held-out questions: from 3e-3 in steps of the root of ten for as
long as that helps. One CPU rank of one thread for each method, two at a time; a step is in seconds of its own CPU, the
median, and the peak is what its process grows by from before the base is loaded.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from launcher.smoke.sample import Sizes, make_sample, source_code, source_files
from trainer.config import Config, Tuning, load_config, override
from trainer.tuning.method import methods

# Rows beside those of the methods' defaults: a method's name -> what they are called, and their settings.
VARIANTS = {
    "bottleneck": {"pfeiffer": ("tuning.placement=pfeiffer",)},
    "full": {"last layer": ('tuning.train=["model.layers.3.*"]',)},
}
RATES = [10 ** (exponent / 2) for exponent in range(-10, 1)]  # 1e-5 to 1
FIRST_RATE = 5  # 3e-3
SIZES = {"vocabulary": 1024, "hidden": 128, "intermediate": 352, "batch": 8}
CHARACTERS, PROMPT = 300, 60  # of a module's source code, and of these the part that is given
HELD_OUT = 32  # questions, and modules
AT_ONCE = 2


def make_material(folder: Path, pretrain: int, steps: int) -> None:
    """The base, the questions, the source code, and config.yaml of a run over them."""
    sample = make_sample(folder, sizes=Sizes(**SIZES, steps=pretrain))
    known = [code[:CHARACTERS] for code in map(source_code, source_files()) if len(code) > CHARACTERS]
    write_rows(folder / "train.jsonl", questions(sample.train))
    write_rows(folder / "task.jsonl", questions(sample.eval)[:HELD_OUT])
    write_rows(folder / "general.jsonl", [(code[:PROMPT], code[PROMPT:]) for code in known[:HELD_OUT]])
    tree = {
        "run": {"name": "methods", "store": str(folder / "store")},
        "model": {"base": sample.base},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "format": "prompt_completion",
            "sequence_length": 128,
        },
        "optim": {"warmup_steps": steps // 10},
        "train": {"steps": steps, "global_batch": 4, "micro_batch": 4, "activation_checkpointing": False},
        "cluster": {"gpus_per_worker": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    compile_data(load_config(folder / "config.yaml"), folder)  # before two processes would


def compile_data(config: Config, folder: Path) -> tuple[str, list[str]]:
    """The fingerprints of what is trained on, and of the held-out questions and the source code."""
    from trainer.base.find.locate import resolve_base
    from trainer.data.compile.prepare import prepare
    from trainer.store.store import open_store

    base, store, train, held_out = resolve_base(config.model), open_store(config.run.store), "", list[str]()
    for name in ("task", "general"):
        found = prepare(override(config, f"data.eval=[{{path: {folder}/{name}.jsonl}}]"), base, store)
        assert found.eval
        train = found.train
        held_out.append(found.eval)
    return train, held_out


def questions(files: Sequence[str]) -> list[tuple[str, str]]:
    """Questions and answers of the sample's conversations."""
    rows = (json.loads(line)["messages"] for file in files for line in Path(file).read_text().splitlines())
    return [(question["content"] + "\n", answer["content"]) for question, answer in rows]


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in rows)
    path.write_text("".join(lines))


def measure(folder: Path, name: str, settings: Sequence[str]) -> dict[str, Any]:
    """One row of the table, in a process of its own."""
    import logging

    import torch

    from trainer.processes.ranks import join
    from trainer.tuning.objective.sft import NextTokens

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    method = methods()[name](Tuning(method=name))
    quant = ("quant.type=none",) if method.exports_model else ()
    config = load_config(folder / "config.yaml", (f"tuning.method={name}", *quant, *settings))
    trial = Trial(config, folder, join(), NextTokens())
    before = trial.losses(base=True)
    found = {rate: trial.run(rate) for rate in RATES[FIRST_RATE : FIRST_RATE + 2]}
    # Downhill from there, on the side where it goes down.
    upwards = found[RATES[FIRST_RATE + 1]][0] < found[RATES[FIRST_RATE]][0]
    for rate in RATES[FIRST_RATE + 2 :] if upwards else reversed(RATES[:FIRST_RATE]):
        best = min(task for task, _ in found.values())
        found[rate] = trial.run(rate)
        if not found[rate][0] < best:
            break
    rate = min(found, key=lambda rate: found[rate][0])
    return {
        "trainable": trial.trainable,
        "quant": config.quant.type,
        "rate": rate,
        "peak": trial.peak(),
        "step": sorted(trial.seconds)[len(trial.seconds) // 2],
        "before": before,
        "after": found[rate],
    }


class Trial:
    """A rank with a model that can be trained again and again from its start."""

    def __init__(self, config: Config, folder: Path, ranks: Any, objective: Any) -> None:
        from trainer.data.dataset.chapters import open_chapters
        from trainer.data.dataset.dataset import open_dataset
        from trainer.data.order.stream import eval_stream, train_stream
        from trainer.plan.assemble import ShardingPlan, assemble, attention_of
        from trainer.plan.resolve import resolve
        from trainer.state.zero.policy import build_deepspeed_config
        from trainer.store.store import open_store

        self.config, self.objective, self.seconds = config, objective, list[float]()
        resolved, store = resolve(config), open_store(config.run.store)
        train, held_out = compile_data(config, folder)
        self.held_out = [eval_stream(config, open_dataset(store, found), 0, 1) for found in held_out]
        self.stream = train_stream(config, open_chapters(store, train, store.sub(config.run.name)), 0, 1)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.resident = memory("VmRSS")
        settings = build_deepspeed_config(config, 1, self.stream.accumulation, on_gpu=False)
        self.method = resolved.method
        resolved = replace(resolved, objective=objective)
        self.engine, _ = assemble(
            resolved, ranks, attention_of(resolved, ranks.device), ShardingPlan(settings, "world")
        )
        self.start = [part.states["master"].clone() for part in self.engine.partitions()]
        self.trainable = sum(map(len, self.start))

    def run(self, rate: float) -> tuple[float, float]:
        """Train from the start with this learning rate. -> the losses; no number where it diverges."""
        from trainer.data.order.settings import Position
        from trainer.train.horizon import learning_rate

        for part, start in zip(self.engine.partitions(), self.start, strict=True):
            part.states["master"].copy_(start)
            part.states["exp_avg"].zero_()
            part.states["exp_avg_sq"].zero_()
        self.engine.refresh(0)
        optim, steps, position = self.config.optim.model_copy(update={"lr": rate}), self.config.train.steps, Position()
        assert steps
        for step in range(1, steps + 1):
            started, batches = time.process_time(), self.stream.step(position)
            weight = sum(map(self.objective.weight, batches))
            for batch in batches:
                self.engine.backward(self.engine.loss(batch) / weight, last=batch is batches[-1])
            if not math.isfinite(self.engine.step(learning_rate(optim, step, steps))):
                return math.inf, math.inf
            position = self.stream.advance(position)
            self.seconds.append(time.process_time() - started)
        return self.losses()

    def losses(self, base: bool = False) -> tuple[float, float]:
        """Of the held-out questions and of the source code, as the model is or, with `base`, as the base is."""
        import torch

        # A method that trains the base itself has it as it was only at its start.
        if base and not self.method.trains_base:
            with self.method.switched_off(self.engine.model):
                return self.losses()
        with self.engine.evaluating():
            found = list[float]()
            with torch.no_grad():
                for stream in self.held_out:
                    batches = [batch for (batch,) in stream.epoch(0)]
                    nats = sum(float(self.engine.loss(batch)) for batch in batches)
                    found.append(nats / sum(map(self.objective.weight, batches)))
        return found[0], found[1]

    def peak(self) -> int:
        return memory("VmHWM") - self.resident


def memory(what: str) -> int:
    """Bytes, as the kernel counts them of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[what].split()[0]) * 1024


def show(rows: dict[str, dict[str, Any]], steps: int) -> None:
    bases = {row["quant"]: row["before"] for row in rows.values()}
    table = Table(
        "method", "trainable", "learning rate", "peak, MB", "CPU s a step", "task", "general", "general, change",
        title=f"{steps} steps of 4 rows of 128 tokens",
        caption=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    )  # fmt: skip
    for quant, (task, general) in bases.items():
        bits = "16 bits" if quant == "none" else "4 bits"
        table.add_row(f"the base, {bits}", "", "", "", "", f"{task:.3f}", f"{general:.3f}", "")
    for name, row in rows.items():
        (task, general), (_, known) = row["after"], row["before"]
        table.add_row(
            name,
            f"{row['trainable']:,}",
            f"{row['rate']:.1g}",
            f"{row['peak'] / 1e6:.0f}",
            f"{row['step']:.2f}",
            f"{task:.3f}",
            f"{general:.3f}",
            f"{general - known:+.3f}",
        )
    Console(width=140).print(table)


def processes() -> Any:
    """A pool in which each call has a new process, forked from one that has imported the training stack once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.rank", "peft", "bitsandbytes", "transformers.models.llama.modeling_llama"])
    return context.Pool(AT_ONCE, maxtasksperchild=1)


def wanted(names: Iterable[str]) -> dict[str, tuple[str, Sequence[str]]]:
    """What a row is called -> its method, and settings."""
    rows: dict[str, tuple[str, Sequence[str]]] = {}
    for name in names:
        rows[name] = name, ()
        rows |= {f"{name}, {what}": (name, settings) for what, settings in VARIANTS.get(name, {}).items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=sorted(methods()), default=sorted(methods()))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pretrain", type=int, default=150, help="steps in which the base reads the source code")
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder, processes() as pool:
        pool.apply(make_material, (Path(folder), arguments.pretrain, arguments.steps))
        rows = {
            label: pool.apply_async(measure, (Path(folder), name, settings))
            for label, (name, settings) in wanted(arguments.methods).items()
        }
        show({label: row.get() for label, row in rows.items()}, arguments.steps)


if __name__ == "__main__":
    main()
