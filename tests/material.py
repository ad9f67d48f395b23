"""Small real material for the tests: bases of awkward sizes, a byte tokenizer, documents, run configurations."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from tests.families import FAMILIES, KINDS, SIZES
from trainer.base.architecture import Architecture
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config, parse_config
from trainer.data.compile.prepare import Datasets, prepare
from trainer.data.render.text_files import keep_text, run_text
from trainer.plan.beginning import find_beginning
from trainer.plan.resolve import Resolved, tuning_mismatches
from trainer.run import layout
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.state.checkpoint.shard import Contents, EvenDivision, ShardLayout, write_shard
from trainer.state.optimizer import states_by_name
from trainer.store.store import Store, open_store
from trainer.tuning.method import method_of

SEQUENCE = 64
SPECIALS = ("<pad>", "<s>", "</s>")


def make_base(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, shard_size: str = "40KB", **sizes: Any
) -> Path:
    """A random base of `kind` in the Hugging Face directory format, in several safetensors files."""
    torch.manual_seed(11)
    settings = {"tie_word_embeddings": False, **SIZES, **{**FAMILIES, **KINDS}[kind], **sizes}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            # Norms start as ones, biases and buffers as zeros, which would hide a mix-up.
            if value.ndim == 1 or value.min() == value.max():
                value.add_(0.3 * torch.randn_like(value))
            if not any(part in name for part in model._keep_in_fp32_modules_strict):
                value.data = value.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def quantize_base(source: Path, folder: Path, **quantization: Any) -> Path:
    """`source` as transformers and bitsandbytes write it in 4 bits."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **quantization)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([*SPECIALS, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_data(path: Path, documents: int = 60, seed: int = 5) -> Path:
    """Prompts and completions of very different lengths, so that rows differ in their number of targets."""
    draw = random.Random(seed)
    words = "the ant bee cat dog emu fox gnu hen ibis jay".split()
    rows = [
        {
            "prompt": " ".join(draw.choices(words, k=draw.randint(1, 4))) + "? ",
            "completion": " ".join(draw.choices(words, k=draw.randint(1, 8))),
        }
        for _ in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_policy(path: Path) -> Path:
    """The CPU policy with a threshold that keeps a few parameters whole on every rank and partitions most.

    With DeepSpeed's usual 100,000 every parameter of so small a base would stay whole, and nothing would be gathered.
    """
    policy = json.loads((Path(__file__).parents[1] / "ds_configs/cpu.json").read_text(encoding="utf-8"))
    policy["zero_optimization"]["stage3_param_persistence_threshold"] = 600
    path.write_text(json.dumps(policy), encoding="utf-8")
    return path


def commit(
    run: Store, config: Config, step: int = 4, dataset: str = "data", eval_loss: float | None = None, ranks: int = 1
) -> None:
    """Make `run` a run of `config` on `dataset` that `ranks` committed after `step`, with adapters of random numbers,
    which are the same for any number of ranks."""
    base = resolve_base(config.model)
    run.put(layout.CONFIG, dump_config(config).encode())
    shapes = {name: list(shape) for name, shape in method_of(config).shapes(base.architecture).items()}
    numels, states = {name: math.prod(shape) for name, shape in shapes.items()}, states_by_name("adamw", shapes)
    whole = ShardLayout(Contents(EvenDivision(numels, 1), states, 1).of(0))
    drawn = 0.1 * torch.randn(whole.size // 4, generator=torch.Generator().manual_seed(step))
    values = {key: drawn[first // 4 : last // 4] for key, first, last in whole.places()}
    shards = []
    for rank in range(ranks):
        of_rank = ShardLayout(Contents(EvenDivision(numels, ranks), states, ranks).of(rank))
        parts = torch.cat([values[key][begin:end] for key, (begin, end) in of_rank.contents.items()])
        key = layout.shard(step, f"000001-{ranks:06d}", rank)
        shards.append(write_shard(run, key, of_rank, memoryview(parts.numpy().tobytes())))
    found = Resolved.of(config, base)
    ours = replace(found, beginning=find_beginning(config, found.method)).identity(dataset)
    manifest = CheckpointManifest(
        step,
        1,
        ranks,
        0.0,
        step,
        {},
        ours.dataset,
        ours.order,
        ours.base,
        ours.adapter,
        {},
        {},
        eval_loss,
        shapes,
        shards,
    )
    manifest = replace(manifest, text=ours.text)
    keep_text(run, run_text(config.data, base.directory))
    run.create(layout.manifest(step), manifest.to_json())


def tuning_misfits(config: Config, architecture: Architecture) -> list[str]:
    """The sentences about the method that the settings name."""
    return list(tuning_mismatches(config, method_of(config), architecture))


def make_pairs(path: Path, pairs: int = 12, seed: int = 6) -> Path:
    """A chosen and a rejected answer to each of some prompts, all of very different lengths."""
    draw = random.Random(seed)
    words = "the ant bee cat dog emu fox gnu hen ibis jay".split()
    rows = [
        {
            "prompt": " ".join(draw.choices(words, k=draw.randint(1, 3))) + "? ",
            "chosen": " ".join(draw.choices(words, k=draw.randint(1, 3))),
            "rejected": " ".join(draw.choices(words, k=draw.randint(1, 4))) + "!",
        }
        for _ in range(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_labelled(path: Path, rows: int = 12, seed: int = 6) -> Path:
    """An answer to each of some prompts, no two of which are the same; every third answer is undesired."""
    draw = random.Random(seed)
    words = "the ant bee cat dog emu fox gnu hen ibis jay".split()
    labelled = [
        {
            "prompt": f"{number} " + " ".join(draw.choices(words, k=draw.randint(1, 3))) + "? ",
            "completion": " ".join(draw.choices(words, k=draw.randint(1, 4))),
            "label": number % 3 != 2,
        }
        for number in range(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled), encoding="utf-8")
    return path


def make_classified(path: Path, rows: int = 40, seed: int = 6) -> Path:
    """Texts of very different lengths, each with the class that its last word tells."""
    draw = random.Random(seed)
    words, classes = "the ant bee cat dog emu fox gnu hen ibis jay".split(), ("bad", "good", "so-so")
    made = [(draw.choices(words, k=draw.randint(1, 8)), draw.choice(classes)) for _ in range(rows)]
    said = {"bad": "no", "good": "yes", "so-so": "hm"}
    rows_of = ({"text": " ".join([*text, said[label]]), "label": label} for text, label in made)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of), encoding="utf-8")
    return path


def make_tagged(path: Path, rows: int = 40, seed: int = 6) -> Path:
    """Words of which each names an animal or is small, as its tag says."""
    draw = random.Random(seed)
    words = {"the": "O", "a": "O", "ant": "B", "bee": "B", "cat": "B", "of": "O", "gnu": "B"}
    made = [draw.choices(list(words), k=draw.randint(1, 6)) for _ in range(rows)]
    lines = (json.dumps({"tokens": row, "ner_tags": [words[word] for word in row]}) for row in made)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


class Workshop:
    """A folder with a base, documents and a store; makes run configurations over them."""

    def __init__(self, folder: Path, kind: str = "llama", **sizes: Any) -> None:
        self.folder = folder
        self.base = make_base(folder / "base", kind, **sizes)
        self.data = make_data(folder / "train.jsonl")
        self.policy = make_policy(folder / "policy.json")
        self.store = open_store(str(folder / "store"))

    def config(self, name: str, *overrides: str) -> Config:
        """A run of ten steps that commits after the fifth; `overrides` are dotted, as on the command line."""
        tree = {
            "run": {"name": name, "store": str(self.folder / "store"), "seed": 3},
            "model": {"base": str(self.base), "dtype": "bf16"},  # whatever the processor is
            "tuning": {"rank": 8, "alpha": 16},
            "data": {
                "train": [{"path": str(self.data)}],
                "format": "prompt_completion",
                "sequence_length": SEQUENCE,
            },
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "train": {"steps": 10, "global_batch": 4},
            "sharding": {"deepspeed": str(self.policy)},
            "checkpoint": {"every_steps": 5, "every_minutes": 0},
            "cluster": {"threads_per_worker": 1},
            "track": {"flush_seconds": 0.1, "tensorboard": False},
        }
        return parse_config(yaml.safe_dump(tree), overrides)

    def prepare(self, config: Config) -> Datasets:
        """Compile the data, as the launcher does before any rank starts."""
        return prepare(config, resolve_base(config.model), self.store)
