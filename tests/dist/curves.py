"""Loss curves, ours and by transformers, bitsandbytes and PEFT alone."""

from typing import Any

import torch

from tests.dist.assembled import assemble_run, chapters_of
from tests.nf4 import decode_layers
from trainer.config import parse_config
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.train.horizon import learning_rate
from trainer.train.loop import train


def losses(config_text: str, fingerprint: str) -> list[float]:
    """The loss of every step, in nats a target."""
    here = assemble_run(parse_config(config_text), fingerprint)
    return [record["loss"] for record in train(here.training(), 0, Position())]


def losses_of_each(config_texts: list[str], fingerprint: str) -> list[list[float]]:
    """The same of several runs, one after the other."""
    return [losses(config_text, fingerprint) for config_text in config_texts]


def stock_losses(config_text: str, fingerprint: str) -> list[float]:
    """The same by transformers, bitsandbytes and PEFT alone: one process, a 4-bit model, torch's AdamW, one mean a
    step.
    """
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from trainer.tuning.lora import METHODS

    config = parse_config(config_text)
    torch.set_num_threads(1)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.model.base, dtype=torch.bfloat16, quantization_config=quantization, attn_implementation="sdpa"
    )
    decode_layers(model)
    model.requires_grad_(False).train()
    torch.manual_seed(config.run.seed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(METHODS[config.tuning.method](config.tuning).adapting(names), model)
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optim = config.optim
    optimizer = torch.optim.AdamW(adapters, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    stream = train_stream(config, chapters_of(config, fingerprint), rank=0, world_size=1)
    curve, position, steps = [], Position(), config.train.steps
    assert steps
    for step in range(1, steps + 1):
        batches = [batch.to(torch.device("cpu")) for batch in stream.step(position)]
        targets, nats = sum(batch.targets for batch in batches), 0.0
        for batch in batches:
            logits = model(
                input_ids=batch.input.input_ids, position_ids=batch.input.position_ids, use_cache=False
            ).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels[0], reduction="sum") / targets
            loss.backward()
            nats += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(adapters, optim.grad_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(nats)
        position = stream.advance(position)
    return curve
