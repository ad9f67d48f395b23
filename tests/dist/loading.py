"""A base as the loader makes it, and beside it as transformers and bitsandbytes make it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import material
from tests.dist.assembled import assemble_run
from tests.dist.runs import outcome_of
from tests.experts import multiply_expert_by_expert
from tests.nf4 import decode_layers, decoded, dequantized, quantized
from trainer.base.describe.description import describe
from trainer.base.find.locate import resolve_base, resolve_base_alike
from trainer.base.load import load
from trainer.base.load.load import Files, load_model
from trainer.base.partitions import filling, reading
from trainer.base.partitions.filling import Quantize, as_tensor
from trainer.config import Config, Model, override, parse_config
from trainer.errors import StorageError
from trainer.model.attention import Attention, choose_attention
from trainer.model.held.layers import HeldLinear, HeldWeights
from trainer.plan.assemble import checksums
from trainer.processes.ranks import join
from trainer.state.kept import Kept
from trainer.state.zero.policy import build_deepspeed_config
from trainer.store.safetensors_index import numel
from trainer.store.store import Store


@contextmanager
def reading_by(told_bytes: int, piece_bytes: int) -> Iterator[None]:
    """Read tensors of these sizes as large ones are read, which a test cannot load."""
    plain = filling._TOLD_BYTES, reading.PIECE_BYTES
    filling._TOLD_BYTES, filling.PIECE_BYTES, reading.PIECE_BYTES = told_bytes, piece_bytes, piece_bytes
    try:
        yield
    finally:
        filling._TOLD_BYTES, (filling.PIECE_BYTES, reading.PIECE_BYTES) = plain[0], (plain[1], plain[1])


def quantized_bytes(
    config_text: str, bases: list[str], quants: list[list[str]], told_bytes: int, piece_bytes: int
) -> dict[str, Any]:
    """Load every base with every quantization; names what differs from bitsandbytes quantizing the whole tensor."""
    with reading_by(told_bytes, piece_bytes):
        return _quantized_bytes(config_text, bases, quants)


def _quantized_bytes(config_text: str, bases: list[str], quants: list[list[str]]) -> dict[str, Any]:
    ranks = join()
    torch.set_num_threads(1)
    differing, compared, scales = [], 0, _watched_scales()
    for base in bases:
        for overrides in quants:
            config = override(parse_config(config_text), f"model.base={base}", *overrides)
            settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
            found = resolve_base(config.model)
            scope = "node" if config.sharding.scope == "node" else "world"
            model, _ = load_model(found, config, settings, ranks.world, Attention("sdpa", ""), scope)
            for name, module in model.named_modules():
                if isinstance(module, HeldLinear):
                    source = found.tensors[f"{name.removesuffix('.base_layer')}.weight"]
                    whole = as_tensor(source.read(0, numel(source)), source).view(source.shape).bfloat16()
                    problems = _differences(module, whole[None], config)
                    compared += 1
                    differing += [f"{Path(base).name} {' '.join(overrides)} {name}: {problem}" for problem in problems]
    return {"compared": compared, "differing": differing, "scales": max(scales)}


def loaded_apart(config_text: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Load with each of these settings, and again when rank 1 has lost its share. Returns for each case the bytes that
    this rank has read then, and whether it has the same share as before.
    """
    ranks = join()
    torch.set_num_threads(1)
    results = []
    for overrides in cases:
        config = override(parse_config(config_text), *overrides)
        settings = build_deepspeed_config(config, ranks.world_size, 1, on_gpu=False)
        found = resolve_base(config.model)

        def load(kept: Kept, config: Config = config, found: Any = found, settings: Any = settings) -> Any:
            loaded = load_model(found, config, settings, ranks.world, Attention("sdpa", ""), "world", kept=kept.shares)
            model, report = loaded
            shares = {name: part.ds_tensor.clone() for name, part in model.named_parameters()}  # type: ignore[attr-defined]
            means = {
                name: module.absmax_mean.clone()
                for name, module in model.named_modules()
                if isinstance(module, HeldWeights) and module.form.means
            }
            return report.read_bytes, {**shares, **means}

        kept = Kept.made("test")
        _, before = load(kept)
        read, after = load(kept if ranks.rank == 0 else Kept.made("another"))
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        results.append({"read": read, "same": same})
    return results


def resolved_alike(base: str, caches: str) -> list[str]:
    """The base's fingerprint, and the small files in the cache that this rank alone has."""
    ranks = join()
    os.environ["XDG_CACHE_HOME"] = f"{caches}{ranks.rank}"
    found = resolve_base_alike(Model(base=base), ranks)
    return [found.fingerprint, *sorted(path.name for path in found.directory.iterdir())]


