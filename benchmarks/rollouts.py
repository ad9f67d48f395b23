"""Right answers before and after GRPO, sampled by the ranks themselves or by a real vLLM, and by TRL's GRPOTrainer; and
after distillation from a teacher.

    python benchmarks/rollouts.py [--seeds 3] [--steps 30] [--server | --quantized] [--folder FOLDER]

The base is a small Llama, made on the spot, that has learnt to answer three letters by themselves, and now and then by
the same letters the other way round, which is what the reward asks for. Some prompts neither the base nor a run has
seen. `chance` is the control: its reward is drawn, whatever the answer is. TRL sees as many prompts and draws as many
answers, over the same base, with the same LoRA, rate and form of the loss. With `--server` one vLLM (`make vllm`)
samples for all of our runs, in turns with them: of GRPO (`served`), and of on-policy distillation (`opd`) from an
adapter that was trained on the right answers (`teacher`), which the same server has. The script fails unless, for every
seed, the right answers become more on both kinds of prompts, by chance they do not, and those of GRPO are, in the mean
over the seeds, no fewer than TRL's.

`--quantized` measures instead how far trainer and vLLM are apart, in nats a token, where both compute in bf16: a run in
nf4 whose server has the base as it is quantized (`nf4`), and beside it a run and a server of the base itself (`bf16`),
and the run in nf4 over that server (`other`).

Each figure is a line in FOLDER/figures.jsonl as soon as it is there, and what has one is not run again.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the ranks that the tests share

from tests.dist import rollouts, runs
from tests.dist.launch import launch, running
from tests.material import make_base
from tests.real_vllm import TARGETS, vllm
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, parse_config
from trainer.data.compile.prepare import Datasets, prepare
from trainer.export.write.as_quantized import write_as_quantized
from trainer.processes import children
from trainer.run import layout
from trainer.servers import CompletionsServer
from trainer.store.store import open_run_store, open_store

LETTERS, HELD_OUT = "abcdefgh", 48
PROMPTS, ANSWERS, ROOM = 8, 4, 6  # a step, to each prompt, tokens of an answer
RATE, RANK = 3e-3, 8
TURNED = 0.25  # of the base's answers
NEAR = 0.1  # of the right answers, by which ours may be behind TRL's: two standard errors of the held-out prompts
REWARD = """
import random

HELD_OUT = set({held_out!r})


def chance(prompts, completions, answer):
    draw = random.Random(str(completions))
    given = zip(prompts, completions, answer, strict=True)
    return [float(said == right if prompt in HELD_OUT else draw.random() < 0.25) for prompt, said, right in given]
