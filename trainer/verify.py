"""Proof of an export: the adapter in plain transformers + PEFT gives the logits of the model that Capstan trained.

python -m trainer.verify RUN_URI ADAPTER_DIR      prints one JSON object
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trainer import run_layout
from trainer.attention import choose_attention
from trainer.base import resolve_base
from trainer.checkpoint import load_partitions
from trainer.config import Config, parse_config
from trainer.deepspeed_config import build_deepspeed_config
from trainer.engine import Engine
from trainer.errors import CapstanError
from trainer.export import newest_whole
from trainer.load import DTYPES, load_model
from trainer.ranks import join
from trainer.store import Store, open_store

# Both sides multiply the same dequantized weights in the same dtype, but not in the same order of additions
# (bitsandbytes may fuse, attention kernels differ), which moves a bf16 logit by its last bits.
TOLERANCE = 0.05
_PROBE_TOKENS = 64


def logits_difference(run: Store, adapter: Path) -> tuple[float, float]:
    """(largest absolute difference of any logit, largest absolute logit) over a fixed row of tokens."""
    config = parse_config(run.get(run_layout.CONFIG).decode())
    base = resolve_base(config.model)
    tokens = torch.arange(3, 3 + _PROBE_TOKENS).remainder(base.config["vocab_size"])[None]
    trained = _trained_logits(run, config, tokens)
    exported = _exported_logits(config, base.directory, adapter, tokens)
    return float((trained - exported).abs().max()), float(trained.abs().max())


def _trained_logits(run: Store, config: Config, tokens: Tensor) -> Tensor:
    """Through our own sharded loader, engine and restore, as one rank: (1, T, V) fp32."""
    ranks = join()
    attention = choose_attention(config.model.attention, ranks.device, DTYPES[config.model.dtype])
    settings = build_deepspeed_config(
        config, world_size=ranks.world_size, accumulation=1, on_gpu=ranks.device.type == "cuda"
    )
    model, _ = load_model(resolve_base(config.model), config, settings, ranks, attention)
    engine = Engine(model, attention, config.optim, settings, ranks)
    manifest = newest_whole(run)
    load_partitions(run, manifest, engine.partitions())
    engine.refresh(manifest.updates)
    return engine.logits(tokens.to(ranks.device)).float().cpu()


def _exported_logits(config: Config, base: Path, adapter: Path, tokens: Tensor) -> Tensor:
    """Through transformers and PEFT alone: (1, T, V) fp32."""
    dtype, quant = DTYPES[config.model.dtype], config.quant
    quantization = None
    if quant.type != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.type,
            bnb_4bit_use_double_quant=quant.double,
            bnb_4bit_compute_dtype=dtype,
        )
    layers = {"num_hidden_layers": config.model.layers} if config.model.layers else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantization, **layers)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=tokens.to(model.device)).logits.float().cpu()


def main() -> None:
    try:
        difference, largest = logits_difference(open_store(sys.argv[1]), Path(sys.argv[2]))
    except CapstanError as error:
        print(f"capstan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"adapter_logits_max_diff": difference, "logits_max": largest, "tolerance": TOLERANCE}))


if __name__ == "__main__":
    main()
