"""The first step's gradients, ours and by PyTorch alone."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import Tensor

from tests.dist.assembled import Assembled, adapter_value, assemble_run, chapters_of
from tests.nf4 import dequantized
from trainer.base.find.locate import resolve_base
from trainer.base.find.tokenizer import find_rows
from trainer.base.load.load import DTYPES
from trainer.config import Config, parse_config
from trainer.config.section import part
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.export.proof import plain
from trainer.model.micro_batch import MicroBatch
from trainer.train.loop import train
from trainer.tuning.linear_adapters import LinearAdapters
from trainer.tuning.method import innermost, method_of
from trainer.tuning.objective.sft import SftSettings


def first_step(config_text: str, fingerprint: str, destination: str) -> dict[str, Any]:
    """One step of the loop from `adapter_value`; rank 0 writes the gradients that the optimizer got. -> the record."""
    here = assemble_run(parse_config(config_text), fingerprint)
    here.set_masters()
    gradients = observed_gradients(here)
    record = next(train(here.training(), 0, Position()))
    if here.ranks.rank == 0:
        save_file(gradients, destination)
    return {
        "loss": record["loss"],
        "grad_norm": record["grad_norm"],
        "targets": record[here.resolved.objective.unit],
        "accumulation": here.stream.accumulation,
    }


def first_steps(loads: list[tuple[str, str, str]]) -> list[float]:
    """`first_step` of each configuration, data and destination in turn. -> the losses."""
    return [first_step(*load)["loss"] for load in loads]


def observed_gradients(here: Assembled) -> dict[str, Tensor]:
    """A dictionary that holds the gradients which the optimizer got in the engine's last step, whole and by name."""
    gradients: dict[str, Tensor] = {}
    step = here.engine.step

    def observed(lr: float) -> float:
        for name, parameter in here.engine.model.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None
                gradients[name] = gradient.float().clone()
        return step(lr)

    here.engine.step = observed  # type: ignore[method-assign]
    return gradients


def plain_first_step(config_text: str, fingerprint: str, destination: str) -> dict[str, Any]:
    """The same by transformers and PEFT alone: one process, each document by itself, one mean over all targets."""
    from peft import inject_adapter_in_model

    config = parse_config(config_text)
    model = plain_base(config)
    method: Any = method_of(config)
    architecture = resolve_base(config.model).architecture
    described: Any = cast(LinearAdapters, innermost(method)).peft_config(architecture)
    if config.model.add_tokens:
        ids = [row for row, _ in find_rows(config.model)]
        plain.grow(model, max(ids) + 1)
        layers = ["embed_tokens"] if architecture.tied else ["embed_tokens", "lm_head"]
        described.trainable_token_indices = dict.fromkeys(layers, ids)
    if config.tuning.experts:
        described.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
        described.rank_pattern = dict.fromkeys(described.target_parameters, config.tuning.experts_rank)
    if config.tuning.modules_to_save:
        described.modules_to_save = config.tuning.modules_to_save
        described.ensure_weight_tying = architecture.tied
    inject_adapter_in_model(described, model)
    ours = {_plain_name(name): name for name in method.shapes(architecture)}
    adapters = {ours[_plain_name(name)]: part for name, part in model.named_parameters() if part.requires_grad}
    assert len(adapters) == len(ours)
    return plain_step(config, fingerprint, model, adapters, destination)


def plain_base(config: Config) -> Any:
    """The frozen base in transformers, its matrices rounded to what 4 bits hold where the run quantizes them."""
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[config.model.dtype]
    torch.set_num_threads(1)
    options: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=dtype, **options)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and config.quant.type != "none":
            module.weight.data = dequantized(module.weight.data)
    for stack in (parameter for parameter in model.parameters() if parameter.ndim == 3 and config.quant.type != "none"):
        stack.data = torch.stack([dequantized(matrix) for matrix in stack.data])
    return model


def plain_step(
    config: Config, fingerprint: str, model: Any, adapters: dict[str, Any], destination: str
) -> dict[str, Any]:
    """Writes the gradients of `adapters`, parameters of `model` by our names, at `adapter_value`. -> the record."""
    layouts = {name: _layout(name, model) for name in adapters}
    for name, parameter in adapters.items():
        layout = layouts[name]
        value = adapter_value(name, tuple(layout.ours(parameter.data).shape))
        parameter.data = layout.theirs(value).to(parameter.dtype)
    batches = first_rows(config, fingerprint)
    targets = sum(batch.targets for batch in batches)
    nats = 0.0
    for tokens, labels in documents(batches):
        logits = model(input_ids=tokens).logits[0].float()
        loss = _loss(logits, labels, config) / targets
        loss.backward()
        nats += float(loss.detach())
    gradients = {name: layouts[name].ours(parameter.grad.float()).contiguous() for name, parameter in adapters.items()}
    save_file(gradients, destination)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    rows = [batch.targets for batch in batches]
    return {"loss": nats, "grad_norm": float(norm), "targets": targets, "row_targets": rows}


def first_rows(config: Config, fingerprint: str) -> list[MicroBatch]:
    """All rows of the first step."""
    stream = train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)
    return [batch.to(torch.device("cpu")) for batch in stream.step(Position())]


def documents(batches: list[MicroBatch], reserved: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (1, n) and labels (n,) of each document with a target, without the positions that are `reserved` before
    it.
    """
    for batch in batches:
        borders = batch.input.cu_seqlens.tolist()
        for begin, end in zip(borders, borders[1:], strict=False):
            begin += reserved
            if (batch.labels[0, begin:end] != -100).any():
                yield batch.input.input_ids[:, begin:end], batch.labels[0, begin:end]


def _loss(logits: Tensor, labels: Tensor, config: Config) -> Tensor:
    """The summed cross entropy and z-loss of a document's logits (n, V) fp32 and labels (n,)."""
    smoothing, z_loss = config.objective.label_smoothing, part(config.objective, SftSettings).z_loss
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return nats + z_loss * (torch.logsumexp(logits[labels != -100], -1) ** 2).sum()


class _Layout(NamedTuple):
    """How an adapter's matrix in PEFT becomes ours, and the other way round."""

    ours: Callable[[Tensor], Tensor] = lambda value: value
    theirs: Callable[[Tensor], Tensor] = lambda value: value


def _layout(name: str, model: Any) -> _Layout:
    """PEFT lays the experts' matrices out in two dimensions: A by expert, B by rank and then by expert."""
    path, found, _ = name.partition(".adapters.")
    if not found:
        return _Layout()
    count = model.get_submodule(path).num_experts
    if name.endswith(".lora_A"):
        return _Layout(lambda a: a.unflatten(0, (count, -1)), lambda a: a.flatten(0, 1))
    return _Layout(lambda b: b.unflatten(1, (-1, count)).permute(2, 0, 1), lambda b: b.permute(1, 2, 0).flatten(1))


def _plain_name(name: str) -> str:
    """A parameter's name without the adapter's, and without what PEFT's own modules are made of."""
    return (
        name.replace(".default", "")
        .replace(".token_adapter", "")
        .replace(".modules_to_save", "")
        .replace(".adapters.gate_up_proj", ".base_layer")
        .replace(".adapters.down_proj", "")
        .removesuffix(".weight")
    )
