"""Proof of an export: the adapter in plain transformers + PEFT gives the logits of the model that Capstan trained."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trainer import run_layout
from trainer.attention import choose_attention
from trainer.base import copy_weights, resolve_base
from trainer.checkpoint import load_partitions
from trainer.config import Config, parse_config
from trainer.deepspeed_config import build_deepspeed_config
from trainer.engine import Engine
from trainer.errors import ConfigError
from trainer.load import DTYPES, load_model, model_config
from trainer.manifest import whole_checkpoint
from trainer.ranks import join
from trainer.store import Store

# Both sides multiply the same dequantized weights in the same dtype, but may add in another order (kernels differ),
# which moves a bf16 logit by its last bits: 1/256 of its size each.
_TOLERATED_SHARE = 0.02
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Proof:
    """Logits of the trained model against those of the exported adapter, over a fixed row of tokens.

    `adapter_logits_max_diff`: the largest absolute difference of any logit. `tolerance`: 2 % of the largest logit.
    `adapter_logits_effect`: the largest absolute change that the adapter makes to the base's logits; a proof is only
    worth something when it exceeds the tolerance.
    """

    adapter_logits_max_diff: float
    tolerance: float
    adapter_logits_effect: float


def compare_logits(run: Store, step: int, adapter: Store) -> Proof:
    """The model of `step` and the exported adapter, in this process, one after the other."""
    config = parse_config(run.get(run_layout.CONFIG).decode())
    base = resolve_base(config.model)
    tokens = torch.arange(3, 3 + _PROBE_TOKENS).remainder(base.config["vocab_size"])[None]
    trained = _trained_logits(run, step, config, tokens)
    with (
        tempfile.TemporaryDirectory(prefix="capstan-verify-") as folder,
        tempfile.TemporaryDirectory(prefix="capstan-base-") as copy,
    ):
        for entry in adapter.list():
            Path(folder, entry.key).write_bytes(adapter.get(entry.key))
        local = base.directory
        if base.store.uri != f"file://{local}":  # transformers reads directories only
            local = Path(copy)
            copy_weights(base, local)
        exported, plain = _exported_logits(config, local, Path(folder), tokens)
    return Proof(
        adapter_logits_max_diff=float((trained - exported).abs().max()),
        tolerance=_TOLERATED_SHARE * float(trained.abs().max()),
        adapter_logits_effect=float((exported - plain).abs().max()),
    )


def _trained_logits(run: Store, step: int, config: Config, tokens: Tensor) -> Tensor:
    """Through our own sharded loader, engine and restore, as one rank: (1, T, V) fp32."""
    ranks, base = join(), resolve_base(config.model)
    attention = choose_attention(config.model.attention, ranks.device, DTYPES[config.model.dtype], base.config)
    settings = build_deepspeed_config(
        config, world_size=ranks.world_size, accumulation=1, on_gpu=ranks.device.type == "cuda"
    )
    model, _ = load_model(base, config, settings, ranks, attention)
    engine = Engine(model, attention, config.optim, settings, ranks)
    manifest = whole_checkpoint(run, step)
    load_partitions(run, manifest, engine.partitions())
    engine.refresh(manifest.updates)
    return engine.logits(tokens.to(ranks.device)).float().cpu()


def _exported_logits(config: Config, base: Path, adapter: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Through transformers and PEFT alone, with the adapter and without: (1, T, V) fp32 each."""
    dtype, quant = DTYPES[config.model.dtype], config.quant
    if quant.type != "none" and quant.block_size != 64:
        raise ConfigError(
            f"quant.block_size: {quant.block_size} cannot be verified, as transformers quantizes in blocks of 64 only. "
            "Export without --verify."
        )
    quantization = None
    if quant.type != "none":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.type,
            bnb_4bit_use_double_quant=quant.double,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base, config=model_config(base, config.model.layers), dtype=dtype, quantization_config=quantization
    )
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode bitsandbytes repacks weights for a fused CPU kernel, which only takes widths divisible by 32.
            module.train()
    with torch.no_grad():
        adapted = model(input_ids=tokens.to(model.device)).logits.float().cpu()
        with model.disable_adapter():
            plain = model(input_ids=tokens.to(model.device)).logits.float().cpu()
    return adapted, plain