"""


SECONDS = 3600.0
APART, ALIKE = ("nf4", "bf16", "other"), 0.003
LOCK = Lock()


@dataclass(frozen=True)
class Curve:
    """The mean reward of the answers of the first five steps and of the last five, and that of the held-out prompts
    before and after.
    """

    first: float
    last: float
    held_out: list[float]

    def __str__(self) -> str:
        before, after = self.held_out
        return f"{self.first:.2f} -> {self.last:.2f}, held out {before:.2f} -> {after:.2f}"


def curve_of(records: Sequence[dict[str, float]], reward: str, held_out: str) -> Curve:
    rewards = [record[reward] for record in records if reward in record]
    return Curve(
        sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5, [record[held_out] for record in records if held_out in record]
    )


def rows(letters: Sequence[tuple[str, ...]]) -> list[dict[str, str]]:
    """Prompts, and the answers that are right."""
    return [{"prompt": f"{''.join(one)}>", "completion": "".join(reversed(one))} for one in letters]


def make_material(folder: Path, steps: int) -> None:
    """Write the rows and the base, and the reward of chance."""
    letters = list(itertools.permutations(LETTERS, 3))
    random.Random(0).shuffle(letters)
    for name, part in (("train", letters[HELD_OUT:]), ("held-out", letters[:HELD_OUT])):
        lines = (json.dumps(row) + "\n" for row in rows(part))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    held_out = [row["prompt"] for row in rows(letters[:HELD_OUT])]
    (folder / "drawn.py").write_text(REWARD.format(held_out=held_out))
    pretrain(make_base(folder / "base", hidden_size=128, intermediate_size=256), rows(letters[HELD_OUT:]), steps)


def pretrain(base: Path, known: list[dict[str, str]], steps: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=2e-3), random.Random(0)
    for step in range(steps):
        texts = list[list[int]]()
        for row in draw.sample(known, 64):
            said = row["completion"] if draw.random() < TURNED else row["prompt"][:-1]
            texts.append([*tokenizer(row["prompt"] + said).input_ids, tokenizer.eos_token_id])
        ids = torch.tensor(texts)
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"base, step {step + 1}: {float(loss):.3f} nats a token", file=sys.stderr, flush=True)
    model.save_pretrained(base)
    for stale in (*base.glob("model-*"), *base.glob("*.index.json")):
        stale.unlink()


def settings(folder: Path, side: str, seed: int, steps: int, url: str | None) -> dict[str, Any]:
    """The configuration of one of our runs, for which the server at `url` samples where there is one."""
    tree: dict[str, Any] = {
        "run": {"name": f"{side}-{seed}", "store": str(folder / "store"), "seed": seed},
        "model": {"base": str(folder / "base"), "dtype": "fp32"},
        "quant": {"type": "none"},
        "objective": {"name": "opd", "teacher": f"{url}#teacher"} if side == "opd" else {"name": "grpo"},
        "tuning": {"rank": RANK, "alpha": 2 * RANK, "targets": TARGETS},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "held-out.jsonl")}],
            "format": "prompt_completion",
            "sequence_length": 64,
        },
        "rollout": {
            "reward": "drawn:chance" if side == "chance" else "exact",
            "answers": ANSWERS,
            "max_tokens": ROOM,
            "held_out": HELD_OUT,
            **({"engine": [url], "max_lag": 0} if url else {}),
        },
        "optim": {"lr": RATE, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "train": {"steps": steps + 1, "global_batch": PROMPTS, "micro_batch": 4, "activation_checkpointing": False},
        "eval": {"every": steps},
        "checkpoint": {"every_steps": steps},
        "cluster": {"gpus_per_worker": 0, "threads_per_worker": 1},
        "track": {"tensorboard": False},
    }
    if side in APART:
        tree["model"]["dtype"], tree["quant"]["type"] = "bf16", "none" if side == "bf16" else "nf4"
    if side == "teacher":
        del tree["rollout"]
        tree["objective"] = {"name": "sft"}
    return tree


def prepared(folder: Path, side: str, seed: int, steps: int, url: str | None) -> tuple[Config, Datasets]:
    """A run that begins anew, and its data, which all runs share and the first one compiles."""
    config = parse_config(yaml.safe_dump(settings(folder, side, seed, steps, url)))
    store = open_run_store(config)
    store.delete_folder(f"{config.run.name}/")
    store.sub(config.run.name).put(layout.CONFIG, dump_config(config).encode())
    with LOCK:
        return config, prepare(config, resolve_base(config.model), store)


def by_us(folder: Path, side: str, seed: int, steps: int, url: str | None) -> Curve:
    records = records_of(folder, side, seed, steps, url)
    if url:
        worst = max(record["log_ratio"] for record in records)
        print(f"{side}, seed {seed}: sampler and trainer differ by {worst:.1e} nats a token", flush=True)
    return curve_of(records, "reward", "held_out_reward")


def records_of(folder: Path, side: str, seed: int, steps: int, url: str | None) -> list[dict[str, float]]:
    """One of our runs, from its beginning to its end: the records of its steps."""
    config, data = prepared(folder, side, seed, steps, url)
    run = open_run_store(config).sub(config.run.name)
    beside = running(1, rollouts.sample, run.uri, timeout=SECONDS) if url else nullcontext()
    with beside:
        (ended,) = launch(1, runs.run, dump_config(config), data.train, "start", data.eval, timeout=SECONDS)
    assert ended["outcome"] == "finished", ended
    records = [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]
    return [record for record in records if record["kind"] == "step"]


def apart(folder: Path, seeds: int, steps: int) -> Iterator[str]:
    """Print how far trainer and sampler are apart in bf16; a sentence for each figure that is not as it should be."""
    quantized = folder / "as-quantized"
    if not (quantized / "config.json").exists():
        config, _ = prepared(folder, "nf4", 0, steps, "http://127.0.0.1")
        write_as_quantized(config, open_store(str(quantized)), lambda done, total: None)
    found = dict[tuple[str, int], float]()
    for base, sides in ((quantized, ("nf4",)), (folder / "base", ("bf16", "other"))):
        with vllm(base, folder / "vllm.log", "--dtype", "bfloat16") as url:
            for side, seed in itertools.product(sides, range(seeds)):
                found[side, seed] = fmean(record["log_ratio"] for record in records_of(folder, side, seed, steps, url))
                print(f"{side}, seed {seed}: {found[side, seed]:.4f} nats a token", flush=True)
    for seed in range(seeds):
        if found["nf4", seed] > max(ALIKE, 1.5 * found["bf16", seed]):
            yield f"nf4 is further from its server than bf16, with seed {seed}"
        if found["other", seed] < 0.01:
            yield f"a server of another base is not seen, with seed {seed}"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a vLLM that has the base and, as `teacher`, an adapter that was trained on the right answers."""
    adapter = folder / "teacher"
    if not (adapter / "adapter_config.json").exists():
        config, data = prepared(folder, "teacher", 0, 120, None)
        (ended,) = launch(1, runs.run, dump_config(config), data.train, "start", data.eval, timeout=SECONDS)
        assert ended["outcome"] == "finished", ended
        export = ["-m", "launcher.cli", "export", config.run.name, str(adapter), "--store", config.run.store]
        subprocess.run([sys.executable, *export], check=True, stdout=sys.stderr)
    with vllm(folder / "base", folder / "vllm.log", "--max-loras", "2", "--max-cpu-loras", "4") as url:
        CompletionsServer("--server", url, "").load("teacher", str(adapter))
        yield url


