"""Loads safetensors files into a sharded, quantized model. No rank ever holds more of the base than its share."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.base.base import Base
from trainer.base.describe.empty_model import unfilled_model
from trainer.base.describe.language_settings import model_config
from trainer.base.find.check import left_out_sentence
from trainer.base.load.cache import MANIFEST, cache_key, open_cache, write_cache
from trainer.base.load.placement import Placement, place_partitions
from trainer.base.load.source import Cached, Files, ShareSource
from trainer.base.rows.parameters import find_weights
from trainer.base.unreadable import read_by_transformers
from trainer.config import Config
from trainer.errors import Damaged
from trainer.model.activations import arrange_activations
from trainer.model.attention import Attention
from trainer.model.documents import keep_documents_apart
from trainer.model.experts import IMPLEMENTATION, prepare_experts
from trainer.model.head import LossHead
from trainer.model.kernels.liger import Kernels
from trainer.processes.ranks import World
from trainer.state.zero.partition import Partitioner
from trainer.state.zero.policy import Scope
from trainer.store.store import open_run_store

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class LoadReport:
    """The work of a load on this rank: bytes read from the store, bytes kept, and seconds.

    `kernels` has the kernels that `model.kernels` selected.
    """

    read_bytes: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0
    kernels: str = "none"


def load_model(
    base: Base,
    config: Config,
    deepspeed_config: dict[str, Any],
    ranks: World,
    attention: Attention,
    scope: Scope,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[PreTrainedModel, LoadReport]:
    """Load the base, frozen and sharded over the ranks by `scope`. `log` gets rank 0's progress. Collective.

    Raises:
        CapstanError: on every rank, if one rank cannot read a tensor, if the files lack it or have it in another shape
            or type, or if `model.kernels` cannot be used.
    """
    started = time.monotonic()
    dtype, kernels = DTYPES[config.model.dtype], Kernels(config.model.kernels, ranks.device)

    def fill(source: ShareSource) -> _Filled:
        with ranks.agreeing():
            base.stored.check(base, config)
            model = empty_model(base, config, attention, kernels)
            weights = find_weights(base, model, config.model.layers)
        if ranks.rank == 0:
            log(f"kernels: {kernels.name} ({kernels.why})")
            if weights.left_out:
                log(left_out_sentence(weights.left_out))
        partitioner = Partitioner(deepspeed_config, dtype, scope, ranks, source.room)
        quantizable = base.architecture.quantizable()
        placement = place_partitions(model, config.quant, dtype, partitioner, weights.sources, quantizable)
        return _Filled(model, placement, partitioner, source.fill(placement, ranks, log))

    filled = _through_cache(base, config, ranks, fill, log) if config.quant.cache else fill(Files(base))
    model = filled.model
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    seconds = time.monotonic() - started
    return model, LoadReport(filled.read_bytes, filled.partitioner.kept_bytes, seconds, kernels.name)


@dataclass(frozen=True)
class _Filled:
    """The sharded model without adapters, and the bytes that this rank read for it."""

    model: PreTrainedModel
    placement: Placement
    partitioner: Partitioner
    read_bytes: int


def _through_cache(
    base: Base,
    config: Config,
    ranks: World,
    fill: Callable[[ShareSource], _Filled],
    log: Callable[[str], None],
) -> _Filled:
    """Load from the store's quantized base. If it is missing or damaged, load from the files and write it."""
    store = open_run_store(config)
    # One rank computes the key: nodes with their own copies of the files see different times of change.
    folder = store.sub(ranks.on_first(lambda: cache_key(base, config)))
    with ranks.agreeing():
        # Only one rank checks: another might see a cache that is committed at this very moment.
        there = ranks.rank == 0 and folder.exists(MANIFEST)
    if ranks.broadcast(there):
        try:
            with ranks.agreeing():
                cached = open_cache(folder)
            return fill(Cached(base, cached))
        except Damaged as error:
            if ranks.rank == 0:
                log(f"quant.cache: {error} The base is quantized from its source again.")
            with ranks.agreeing():
                if ranks.rank == 0:
                    folder.delete(MANIFEST)
    filled = fill(Files(base))
    writers = filled.partitioner.size
    write_cache(folder, filled.placement.partitions(), filled.placement.means(), writers, ranks, log)
    return filled


def empty_model(base: Base, config: Config, attention: Attention, kernels: Kernels | None = None) -> PreTrainedModel:
    """The model of `unfilled_model`, without the tensors of its files, and with a `LossHead` as head."""
    with read_by_transformers(base.name, "config.json"):
        architecture = model_config(base.directory, config.model.layers)
        architecture.get_text_config().use_cache = False
        model = unfilled_model(
            architecture,
            DTYPES[config.model.dtype],
            attn_implementation=attention.name,
            experts_implementation=IMPLEMENTATION,
        )
    if kernels is not None:  # before others wrap the forward passes of these modules
        kernels.apply(model)
    prepare_experts(model)
    plain: Any = model.get_output_embeddings()
    facts = base.architecture
    head = LossHead(plain.in_features, plain.out_features, bias=False, device="meta")
    head.weight, head.bias = plain.weight, plain.bias
    head.factor, head.divisor, head.softcap = facts.logit_factor, facts.logit_divisor, facts.softcap
    model.set_submodule(facts.head.removesuffix(".weight"), head)
    keep_documents_apart(model)
    arrange_activations(model, config.train)
    return model.train()