def _watched_scales() -> list[int]:
    """A list that grows by the number of matrices whose scales are in memory, whenever one is finished."""
    jobs, found = list[Any](), list[int]()
    plain_init, plain_finish = Quantize.__init__, Quantize.finish

    def init(job: Any, *arguments: Any) -> None:
        plain_init(job, *arguments)
        jobs.append(job)

    def finish(job: Any) -> None:
        found.append(sum(getattr(other, "_scales", None) is not None for other in jobs))
        plain_finish(job)

    Quantize.__init__, Quantize.finish = init, finish  # type: ignore[method-assign]
    return found


def _differences(module: HeldWeights, matrices: Tensor, config: Config) -> list[str]:
    """How the packed bytes differ from bitsandbytes' of each of the `matrices` (slices, outputs, inputs)."""
    quant, theirs = config.quant, dict[str, list[Tensor]]()
    for matrix in matrices:
        packed, state = quantized(matrix, quant.type, quant.block_size, quant.double)
        found = {"weight": packed.view(-1), "dequantized": decoded(packed, state)[None], "absmax": state.absmax}
        if quant.double:
            assert state.state2 is not None
            assert state.offset is not None
            found |= {"nested": state.state2.absmax, "mean": state.offset[None]}
        for key, tensor in found.items():
            theirs.setdefault(key, []).append(tensor)
    with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False))):
        slices = module.matrices(0, module.slices)
        ours: dict[str, Any] = {"weight": module.weight.data, "dequantized": slices}
        if quant.double:
            ours |= {"absmax": module.part("absmax"), "nested": module.part("nested_absmax").view(torch.float32)}
            ours |= {"mean": module.absmax_mean}
        else:
            ours |= {"absmax": module.part("absmax").view(torch.float32)}
        every = {key: torch.cat(tensors) for key, tensors in theirs.items()}
        return [
            f"{key}: {tuple(ours[key].shape)} and {tuple(every[key].shape)}, "
            f"{int((ours[key] != every[key]).sum()) if ours[key].shape == every[key].shape else 'all'} differ"
            for key in ours
            if ours[key].dtype != every[key].dtype or not torch.equal(ours[key], every[key])
        ]


