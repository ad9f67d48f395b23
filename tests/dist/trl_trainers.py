"""Loss curves over labelled or compared answers, ours and by TRL's own trainers."""

import os
from typing import Any

import torch

from tests.dist.assembled import adapter_value, assemble_run, chapters_of
from tests.dist.gradients import plain_base
from trainer.config import Config, parse_config
from trainer.config.section import part
from trainer.data.order.settings import Position
from trainer.data.order.stream import train_stream
from trainer.train.horizon import learning_rate
from trainer.train.loop import train
from trainer.tuning.lora import METHODS
from trainer.tuning.objective.kto import KtoSettings


def our_losses(config_text: str, fingerprint: str) -> dict[str, Any]:
    """The loss of every step from `adapter_value`, and the documents that the steps take, in their order."""
    config = parse_config(config_text)
    here = assemble_run(config, fingerprint)
    here.set_masters()
    losses = [record["loss"] for record in train(here.training(), 0, Position())]
    whole, position, documents = train_stream(config, chapters_of(config, fingerprint), 0, 1), Position(), list[int]()
    for _ in losses:
        documents += [number for batch in whole.step(position) for number in batch.documents]
        position = whole.advance(position)
    return {"losses": losses, "documents": documents}


def dpo_losses(config_text: str, rows: list[dict[str, Any]]) -> list[float]:
    """The losses of `trl.DPOTrainer` on `rows`, of which each step takes the next `train.global_batch`."""
    _alone()
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = parse_config(config_text)
    return _losses(config, rows, DPOTrainer, DPOConfig, beta=config.objective.beta)


def dpo_losses_from(config_text: str, rows: list[dict[str, Any]], adapter: str) -> list[float]:
    """The same from an adapter in PEFT's folder, which is the reference as well: TRL keeps a frozen copy of it."""
    _alone()
    from peft import PeftModel
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = parse_config(config_text)
    model = PeftModel.from_pretrained(plain_base(config), adapter, is_trainable=True)
    return _losses(config, rows, DPOTrainer, DPOConfig, model, beta=config.objective.beta)


def kto_losses(config_text: str, rows: list[dict[str, Any]]) -> list[float]:
    """The same of `trl.KTOTrainer`, which mismatches the answers of each step by one row."""
    _alone()
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    config = parse_config(config_text)
    given = config.objective
    own = part(given, KtoSettings)
    weights = {"desirable_weight": own.desirable_weight, "undesirable_weight": own.undesirable_weight}
    return _losses(config, rows, KTOTrainer, KTOConfig, beta=given.beta, **weights)


def _alone() -> None:
    """Let accelerate see one process without a group, and nothing report to anywhere."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    torch.set_num_threads(1)


def _losses(
    config: Config, rows: list[dict[str, Any]], trainer: Any, arguments: Any, model: Any = None, **settings: Any
) -> list[float]:
    """The losses of a trainer of TRL from `adapter_value`, or from `model`, with our optimizer and learning rates, in
    fp32.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    optim, steps = config.optim, config.train.steps
    assert steps
    given = arguments(
        output_dir=str(config.run.store),
        max_steps=steps,
        per_device_train_batch_size=config.train.global_batch,
        train_sampling_strategy="sequential",
        max_grad_norm=optim.grad_clip,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = trainer(
        model or plain_base(config),
        args=given,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(config.model.base),
        peft_config=None if model else METHODS[config.tuning.method](config.tuning).adapting(names),
    )
    adapters = []
    for name, parameter in theirs.model.named_parameters():
        if parameter.requires_grad:
            if model is None:
                parameter.data = adapter_value(name.removeprefix("base_model.model."), tuple(parameter.shape))
            adapters.append(parameter)
    optimizer = torch.optim.AdamW(
        adapters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: learning_rate(optim, done + 1, steps) / optim.lr)
    theirs.optimizer, theirs.lr_scheduler = optimizer, rates
    theirs.train()
    return [record["loss"] for record in theirs.state.log_history if "loss" in record]
