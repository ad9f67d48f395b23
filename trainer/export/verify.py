"""Proof of an export: in plain transformers (and PEFT) it gives the logits of the model that Capstan trained.

A merged model is not quite that one where the base was quantized for training, as it is merged into the base's own
weights. What is proven of it is the merging: its logits are those of base and adapter side by side, neither quantized.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from trainer.base.load import DTYPES, model_config
from trainer.base.locate import Base, copy_object, copy_weights
from trainer.checkpoint.checkpoints import load_partitions
from trainer.checkpoint.manifest import CheckpointManifest, read_manifest
from trainer.config import Config, Quant
from trainer.export.trained import resolve_trained_base, trained_config
from trainer.model.attention import choose_attention
from trainer.objective.sft import NextTokens
from trainer.ranks import join
from trainer.scratch import scratch_folder
from trainer.store import Store
from trainer.train.assemble import assemble
from trainer.zero.policy import build_deepspeed_config

# Of the largest logit. An adapter: both sides multiply the same dequantized weights in the same dtype, but may add in another
# order (kernels differ), which moves a bf16 logit by its last bits: 1/256 of its size each. A merged model: rounding its
# weights to bf16 moves each by up to 1/512 of its size; tiny random models, which are the worst, move by 1 to 1.5 %.
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


@dataclass(frozen=True)
class MergeProof:
    """Logits of the merged model against those of base and adapter side by side in transformers + PEFT, over a fixed row of
    tokens, both computed in fp32: what differs is that a sum of weights was rounded to the type that the base has.

    `merged_logits_max_diff`, `tolerance` and `adapter_logits_effect` are as in `Proof`. `trained_logits_max_diff`: the
    largest absolute difference from the trained model, which quantized its base and computed in `model.dtype`; no bound.
    """

    merged_logits_max_diff: float
    tolerance: float
    adapter_logits_effect: float
    trained_logits_max_diff: float


def compare_logits(run: Store, step: int, adapter: Store) -> Proof:
    """The model of `step` and the exported adapter, in this process, one after the other."""
    manifest = read_manifest(run, step)
    config = trained_config(run, manifest)
    base = resolve_trained_base(config.model, manifest)
    tokens = _probe(base)
    quant = None if config.quant.type == "none" or base.stored.quantized else config.quant
    trained = _trained_logits(run, manifest, config, base, tokens)
    with _base_directory(base) as local, _directory(adapter) as folder:
        architecture, dtype = model_config(local, config.model.layers), DTYPES[config.model.dtype]
        exported, plain = _adapted_logits(architecture, local, folder, tokens, dtype, quant)
    return Proof(
        adapter_logits_max_diff=_difference(trained, exported),
        tolerance=_TOLERATED_SHARE * float(trained.abs().max()),
        adapter_logits_effect=_difference(exported, plain),
    )


def compare_merged(run: Store, step: int, adapter: Store, merged: Store) -> MergeProof:
    """The model of `step`, its exported adapter beside the base, and the merged model, one after the other."""
    manifest = read_manifest(run, step)
    config = trained_config(run, manifest)
    base = resolve_trained_base(config.model, manifest)
    tokens = _probe(base)
    trained = _trained_logits(run, manifest, config, base, tokens)
    with _base_directory(base) as local, _directory(adapter) as folder:
        architecture = model_config(local, config.model.layers)
        adapted, plain = _adapted_logits(architecture, local, folder, tokens, torch.float32, None)
    with _directory(merged) as folder:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        exported = _logits(model.to(_device()).eval(), tokens)
    return MergeProof(
        merged_logits_max_diff=_difference(adapted, exported),
        tolerance=_TOLERATED_SHARE * float(adapted.abs().max()),
        adapter_logits_effect=_difference(adapted, plain),
        trained_logits_max_diff=_difference(trained, exported),
    )


def _probe(base: Base) -> Tensor:
    """Tokens (1, T)."""
    return torch.arange(3, 3 + _PROBE_TOKENS).remainder(base.architecture.vocabulary)[None]


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest, absolute."""
    return float((one - other).abs().max())


@contextmanager
def _directory(store: Store) -> Iterator[Path]:
    """Where transformers and PEFT, which read directories only, find a store's files: there, or copied for a while."""
    if store.uri.startswith("file://"):
        yield Path(store.uri.removeprefix("file://"))
        return
    with scratch_folder("verify") as folder:
        for entry in store.list():
            copy_object(store, entry, Path(folder))
        yield Path(folder)


@contextmanager
def _base_directory(base: Base) -> Iterator[Path]:
    """The same for a base, whose small files are on this machine already."""
    if base.store.uri == f"file://{base.directory}":
        yield base.directory
        return
    with scratch_folder("base") as folder:
        copy_weights(base, Path(folder))
        yield Path(folder)


def _trained_logits(run: Store, manifest: CheckpointManifest, config: Config, base: Base, tokens: Tensor) -> Tensor:
    """Through our own sharded loader, engine and restore, as one rank: (1, T, V) fp32."""
    ranks = join()
    attention = choose_attention(config.model.attention, ranks.device, DTYPES[config.model.dtype], base.architecture)
    settings = build_deepspeed_config(
        config, world_size=ranks.world_size, accumulation=1, on_gpu=ranks.device.type == "cuda"
    )
    engine, _ = assemble(base, config, settings, ranks, attention, "world", NextTokens())
    load_partitions(run, manifest, engine.partitions())
    engine.refresh(manifest.updates)
    return engine.logits(tokens.to(ranks.device)).float().cpu()


def _adapted_logits(
    config: PretrainedConfig, base: Path, adapter: Path, tokens: Tensor, dtype: torch.dtype, quant: Quant | None
) -> tuple[Tensor, Tensor]:
    """Through transformers, bitsandbytes and PEFT alone, with the adapter and without: (1, T, V) fp32 each."""
    device = _device()
    model: Any = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype, trust_remote_code=False)
    if quant is not None:
        _quantize(model, quant, dtype, device)
    model.to(device)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # In eval mode bitsandbytes repacks weights for a fused CPU kernel, which only takes widths divisible by 32.
            module.train()
    adapted = _logits(model, tokens)
    with model.disable_adapter():
        return adapted, _logits(model, tokens)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens.to(model.device)).logits.float().cpu()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _quantize(model: nn.Module, quant: Quant, dtype: torch.dtype, device: torch.device) -> None:
    """bitsandbytes on every matrix. transformers' own way has blocks of 64 only, and leaves experts in 16 bits."""
    form = {"blocksize": quant.block_size, "quant_type": quant.type, "compress_statistics": quant.double}
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            layer = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, device="meta")
            weight: Any = Params4bit(module.weight.data, requires_grad=False, **form)
            layer.weight = weight.to(device)  # which quantizes it
            layer.bias = module.bias
            model.set_submodule(path, layer)
    for matrix in (matrix for parameter in model.parameters() if parameter.ndim == 3 for matrix in parameter.data):
        matrix.copy_(bnb.dequantize_4bit(*bnb.quantize_4bit(matrix.to(device), **form)))