def stored_bases(config_text: str, loads: list[tuple[str, str, list[str]]], destination: str) -> list[dict[str, Any]]:
    """Load bases in fewer bits: each a name for its logits, which rank 0 writes, the base and overrides.

    -> for each {"compared", "differing": packed matrices against bitsandbytes' of the base's folder "decoded", as
    transformers loads that, "other": those that do not stand for the very weights there, "read_bytes", "log"}.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    facts = []
    for name, base, overrides in loads:
        config = override(parse_config(config_text), f"model.base={base}", *overrides)
        here = assemble_run(config)
        reference = AutoModelForCausalLM.from_pretrained(Path(base, "decoded"), dtype=torch.bfloat16)
        expected, compared, differing, other = dict(reference.named_parameters()), 0, [], []
        for path, module in here.engine.model.named_modules():
            if isinstance(module, HeldWeights):
                plain = path.removesuffix(".base_layer")
                whole = expected[plain if plain in expected else f"{plain}.weight"].detach()
                if whole.ndim == 2 and isinstance(reference.get_submodule(plain), Conv1D):
                    whole = whole.t().contiguous()
                problems = _differences(module, whole.view(-1, *whole.shape[-2:]), config)
                compared += 1
                differing += [f"{name} {plain}: {problem}" for problem in problems]
                with deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False))):
                    held = module.matrices(0, module.slices)
                if not torch.equal(held.flatten(), whole.flatten()):
                    other.append(plain)
        logits = here.engine.logits(probe())
        if here.ranks.rank == 0:
            save_file({"logits": logits.contiguous()}, f"{destination}/{name}.safetensors")
        read = here.report.read_bytes
        facts.append(
            {"compared": compared, "differing": differing, "other": other, "read_bytes": read, "log": here.log}
        )
    return facts


def logits_read_by(told_bytes: int, piece_bytes: int, *given: Any) -> list[dict[str, Any]]:
    """`loaded_logits` of tensors that are read as larger ones."""
    with reading_by(told_bytes, piece_bytes):
        return loaded_logits(*given)


def loaded_logits(config_text: str, bases: list[str], overrides: list[str], destination: str) -> list[dict[str, Any]]:
    """Through loader and engine: rank 0 writes each base's logits as `<base's name>.safetensors` under
    `destination`.
    """
    facts = []
    for base in bases:
        config = override(parse_config(config_text), f"model.base={base}", *overrides)
        here = assemble_run(config)
        logits = here.engine.logits(probe())
        if here.ranks.rank == 0:
            save_file({"logits": logits.contiguous()}, f"{destination}/{Path(base).name}.safetensors")
        model = here.engine.model
        facts.append(
            {
                "packed": len(checksums(model)),
                "read_bytes": here.report.read_bytes,
                "seconds": here.report.seconds,
                "kept_bytes": here.report.kept_bytes,
                "buffers": {
                    name: [str(buffer.dtype), buffer.double().sum().item()] for name, buffer in model.named_buffers()
                },
                "digest": logits.double().sum().item(),
                "log": here.log,
            }
        )
    return facts


def load_that_fails_on(rank: int, config_text: str, reads: int) -> dict[str, Any]:
    """Load the base; `rank` alone cannot read any more after so many reads. -> how the load ended on this rank."""
    config = parse_config(config_text)
    plain, done = Store.get_range, []

    def get_range(self: Store, key: str, start: int, end: int) -> bytearray:
        done.append(key)
        if os.environ["RANK"] == str(rank) and key.endswith(".safetensors") and len(done) > reads:
            raise StorageError(f"cannot read {key}: the test took it away.")
        return plain(self, key, start, end)

    Store.get_range = get_range
    return outcome_of(lambda: assemble_run(config))


def stock_logits(bases: list[str], quant_type: str, double: bool, destination: str) -> list[dict[str, Any]]:
    """The same through transformers and bitsandbytes alone, as one process."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    multiply_expert_by_expert()
    torch.set_num_threads(1)
    facts = []
    for base in bases:
        quantization: dict[str, Any] = {}  # with None given, transformers forgets that a base came quantized
        if quant_type not in ("none", "int8"):
            quantization["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant_type,
                bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        needs = describe(json.loads(Path(base, "config.json").read_text())).architecture.attention_needs
        model: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16,
            **quantization,
            attn_implementation=choose_attention("auto", torch.device("cpu"), torch.bfloat16, needs).name,
        )
        if quantization:
            _quantize_experts(model, quant_type, double)
        if quant_type == "int8":
            _quantize_layers(model)
        decode_layers(model)
        with torch.no_grad():
            logits = model(input_ids=probe(), use_cache=False).logits
        save_file({"logits": logits.contiguous()}, f"{destination}/{Path(base).name}.safetensors")
        buffers = {n: [str(b.dtype), b.double().sum().item()] for n, b in model.named_buffers() if "rotary" in n}
        facts.append({"buffers": buffers})
    return facts


def _quantize_layers(model: Any) -> None:
    """bitsandbytes' whole numbers in the decoder layers' matrices, experts among them: transformers has none with a
    scale a block.
    """
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 3 or (isinstance(module, torch.nn.Linear) and ".layers." in name and parameter.ndim == 2):
            for matrix in parameter.data.view(-1, *parameter.shape[-2:]):
                matrix.copy_(dequantized(matrix, "int8"))


def _quantize_experts(model: Any, quant_type: str, double: bool) -> None:
    """bitsandbytes on each matrix of a mixture of experts, which transformers leaves in 16 bits."""
    for parameter in model.parameters():
        if parameter.ndim == 3:
            for matrix in parameter.data:
                matrix.copy_(dequantized(matrix, quant_type, double=double))


def probe() -> Tensor:
    """One row that is longer than the sliding windows, (1, 48)."""
    return torch.arange(48).mul(37).remainder(material.SIZES["vocab_size"])[None]


def laid_over_a_buffer(config_text: str) -> dict[str, Any]:
    """Load the base twice, the second time over memory that is given, and make the engine of each: what of the
    partitions differs, and what lies elsewhere.
    """
    config = parse_config(config_text)
    plain = _frozen(assemble_run(config).engine.model)
    buffer, used = torch.zeros(2 * sum(part.nbytes + 64 for part in plain.values()), dtype=torch.uint8), 0

    def room(made: Tensor) -> Tensor:
        nonlocal used
        begin, used = used, used + -(-made.nbytes // 64) * 64
        return buffer[begin : begin + made.nbytes].view(made.dtype)

    load.Files = lambda base, _: Files(base, room)  # type: ignore[misc]
    given = _frozen(assemble_run(config).engine.model)
    first, last = buffer.data_ptr(), buffer.data_ptr() + used
    return {
        "compared": len(given),
        "differing": [name for name in plain if not torch.equal(plain[name], given[name])],
        "elsewhere": [name for name, part in given.items() if not first <= part.data_ptr() < last],
    }


def _frozen(model: torch.nn.Module) -> dict[str, Tensor]:
    """This rank's partitions of what is frozen, by name."""
    named: dict[str, Any] = dict(model.named_parameters())
    return {name: parameter.ds_tensor for name, parameter in named.items() if not parameter.requires_grad}
