"""Bases of many families, each loaded by this loader and, in the same process, by transformers, bitsandbytes and PEFT
alone.
"""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import deepspeed
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.dist.assembled import Assembled, assemble_run
from tests.dist.proofs import in_this_process
from tests.experts import multiply_expert_by_expert
from tests.material import SIZES
from tests.nf4 import decoded
from trainer.base.load.load import DTYPES
from trainer.config import Config, dump_config, override, parse_config
from trainer.data.order.settings import Position
from trainer.export.proof.verify import prove_adapter, prove_merged
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.model.held.layers import HeldWeights
from trainer.plan.resolve import resolve
from trainer.run import layout
from trainer.state.checkpoint.checkpoints import Checkpoints, CommitHooks
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import open_store
from trainer.train.loop import train


def compared(
    config_text: str, bases: dict[str, str], others: dict[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Every base over these ranks, with adapters that have learnt nothing, beside transformers' own load of the same
    folder, or of the kind's folder in `others`.

    The facts are by the base's kind. A kind that fails has the failure, and stops no other.
    """
    folders = {**bases, **(others or {})}
    return {kind: _facts(partial(_loaded, _of(config_text, kind, base), folders[kind])) for kind, base in bases.items()}


def trained(
    config_text: str, bases: dict[str, str], fingerprint: str, folder: str, in_fp32: list[str]
) -> dict[str, dict[str, Any]]:
    """The same, and then the steps of a run over each, its export and its merge, which rank 0 writes under `folder`.
    The kinds `in_fp32` compute so."""
    exact = dump_config(override(parse_config(config_text), "model.dtype=fp32"))
    texts = {kind: exact if kind in in_fp32 else config_text for kind in bases}
    return {
        kind: _facts(partial(_trained, _of(texts[kind], kind, base), fingerprint, Path(folder, kind)))
        for kind, base in bases.items()
    }


def _of(config_text: str, kind: str, base: str) -> Config:
    return override(parse_config(config_text), f"run.name={kind}", f"model.base={base}")


def _facts(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except Exception:
        return {"failed": traceback.format_exc()}


def _loaded(config: Config, stock: str) -> dict[str, Any]:
    pair = _compared(config, stock)
    if not config.quant.cache:
        return pair.facts
    cached = assemble_run(config)
    return {
        **pair.facts,
        "cached": _distance(cached.engine.logits(probe()), pair.logits),
        "read_again": cached.report.read_bytes / pair.ours.report.read_bytes,
    }


def proven(runs: dict[str, str], folder: str) -> dict[str, dict[str, Any]]:
    """`capstan export --verify` of each run's last step, and of its merged model, as `trained` has left them."""
    in_this_process()

    def proofs(kind: str, uri: str) -> dict[str, Any]:
        run, (step, *_) = open_store(uri), committed_steps(open_store(uri))
        adapter, merged = (open_store(f"{folder}/{kind}/{name}") for name in ("adapter", "merged"))
        return {"adapter": asdict(prove_adapter(run, step, adapter)), "merged": asdict(prove_merged(run, step, merged))}

    return {kind: _facts(partial(proofs, kind, uri)) for kind, uri in runs.items()}


def _trained(config: Config, fingerprint: str, folder: Path) -> dict[str, Any]:
    pair = _compared(config, config.model.base, fingerprint)
    learnt = _learn(pair.ours, fingerprint)
    logits = pair.ours.engine.logits(probe())
    found = {**pair.facts, **learnt, "effect": _distance(logits, pair.logits)}
    return {**found, **_exported(pair, logits, folder)} if pair.ours.ranks.rank == 0 else found


@dataclass(frozen=True)
class Pair:
    """A base twice: by our loader and engine, and in plain transformers with weights as bitsandbytes leaves them."""

    ours: Assembled
    stock: Any
    logits: Tensor  # of the stock model, for the probe
    facts: dict[str, Any]


def _compared(config: Config, folder: str, fingerprint: str | None = None) -> Pair:
    """`folder` is the one that transformers reads."""
    torch.set_num_threads(1)
    ours = assemble_run(config, fingerprint)
    stock = stock_model(folder, ours.attention.name, DTYPES[config.model.dtype])
    differing, packed = _pack(ours, stock, config)
    expected = logits_of(stock)
    facts = {
        "packed": packed,
        "differing": [*differing, *_other(ours, stock, packed)],
        "logits": _distance(ours.engine.logits(probe()), expected),
        "spread": float(expected.float().std()),
    }
    return Pair(ours, stock, expected, facts)


def _learn(ours: Assembled, fingerprint: str) -> dict[str, Any]:
    """The run's steps, and a commit of the last one."""
    config = ours.config
    identity = resolve(config).identity(fingerprint)
    checkpoints = Checkpoints(ours.run, ours.ranks, 1, identity, config.checkpoint, CommitHooks(ours.note))
    if ours.ranks.rank == 0:
        ours.run.put(layout.CONFIG, dump_config(config).encode())
    records = list(train(replace(ours.training(), checkpoints=checkpoints), 0, Position()))
    return {key: [record[key] for record in records] for key in ("loss", "grad_norm")}


def _exported(pair: Pair, logits: Tensor, folder: Path) -> dict[str, Any]:
    """The adapter in PEFT on the stock model, and the merged model in transformers beside PEFT's own merge."""
    run, base = pair.ours.run, pair.ours.config.model.base
    export_adapter(run, open_store(str(folder / "adapter")))
    adapted: Any = PeftModel.from_pretrained(pair.stock, str(folder / "adapter"), autocast_adapter_dtype=False)
    theirs = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    ours = {name for name, module in pair.ours.engine.model.named_modules() if isinstance(module, LoraLayer)}
    export_merged(run, open_store(str(folder / "merged")))
    merged = stock_model(str(folder / "merged"), pair.ours.attention.name)
    expected = merged_by_peft(base, folder / "adapter")
    before = stock_model(base, pair.ours.attention.name).state_dict()
    return {
        "adapted": sorted(ours),
        "adapted_elsewhere": sorted(theirs ^ ours),
        "by_weight": bool(adapted.peft_config["default"].target_parameters),
        "peft": _distance(logits_of(adapted), logits),
        "merged": [name for name, value in merged.state_dict().items() if not torch.equal(value, expected[name])],
        "changed": [name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])],
    }


