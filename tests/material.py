"""Small real material for the tests: bases of awkward sizes, a byte tokenizer, documents, run configurations."""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from trainer.base.locate import resolve_base
from trainer.checkpoint.contents import Contents
from trainer.checkpoint.division import EvenDivision
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.checkpoint.shard import ShardLayout, write_shard
from trainer.config import Config, dump_config, parse_config
from trainer.data.prepare import Datasets, prepare
from trainer.identity import identity_of
from trainer.optimizer.optimizer import states_by_name
from trainer.run import layout
from trainer.store import Store, open_store
from trainer.tuning.method import method_of

SEQUENCE = 64
SPECIALS = ("<pad>", "<s>", "</s>")

# No size is a power of two where it need not be; a vocabulary of 256 bytes and three special tokens.
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# The name of a base here -> its model_type and its settings beside `SIZES`.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "phi3": {"model_type": "phi3", "sliding_window": 16},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 24, "sliding_window": 16, "tie_word_embeddings": True},
    # Experts of 3,010 and 1,505 weights: an odd number of nibbles, and no whole blocks.
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 35,
        "head_dim": 10,
        "intermediate_size": 43,
        "num_local_experts": 3,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 24,
        "moe_intermediate_size": 43,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "hidden_size": 35,
        "head_dim": 10,
        "intermediate_size": 43,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    # Weights whose number is no multiple of a block: 1,440, 720 and 1,800.
    "ragged": {
        "model_type": "llama",
        "hidden_size": 36,
        "head_dim": 10,
        "intermediate_size": 50,
        "num_hidden_layers": 1,
    },
    # Tensors smaller than a block, and odd numbers of weights: 10 and 35.
    "speck": {
        "model_type": "llama",
        "hidden_size": 5,
        "head_dim": 2,
        "intermediate_size": 7,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    },
}


def make_base(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, shard_size: str = "40KB", **sizes: Any
) -> Path:
    """A random base of `kind` in the Hugging Face directory format, in several safetensors files."""
    torch.manual_seed(11)
    settings = {"tie_word_embeddings": False, **SIZES, **KINDS[kind], **sizes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as ones and biases as zeros, which would hide a mix-up
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
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


def commit(run: Store, config: Config, step: int = 4, dataset: str = "data") -> None:
    """Make `run` a run of `config` on `dataset` that was committed after `step`, with adapters of random numbers."""
    base = resolve_base(config.model)
    run.put(layout.CONFIG, dump_config(config).encode())
    shapes = {name: list(shape) for name, shape in method_of(config).shapes(base.architecture).items()}
    division = EvenDivision({name: math.prod(shape) for name, shape in shapes.items()}, 1)
    shard_layout = ShardLayout(Contents(division, states_by_name("adamw", shapes), 1).of(0))
    states = 0.1 * torch.randn(shard_layout.size // 4, generator=torch.Generator().manual_seed(step))
    shard = write_shard(run, layout.shard(step, "000001-000001", 0), shard_layout, memoryview(states.numpy().tobytes()))
    ours = identity_of(config, base, dataset)
    manifest = CheckpointManifest(
        step, 1, 1, 0.0, step, {}, ours.dataset, ours.order, ours.base, ours.adapter, {}, {}, None, shapes, [shard]
    )
    run.create(layout.manifest(step), manifest.to_json())


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
            "model": {"base": str(self.base)},
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
