"""Full fine-tuning by transformers and PyTorch alone."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.dist.assembled import adapter_value, chapters_of
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import DTYPES
from trainer.config import Config, Optim, parse_config
from trainer.data.order.settings import Position
from trainer.data.order.stream import Stream, train_stream
from trainer.model.micro_batch import MicroBatch
from trainer.train.horizon import learning_rate
from trainer.tuning.method import find_method


def plain_first_step(config_text: str, fingerprint: str, destination: str) -> dict[str, Any]:
    """The first step's gradients from `adapter_value`, each document by itself; one process, one mean over all
    targets.
    """
    config = parse_config(config_text)
    model, learning = plain_model(config)
    for name, parameter in learning.items():
        parameter.data = adapter_value(name, tuple(parameter.shape)).to(parameter.dtype)
    batches = _batches(plain_stream(config, fingerprint), Position())
    targets = sum(batch.targets for batch in batches)
    nats = 0.0
    for batch in batches:
        for tokens, labels in _documents(batch):
            loss = _nats(model(input_ids=tokens, use_cache=False).logits[0], labels) / targets
            loss.backward()
            nats += float(loss.detach())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in learning)
    save_file({name: parameter.grad.float() for name, parameter in learning.items()}, destination)
    return {"loss": nats, "targets": targets}


def plain_losses(config_text: str, fingerprint: str) -> list[float]:
    """The loss of every step by torch's AdamW, bitsandbytes' or transformers' Adafactor, whose weight decay leaves out
    all that is no matrix."""
    config = parse_config(config_text)
    model, learning = plain_model(config)
    matrices = [parameter for parameter in learning.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in learning.values() if parameter.ndim == 1]
    optim, steps = config.optim, config.train.steps
    assert steps
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = _optimizers()[optim.name](groups, optim)
    stream, curve, position = plain_stream(config, fingerprint), list[float](), Position()
    for step in range(1, steps + 1):
        batches = _batches(stream, position)
        targets, nats = sum(batch.targets for batch in batches), 0.0
        for batch in batches:
            for tokens, labels in _documents(batch):
                loss = _nats(model(input_ids=tokens, use_cache=False).logits[0], labels) / targets
                loss.backward()
                nats += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(learning.values(), optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(nats)
        position = stream.advance(position)
    return curve


def _optimizers() -> dict[str, Callable[[Any, Optim], Any]]:
    from bitsandbytes.optim.adamw import AdamW8bit
    from transformers.optimization import Adafactor

    return {
        "adamw": lambda groups, optim: torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps),
        "adamw_8bit": lambda groups, optim: AdamW8bit(groups, betas=optim.betas, eps=optim.eps),
        "adafactor": lambda groups, optim: Adafactor(
            groups, optim.lr, scale_parameter=False, relative_step=False, warmup_init=False
        ),
    }


def plain_model(config: Config) -> tuple[Any, dict[str, Any]]:
    """transformers' model, and those of its parameters that learn."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    options: Any = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=DTYPES[config.model.dtype], **options)
    names = find_method(config.tuning).shapes(resolve_base(config.model).architecture)
    model.requires_grad_(False)
    learning = {name: parameter.requires_grad_() for name, parameter in model.named_parameters() if name in names}
    assert learning.keys() == names.keys()
    return model.train(), learning


def plain_stream(config: Config, fingerprint: str) -> Stream:
    return train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)


def _batches(stream: Stream, position: Position) -> list[MicroBatch]:
    return [batch.to(torch.device("cpu")) for batch in stream.step(position)]


def _documents(batch: MicroBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens (1, n) and labels (n,) of each document with a target."""
    borders = batch.input.cu_seqlens.tolist()
    for begin, end in zip(borders, borders[1:], strict=False):
        if (batch.labels[0, begin:end] != -100).any():
            yield batch.input.input_ids[:, begin:end], batch.labels[0, begin:end]


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
