"""Losses of a head that learns beside LoRA, ours and by transformers and PEFT."""

from typing import Any

import torch
import transformers
from peft import get_peft_model

from tests.dist.assembled import adapter_value, assemble_run
from trainer.config import Config, parse_config
from trainer.config.section import part
from trainer.data.order.settings import Position
from trainer.train.horizon import learning_rate
from trainer.train.loop import train
from trainer.tuning.head import head_of
from trainer.tuning.lora import METHODS
from trainer.tuning.method import method_of
from trainer.tuning.objective.reward import RewardSettings


def our_steps(config_text: str, fingerprint: str) -> dict[str, Any]:
    """The record of every step from `adapter_value`, and the documents that the steps take, in their order."""
    here = assemble_run(parse_config(config_text), fingerprint)
    here.set_masters()
    records, documents = list[dict[str, Any]](), list[Any]()
    position = Position()
    for record in train(here.training(), 0, position):
        records.append({key: value for key, value in record.items() if isinstance(value, int | float)})
        documents.append(
            here.ranks.gather_objects([n for batch in here.stream.step(position) for n in batch.documents])
        )
        position = here.stream.advance(position)
    return {"records": records, "documents": [[n for rank in step for n in rank] for step in documents]}


def plain_steps(config_text: str, steps: list[list[list[Any]]]) -> list[float]:
    """The losses of these texts and classes, or of these chosen and rejected texts, those of a step at once, by
    transformers' class, PEFT and AdamW."""
    config = parse_config(config_text)
    torch.set_num_threads(1)
    model, tokenizer = plain_model(config), transformers.AutoTokenizer.from_pretrained(config.model.base)
    learning = [part for part in model.parameters() if part.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        learning, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    losses = list[float]()
    for number, rows in enumerate(steps, 1):
        first, second = zip(*rows, strict=True)
        if config.objective.name == "reward":
            batch = tokenizer([*first, *second], return_tensors="pt", padding=True, return_token_type_ids=False)
            chosen, rejected = model(**batch).logits[:, 0].chunk(2)
            own = part(config.objective, RewardSettings)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected - own.margin).mean()
            loss = loss + own.center_rewards * (chosen + rejected).square().mean()
        elif config.objective.name == "token_classification":
            batch = tokenizer(list(first), return_tensors="pt", padding=True, return_token_type_ids=False)
            labels = torch.full(batch["input_ids"].shape, -100)
            for place, (text, tags) in enumerate(rows):
                for at, tag in zip(_beginnings(tokenizer, text), tags, strict=True):
                    labels[place, at] = tag
            loss = model(**batch, labels=labels).loss
        elif config.objective.name == "multilabel_classification":
            batch = tokenizer(list(first), return_tensors="pt", padding=True, return_token_type_ids=False)
            loss = model(**batch, labels=torch.tensor(second, dtype=torch.float32)).loss
        else:
            batch = tokenizer(list(first), return_tensors="pt", padding=True, return_token_type_ids=False)
            loss = model(**batch, labels=torch.tensor(second)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, number, len(steps))
        optimizer.step()
        losses.append(float(loss))
    return losses


def plain_model(config: Config) -> Any:
    """The base with a head and LoRA of `adapter_value`, as PEFT makes it for such a task."""
    head = head_of(method_of(config))
    assert head is not None
    made: Any = getattr(transformers, head.head.transformers_class)
    kind: Any = {"problem_type": "multi_label_classification"} if head.head.several else {}
    base = made.from_pretrained(
        config.model.base,
        num_labels=head.outputs,
        pad_token_id=0,
        dtype=torch.float32,
        attn_implementation="eager",
        **kind,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = METHODS[config.tuning.method](config.tuning).adapting(names)
    adapter.task_type = head.head.task
    model = get_peft_model(base, adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            parameter.data = adapter_value(ours, tuple(parameter.shape))
    for module in model.modules():  # transformers' head for words drops a tenth of its inputs
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def _beginnings(tokenizer: Any, text: str) -> list[int]:
    """The first token of each word, found by the tokens before it."""
    words = text.split(" ")
    before = [" ".join(words[:count]) for count in range(len(words))]
    return [len(tokenizer(part + " ")["input_ids"]) if part else 0 for part in before]
