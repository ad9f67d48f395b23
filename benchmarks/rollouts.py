"""Right answers before and after GRPO, sampled by the ranks themselves, and by TRL's GRPOTrainer.

    python benchmarks/rollouts.py [--seeds 3] [--steps 30]

The base is a small Llama, made on the spot, that has learnt to answer three letters by themselves, and now and then by the same letters the other way
round, which is what the reward asks for. Some prompts neither the base nor a run has seen. `chance` is the control: its reward is drawn, whatever the
answer is. TRL sees as many prompts and draws as many answers, over the same base, with the same LoRA, rate and form of the loss. The script fails unless, for
every seed, the right answers become more on both kinds of prompts, by chance they do not, and they are no fewer than TRL's.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from tests.cli.test_vllm import TARGETS
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import make_base
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config, parse_config
from trainer.data.compile.prepare import prepare
from trainer.processes import children
from trainer.run import layout
from trainer.store.store import open_run_store

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
COMPILING = Lock()


@dataclass(frozen=True)
class Curve:
    """The mean reward of the answers of the first five steps and of the last five, and that of the held-out prompts before and after."""

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


def settings(folder: Path, side: str, seed: int, steps: int) -> dict[str, Any]:
    """The configuration of one of our runs."""
    return {
        "run": {"name": f"{side}-{seed}", "store": str(folder / "store"), "seed": seed},
        "model": {"base": str(folder / "base"), "dtype": "fp32"},
        "quant": {"type": "none"},
        "objective": {"name": "grpo"},
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
        },
        "optim": {"lr": RATE, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "train": {"steps": steps + 1, "global_batch": PROMPTS, "micro_batch": 4, "activation_checkpointing": False},
        "eval": {"every": steps},
        "checkpoint": {"every_steps": steps},
        "cluster": {"gpus_per_worker": 0, "threads_per_worker": 1},
        "track": {"tensorboard": False},
    }


def by_us(folder: Path, side: str, seed: int, steps: int) -> Curve:
    config = parse_config(yaml.safe_dump(settings(folder, side, seed, steps)))
    store = open_run_store(config)
    run = store.sub(config.run.name)
    with COMPILING:  # all runs have the same data, which the first one compiles
        data = prepare(config, resolve_base(config.model), store)
    run.put(layout.CONFIG, dump_config(config).encode())
    (ended,) = launch(1, runs.run, dump_config(config), data.train, "start", data.eval, timeout=SECONDS)
    assert ended["outcome"] == "finished", ended
    records = [json.loads(line) for line in run.get(layout.metrics(1)).splitlines()]
    return curve_of([record for record in records if record["kind"] == "step"], "reward", "held_out_reward")


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


def trl(folder: Path, seed: int, steps: int) -> None:
    """The same run by TRL: it draws by transformers' generate(), with the adapter as it is. Its curve goes into a file."""
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
    found = curve_of(records, "reward", "held_out")
    (folder / f"trl-{seed}.json").write_text(json.dumps(asdict(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pretrain", type=int, default=300, help="steps of the base")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ |= {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    seeds, steps = range(given.seeds), given.steps
    if given.trl:
        for seed in seeds:
            trl(given.trl, seed, steps)
        return
    found = dict[tuple[str, int], Curve]()
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as name:
        folder = Path(name)
        os.chdir(folder)  # where rewards are found
        make_material(folder, given.pretrain)
        with trl_beside(folder, given.seeds, steps), ThreadPoolExecutor(2) as pool:
            these = [(side, seed) for seed in seeds for side in ("grpo", "chance")]
            for one, curve in zip(
                these, pool.map(lambda one: by_us(folder, one[0], one[1], steps), these), strict=True
            ):
                found[one] = curve
                print(f"{one[0]}, seed {one[1]}: {curve}", flush=True)
        for seed in seeds:
            found["trl", seed] = curve = Curve(**json.loads((folder / f"trl-{seed}.json").read_text()))
            print(f"trl, seed {seed}: {curve}", flush=True)
    sys.exit("; ".join(wrong(found)) or 0)


def wrong(found: dict[tuple[str, int], Curve]) -> Iterator[str]:
    """A sentence for each figure that is not as it should be."""
    for (side, seed), curve in found.items():
        if side == "chance":
            if curve.held_out[1] > curve.held_out[0] + NEAR:
                yield f"chance teaches, with seed {seed}"
            continue
        if not (curve.last > curve.first + 0.2 and curve.held_out[1] > curve.held_out[0] + 0.2):
            yield f"{side} does not learn, with seed {seed}"
    for seed in {seed for _, seed in found}:
        ours, theirs = found["grpo", seed], found["trl", seed]
        if ours.held_out[1] < theirs.held_out[1] - NEAR or ours.last < theirs.last - NEAR:
            yield f"TRL learns more, with seed {seed}"


if __name__ == "__main__":
    main()
