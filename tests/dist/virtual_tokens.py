"""Virtual tokens before each document: their gradients by PEFT alone, and the predictions that they begin with."""

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.dist.assembled import adapter_value, assemble_run
from tests.dist.gradients import documents, first_rows, plain_base
from trainer.config import Config, parse_config
from trainer.data.order.settings import Position
from trainer.tuning.method import find_method


def plain_first_step(config_text: str, fingerprint: str, destination: str, glued: bool) -> dict[str, float]:
    """The first step's gradients from `adapter_value` by transformers and PEFT: each document by itself, one mean over
    all targets.

    `glued`: the documents of a row are one document, as they must not be.
    """
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    config = parse_config(config_text)
    tokens = config.tuning.virtual_tokens
    kind = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[config.tuning.method]
    model: Any = get_peft_model(plain_base(config), kind(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    weight = model.prompt_encoder.default.embedding.weight
    shapes = _shapes(config)
    weight.data = peft_weight({name: adapter_value(name, shape) for name, shape in shapes.items()})
    batches = first_rows(config, fingerprint)
    targets = sum(batch.targets for batch in batches)
    found = list(documents(batches, find_method(config.tuning).virtual.reserved))
    if glued:
        found = [(torch.cat([ids for ids, _ in found], dim=1), torch.cat([labels for _, labels in found]))]
    nats = 0.0
    for ids, labels in found:
        logits = model(input_ids=ids).logits[0, -len(labels) :].float()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / targets
        loss.backward()
        nats += float(loss.detach())
    save_file(our_weights(weight.grad, shapes), destination)
    return {"loss": nats, "targets": targets}


def peft_weight(weights: dict[str, Tensor]) -> Tensor:
    """PEFT's one matrix of the parameters that learn."""
    if "prompt.weight" in weights:
        return weights["prompt.weight"]
    every = torch.stack(list(weights.values()))  # layers, keys and values, heads, tokens, head
    return every.permute(3, 0, 1, 2, 4).flatten(1).contiguous()


def our_weights(weight: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The other way round."""
    if "prompt.weight" in shapes:
        return {"prompt.weight": weight}
    names = [f"model.layers.{layer}.self_attn.prefix" for layer in range(len(shapes))]
    two, heads, tokens, size = shapes[names[0]]
    every = weight.view(tokens, len(names), two, heads, size).permute(1, 2, 3, 0, 4)
    return {name: values.contiguous() for name, values in zip(names, every, strict=True)}


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    from trainer.base.find.locate import resolve_base

    return find_method(config.tuning).shapes(resolve_base(config.model).architecture)


def switched_off(config_text: str, fingerprint: str) -> dict[str, float]:
    """Nats of this rank's first row: with virtual tokens that have learnt, with them switched off, and with them
    again.
    """
    here = assemble_run(parse_config(config_text), fingerprint)
    here.set_masters()
    row, nats = here.stream.step(Position())[0], dict[str, float]()
    with torch.no_grad():
        nats["learnt"] = float(here.engine.loss(row))
        with find_method(here.config.tuning).switched_off(here.engine.model):
            nats["off"] = float(here.engine.loss(row))
        nats["again"] = float(here.engine.loss(row))
    return nats


def plain_nats(config_text: str, fingerprint: str) -> list[float]:
    """Nats of each of the first step's rows by the base in transformers, each document by itself."""
    config = parse_config(config_text)
    model, reserved = plain_base(config), find_method(config.tuning).virtual.reserved
    sums = []
    for batch in first_rows(config, fingerprint):
        nats = 0.0
        for ids, labels in documents([batch], reserved):
            logits = model(input_ids=ids).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        sums.append(nats)
    return sums


def text_before(config_text: str, text: list[int]) -> dict[str, float]:
    """How far the logits of the model at its start are from those of its base behind the tokens of a text, and
    alone.
    """
    here = assemble_run(parse_config(config_text))
    tokens = torch.arange(3, 40)[None]
    found = here.engine.logits(tokens)
    with find_method(here.config.tuning).switched_off(here.engine.model):
        alone = here.engine.logits(tokens)
        behind = here.engine.logits(torch.cat([torch.tensor([text]), tokens], dim=1))[:, len(text) :]
    return {"behind": float((found - behind).abs().max()), "alone": float((found - alone).abs().max())}