@contextmanager
def trl_beside(folder: Path, seeds: int, steps: int) -> Iterator[None]:
    """TRL's runs, in a process of its own."""
    command = [sys.executable, __file__, "--trl", str(folder), "--seeds", str(seeds), "--steps", str(steps)]
    with (folder / "trl.log").open("w") as log:
        process = children.start(command, stdout=log, stderr=log)
        try:
            yield
            assert process.wait() == 0, (folder / "trl.log").read_text()[-3000:]
        finally:
            process.kill()


def by_trl(folder: Path, seed: int, steps: int) -> Curve:
    """The same run by TRL: it draws by transformers' generate(), with the adapter as it is."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    train, held_out = (list(map(json.loads, (folder / f"{name}.jsonl").open())) for name in ("train", "held-out"))

    def exact(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [float(said.strip() == right) for said, right in zip(completions, answer, strict=True)]

    def answered(trained: Any) -> float:
        """The share of the held-out prompts whose likeliest answer is right."""
        given = tokenizer([row["prompt"] for row in held_out], return_tensors="pt", padding=True)
        given.pop("token_type_ids", None)
        with torch.no_grad():
            drawn = trained.generate(**given, do_sample=False, max_new_tokens=ROOM, pad_token_id=tokenizer.pad_token_id)
        said = tokenizer.batch_decode(drawn[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        right = exact(said, [row["completion"] for row in held_out])
        return sum(map(bool, right)) / len(held_out)

    known = [{"prompt": row["prompt"], "answer": row["completion"]} for row in train]
    options = GRPOConfig(
        output_dir=str(folder / "trl"), seed=seed, max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant", report_to="none",
        per_device_train_batch_size=PROMPTS * ANSWERS, num_generations=ANSWERS, max_completion_length=ROOM, logging_steps=1, use_cpu=True,
        beta=0.0, loss_type="grpo", weight_decay=0.0, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[*TARGETS], task_type="CAUSAL_LM")
    trainer = GRPOTrainer(model, exact, options, Dataset.from_list(known), processing_class=tokenizer, peft_config=lora)
    before = answered(trainer.model)
    trainer.train()
    records = [{"reward": one["reward"]} for one in trainer.state.log_history if "reward" in one]
    records = [{**records[0], "held_out": before}, *records[1:], {"held_out": answered(trainer.model)}]
    return curve_of(records, "reward", "held_out")


class Figures:
    """The curves by side and seed, each a line of a file as soon as it is there."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "figures.jsonl"

    def found(self) -> dict[tuple[str, int], Curve]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return {(one.pop("side"), one.pop("seed")): Curve(**one) for one in map(json.loads, lines)}

    def add(self, side: str, seed: int, curve: Curve) -> None:
        with LOCK, self._file.open("a") as file:
            file.write(json.dumps({"side": side, "seed": seed, **asdict(curve)}) + "\n")
        print(f"{side}, seed {seed}: {curve}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pretrain", type=int, default=300, help="steps of the base")
    parser.add_argument("--server", action="store_true", help="a vLLM samples")
    parser.add_argument("--quantized", action="store_true", help="how far a run in 4 bits is from its server")
    parser.add_argument("--folder", type=Path, help="where everything is kept; by default nowhere")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    if given.trl:
        figures = Figures(given.trl)
        for seed in range(given.seeds):
            if ("trl", seed) not in figures.found():
                figures.add("trl", seed, by_trl(given.trl, seed, given.steps))
        return
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = (given.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # where rewards are found
        if not (folder / "made").exists():
            make_material(folder, given.pretrain)
            (folder / "made").touch()
        if given.quantized:
            sys.exit("; ".join(apart(folder, given.seeds, given.steps)) or 0)
        found = compared(folder, given.seeds, given.steps, server=given.server)
    sys.exit("; ".join(wrong(found)) or 0)


def compared(folder: Path, seeds: int, steps: int, *, server: bool) -> dict[tuple[str, int], Curve]:
    """The curves of all runs, those of TRL beside ours."""
    figures, sides = Figures(folder), ("served", "opd") if server else ("grpo", "chance")
    known = figures.found()
    these = [(side, seed) for seed in range(seeds) for side in sides if (side, seed) not in known]

    def run(one: tuple[str, int], url: str | None) -> None:
        figures.add(*one, by_us(folder, *one, steps, url))

    with trl_beside(folder, seeds, steps):
        if server and these:
            with served(folder) as url:
                for one in these:
                    run(one, url)
        else:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda one: run(one, None), these))
    return figures.found()


def wrong(found: dict[tuple[str, int], Curve]) -> Iterator[str]:
    """A sentence for each figure that is not as it should be."""
    for (side, seed), curve in found.items():
        if side == "chance":
            if curve.held_out[1] > curve.held_out[0] + NEAR:
                yield f"chance teaches, with seed {seed}"
            continue
        if not (curve.last > curve.first + 0.2 and curve.held_out[1] > curve.held_out[0] + 0.2):
            yield f"{side} does not learn, with seed {seed}"
    for side in ("grpo", "served"):
        # A seed of TRL's has nothing in common with ours, so means are compared.
        ours, theirs = ([curve for (one, _), curve in found.items() if one == name] for name in (side, "trl"))
        for what in (lambda curve: curve.held_out[1], lambda curve: curve.last):
            if ours and fmean(map(what, ours)) < fmean(map(what, theirs)) - NEAR:
                yield f"TRL learns more than {side}"


if __name__ == "__main__":
    main()