def merged_by_peft(base: str, adapter: Path) -> dict[str, Tensor]:
    """PEFT's own merge in fp32, each weight then rounded to the type that transformers loads it in."""
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    types = {name: value.dtype for name, value in stock_model(base, "eager").state_dict().items()}
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    return {name: value.to(types[name]) for name, value in merged.items()}


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=probe(), use_cache=False).logits


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def stock_model(base: str, attention: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    multiply_expert_by_expert()
    kernels: Any = {"attn_implementation": attention}
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **kernels)


def probe() -> Tensor:
    """One row that is longer than the sliding windows and the chunks, (1, 48)."""
    return torch.arange(48).mul(37).remainder(SIZES["vocab_size"])[None]


def _pack(here: Assembled, stock: nn.Module, config: Config) -> tuple[list[str], list[str]]:
    """Give the weights in `stock` that the engine's model has in 4 bits the values that bitsandbytes leaves of them.

    -> the modules whose packed bytes or scales are not bitsandbytes' own, and all packed ones.
    """
    differing, packed = list[str](), list[str]()
    for path, module in here.engine.model.named_modules():
        if not isinstance(module, HeldWeights):
            continue
        path = path.removesuffix(".base_layer")
        weight = stock.get_parameter(path if module.slices > 1 else f"{path}.weight")
        matrices = weight.data if weight.ndim == 3 else weight.data[None]
        theirs = [
            bnb.quantize_4bit(matrix, blocksize=config.quant.block_size, quant_type=config.quant.type)
            for matrix in matrices
        ]
        with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False))):
            same = torch.equal(module.weight.data, torch.cat([data.view(-1) for data, _ in theirs]))
            same &= torch.equal(
                module.absmax.data.view(torch.float32), torch.cat([state.absmax for _, state in theirs])
            )
        packed.append(path)
        if not same:
            differing.append(path)
        weight.data = torch.stack([decoded(*pair) for pair in theirs]).view_as(weight)
    return differing, packed


def _other(here: Assembled, stock: nn.Module, packed: list[str]) -> Iterator[str]:
    """The names of whatever is not in 4 bits and differs, in value or in type: norms, routers, biases, embeddings,
    buffers.
    """
    model = here.engine.model
    ours = {name.replace(".base_layer", ""): value for name, value in model.named_parameters()}
    expected = {name: value for name, value in stock.named_parameters() if name.removesuffix(".weight") not in packed}
    for name, value in expected.items():
        with deepspeed.zero.GatheredParameters([ours[name]]):
            if ours[name].dtype != value.dtype or not torch.equal(ours[name].data, value.data):
                yield f"{name}: {ours[name].dtype}, {value.dtype}"
    buffers = dict(model.named_buffers())
    for name, value in stock.named_buffers():
        if buffers[name].dtype != value.dtype or not torch.equal(buffers[name], value):
            yield f"{name}: {buffers[name].dtype}, {value.dtype}"
